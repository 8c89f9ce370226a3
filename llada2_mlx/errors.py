"""Errors whose text is meant for the person who asked: what was wrong, what is allowed, what to do."""


class LLaDA2Error(ValueError):
    """Base of every error that this package raises on purpose."""


class CheckpointError(LLaDA2Error):
    """A model folder, or a file in it, is not what it should be."""


class RequestError(LLaDA2Error):
    """What was asked for cannot be done: a size, a text, a grid, a number out of range."""
