"""For ``validate_inputs``: what is refused when a prompt is queued."""

from __future__ import annotations

from ...llada2_mlx.errors import LLaDA2Error
from .dependencies import missing_packages, repair_hint


def refusal(*checks: tuple) -> str | bool:
    """For ``validate_inputs``: True, or why the inputs cannot be used.

    Args:
        checks: ``(function, *arguments)`` each; the first that raises one of our errors is the answer. One with an
            argument that is None (missing or linked) is left to ComfyUI, or to the run.
    """
    if missing := missing_packages():
        return f"ComfyUI-LLaDA2-MLX needs {', '.join(missing)}, which this Python does not have. {repair_hint()}"
    for function, *arguments in checks:
        if None in arguments:
            continue
        try:
            function(*arguments)
        except LLaDA2Error as error:
            return str(error)
    return True
