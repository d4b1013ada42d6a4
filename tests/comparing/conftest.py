"""What the tests of comparing share with those of learning, whose runs they compare."""

from __future__ import annotations

from tests.learned.conftest import answered_zoo

__all__ = ["answered_zoo"]
