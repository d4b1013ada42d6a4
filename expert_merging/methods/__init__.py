"""Closed forms, one file a family of methods."""
