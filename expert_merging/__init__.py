"""Merge several fine-tuned experts of one base model into one model."""

__version__ = "0.3.0"
