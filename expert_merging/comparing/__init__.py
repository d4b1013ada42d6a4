"""Comparing models with the experts, without labels."""
