"""What the scripts of test_memory.py share: ComfyUI without a server, and the pack in it.

Arguments: the pack's folder, a base directory. The current directory is ComfyUI's.
"""

import importlib.util
import sys
from pathlib import Path

pack, base = map(Path, sys.argv[1:3])
sys.argv = ["main.py", "--cpu", "--base-directory", str(base)]
sys.path.insert(0, str(Path.cwd()))

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402
from comfy import model_management  # noqa: E402

spec = importlib.util.spec_from_file_location("the_pack", pack / "__init__.py", submodule_search_locations=[str(pack)])
sys.modules["the_pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["the_pack"])

from the_pack.nodes import host  # noqa: E402

CPU = torch.device("cpu")


def loaded() -> set[str]:
    """The names of our parts that are in memory."""
    return {
        model.name
        for model in model_management.loaded_models()
        if isinstance(model, host.ManagedPart) and model.loaded_size()
    }


def ignore(progress) -> None:
    """An ``OnStep`` that goes on."""
