"""Calibration files, and what draws the pictures in them."""
