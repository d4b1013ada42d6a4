"""The InternVL family."""
