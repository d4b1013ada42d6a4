"""Calibration files, the pictures in them, and the words that models are asked in."""
