"""What the tests of running models share with those of learning, which runs them too."""

from __future__ import annotations

from tests.learned.conftest import fresh_accelerate

__all__ = ["fresh_accelerate"]
