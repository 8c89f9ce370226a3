"""Shapes: a small world, the words for it, and how the built-in model is trained and measured on it."""
