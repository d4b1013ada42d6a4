"""What the tests of running models share with those of learning, which runs them too."""

from __future__ import annotations

from tests.learned.conftest import answered_zoo

__all__ = ["answered_zoo"]
