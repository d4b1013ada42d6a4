"""Draws the pictures of the calibration files and writes the files: ``python -m dataset.draw``.

Nothing here is random, so the same versions of Pillow and matplotlib draw the same bytes. One module a task; each has
``ENTRIES``, a list of pictures with their questions.
"""
