"""LLaDA2.0-Uni on Apple Silicon: the library. Nothing here knows of ComfyUI."""

__version__ = "0.1.0"
