"""Inputs that nobody would think of, made by hypothesis from a seed.

``make fuzz``, or in the folder ``tests``: ``python -m fuzz --help``. ``test_fuzz.py`` is a short run of the same.
"""
