"""Experts that stay apart: each question goes to those that its perplexity speaks for, and no checkpoint is made."""
