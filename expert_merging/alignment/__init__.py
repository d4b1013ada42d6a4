"""Experts of different origin: their units are put in the base's order before anything is merged."""
