"""ComfyUI-LLaDA2-MLX: LLaDA2.0-Uni for ComfyUI on Apple Silicon. ComfyUI's way in is ``comfy_entrypoint``."""

import logging

# What the browser may load: docs/NODE.md is the help page of a node.
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls to get the nodes. Imports no model library: those wait until a node runs."""
    from .nodes import LLaDA2Extension
    from .nodes.host import missing_packages, repair_hint

    if missing := missing_packages():
        logging.warning("ComfyUI-LLaDA2-MLX: the nodes cannot run without %s. %s", ", ".join(missing), repair_hint())
    return LLaDA2Extension()
