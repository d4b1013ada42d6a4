"""Coefficients found without a gradient: candidates are merged in memory, scored, and the next ones drawn nearby."""
