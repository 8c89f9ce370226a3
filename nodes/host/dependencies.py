"""What the nodes need of the Python that runs ComfyUI, and what to say where it is not there."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...llada2_mlx.errors import LLaDA2Error

_PACKAGES = ("mlx", "mlx_lm", "transformers", "diffusers", "safetensors", "huggingface_hub", "einops", "torchdiffeq")


def missing_packages() -> list[str]:
    """Packages that the nodes need and this Python does not have; nothing is imported."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def repair_hint() -> str:
    """How to install what is missing, into the Python that runs ComfyUI."""
    return f'Run: "{sys.executable}" -m pip install -r "{Path(__file__).parent.parent.parent / "requirements.txt"}" and restart ComfyUI.'


def explains_imports(execute: Callable) -> Callable:
    """For a node's ``execute``: a package that is missing or broken becomes one sentence that says what to do."""

    @functools.wraps(execute)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return execute(*args, **kwargs)
        except LLaDA2Error:
            raise
        except Exception as error:
            cause = _import_error(error)
            if cause is None:
                raise
            package = f"the package {cause.name.partition('.')[0]}" if cause.name else "a package"
            raise RuntimeError(
                f"ComfyUI-LLaDA2-MLX needs {package}, which cannot be imported ({cause}). {repair_hint()}"
            ) from error

    return wrapper


def _import_error(error: BaseException | None) -> ImportError | None:
    """The import that failed behind an error; lazy loaders wrap it."""
    while error is not None and not isinstance(error, ImportError):
        error = error.__cause__
    return error
