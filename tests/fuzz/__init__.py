"""Damaged files: `damage` makes them, `readers` reads them, `python -m tests.fuzz` counts what comes of it."""
