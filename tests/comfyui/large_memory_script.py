"""Run by test_memory.py in ComfyUI's interpreter: models large enough that the process's memory tells which are there.

Arguments: the pack's folder, a base directory with a model named "large". The current directory is ComfyUI's.
"""

import ctypes
import gc
import sys

import mlx.core as mx
import psutil
from memory_base import CPU, host, ignore, loaded, model_management
from torch import nn

from comfy.model_patcher import ModelPatcher  # isort: skip  # there since memory_base


def memory() -> int:
    """Bytes of this process that are in memory, without what its allocator keeps for later."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def near(grown: int, size: int) -> bool:
    return abs(grown - size) < 0.2 * size


# another model of the graph, such as a user's SDXL
other = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(8)))
foreign = ModelPatcher(other, CPU, CPU)
model_management.load_models_gpu([foreign])
assert foreign in model_management.loaded_models()

before = memory()
backbone = host.backbone("large", "float32")
assert backbone.size > 4e8 and memory() - before < 0.1 * backbone.size  # only headers are read
backbone.get(ignore)
assert near(memory() - before, backbone.size)  # there once
assert near(mx.get_peak_memory(), backbone.size)  # and never twice on the way
assert mx.get_cache_memory() == 0  # nor is anything kept of what reading it took
assert foreign in model_management.loaded_models() and loaded() == {"backbone of large"}

# what is asked for is there already, nobody goes
model_management.free_memory(0, CPU, keep_loaded=model_management.current_loaded_models)
assert loaded() == {"backbone of large"}

# the other one needs the room: ours goes, and the memory is free
kept = [entry for entry in model_management.current_loaded_models if entry.model is foreign]
model_management.free_memory(1e30, CPU, keep_loaded=kept)
assert not loaded() and foreign in model_management.loaded_models()
assert memory() - before < 0.2 * backbone.size

# ours needs it: the other one goes, and ours is back by being used
kept = [entry for entry in model_management.current_loaded_models if entry.model is backbone]
model_management.free_memory(1e30, CPU, keep_loaded=kept)
assert foreign not in model_management.loaded_models()
backbone.get(ignore)
assert near(memory() - before, backbone.size) and loaded() == {"backbone of large"}
model_management.load_models_gpu([foreign])
assert foreign in model_management.loaded_models()
print("all is well")
