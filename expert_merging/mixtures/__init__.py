"""Outputs that are no one dense model: mixtures of experts."""
