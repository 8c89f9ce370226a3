"""Run by test_memory.py in ComfyUI's interpreter: our parts under ComfyUI's model management.

Arguments: the pack's folder, a base directory. The current directory is ComfyUI's.
"""

import gc
import os
import shutil
import weakref
from dataclasses import replace

import mlx.core as mx
import torch
from memory_base import CPU, base, host, ignore, loaded, model_management
from the_pack.llada2_mlx import tasks
from the_pack.llada2_mlx.checkpoint.layout import BUILT_IN, Part
from the_pack.llada2_mlx.imaging.flow import DecodeOptions
from the_pack.nodes.vq import ZImageDecode


def free(amount: float) -> None:
    model_management.free_memory(amount, CPU)
    gc.collect()


# one part, however often and under whatever name it is asked for; weights only when the network runs
backbone = host.backbone(host.BUILT_IN, "float32")
assert host.backbone(host.BUILT_IN, "float32") is backbone
assert host.backbone(host.BUILT_IN, "auto") is backbone
assert host.backbone(host.BUILT_IN, "bf16") is not backbone
before = mx.get_active_memory()
tasks.grid_size(backbone, 256, 256)
assert backbone.loaded_size() == 0 and not loaded()
drawing = tasks.text_to_vq(backbone, "a cat", on_step=ignore)
assert backbone.loaded_size() == backbone.size and backbone.current_loaded_device() == backbone.load_device
assert mx.get_active_memory() - before >= 0.9 * backbone.size
assert loaded() == {"backbone of shapes"}
assert mx.get_cache_memory() == 0  # a run leaves its weights behind, and nothing else

# running again loads nothing again
value = backbone.value
network = weakref.ref(value._model)
tasks.text_to_vq(backbone, "a dog", on_step=ignore)
assert network() is backbone.value._model

# another part does not push it out while there is room
decoder = host.image_part(host.BUILT_IN, Part.DECODER_TURBO)
assert host.image_part(host.BUILT_IN, Part.DECODER_TURBO) is decoder
transformer = weakref.ref(decoder.get(ignore))
assert decoder.get(ignore) is transformer()
assert loaded() == {"backbone of shapes", "turbo decoder of shapes"}

# no memory is needed, so nothing goes
free(0)
assert len(loaded()) == 2

# all of it is needed, so everything goes, and really does
del value
free(1e30)
assert not loaded() and network() is None and transformer() is None
assert mx.get_active_memory() - before < 0.1 * backbone.size

# the handle that a socket holds works again, and gives the same
assert tasks.text_to_vq(backbone, "a cat", on_step=ignore).grid == drawing.grid
assert loaded() == {"backbone of shapes"}
model_management.unload_all_models()
gc.collect()
assert not loaded()

# a model whose files were replaced is another model, and the old one does not stay
folder = base / "models" / "llada2" / "replaced"
shutil.copytree(BUILT_IN, folder)
old = host.backbone("replaced", "float32")
tasks.text_to_vq(old, "a cat", on_step=ignore)
(folder / ".DS_Store").write_text("what a file manager leaves changes nothing")
shutil.rmtree(folder / "decoder-turbo")  # nor does another part
assert host.backbone("replaced", "float32") is old and old.value is not None
os.utime(folder / "model.safetensors", (1e9, 1e9))  # an older file is another one, too
assert host.backbone("replaced", "float32") is not old
assert old.value is None

# a load that fails leaves nothing behind, and the next one works
weights = (folder / "vae/diffusion_pytorch_model.safetensors").read_bytes()
vae = host.image_part("replaced", Part.VAE)
(folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(weights[:5000])
try:
    vae.get(ignore)
except ValueError as error:
    assert "truncated" in str(error)
else:
    raise AssertionError("a damaged file was loaded")
assert vae.value is None and not loaded()
(folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(weights)
assert host.image_part("replaced", Part.VAE).get(ignore)


# a cancelled load, too
def cancel(progress) -> None:
    raise model_management.InterruptProcessingException


try:
    tasks.text_to_vq(backbone, "a cat", on_step=cancel)
except model_management.InterruptProcessingException:
    pass
assert backbone.value is None
assert tasks.text_to_vq(backbone, "a cat", on_step=ignore).grid == drawing.grid

# a decode asks once for each part, before it is loaded, with what it needs to work
asked, get = [], host.ManagedPart.get


def noting(part, on_step, working_bytes=0):
    asked.append((part.name, part.value is not None, working_bytes))
    return get(part, on_step, working_bytes)


host.ManagedPart.get = noting
choice = {"decoder": "full", "steps": 2, "solver": "euler"}
pixels = ZImageDecode.execute((drawing.grid,), host.BUILT_IN, choice, 1.0, 0, 2).args[0]
host.ManagedPart.get = get
sides = drawing.grid.height * 32, drawing.grid.width * 32
assert tuple(pixels.shape) == (1, *sides, 3)
(first, first_there, first_bytes), (second, second_there, second_bytes) = asked
assert (first, second) == ("decoder of shapes", "VAE of shapes") and not first_there and not second_there
assert 10**6 < first_bytes < 10**8 and 36 * sides[0] * sides[1] < second_bytes < 10**8

# so does a drawing, and a batch asks for more
host.ManagedPart.get, asked[:] = noting, []
for pictures in (1, 3):
    tasks.text_to_vq(backbone, "a cat", pictures=pictures, on_step=ignore)
host.ManagedPart.get = get
(name, _, alone), (_, _, together) = asked
assert name == "backbone of shapes" and alone == backbone.value.working.size > 10**6 and together > 10**5 + alone

# in MLX it is a part of its own that gives the same picture, and all of it goes
model_management.unload_all_models()
gc.collect()
before = mx.get_active_memory()
in_mlx = ZImageDecode.execute((drawing.grid,), host.BUILT_IN, choice, 1.0, 0, 2, engine="mlx").args[0]
assert (in_mlx - pixels).abs().mean() < 0.02  # PyTorch runs in the weights' own bf16
managed, working = host.decoder(host.BUILT_IN, Part.DECODER, "mlx", (drawing.grid,), DecodeOptions(2))
assert managed.value is not None and working > first_bytes and loaded() == {"decoder of shapes", "VAE of shapes"}
assert (
    0.8 * managed.size <= mx.get_active_memory() - before <= managed.size
)  # the size has the prior in it, which is PyTorch's
del managed
model_management.unload_all_models()
gc.collect()
assert not loaded() and mx.get_active_memory() - before < 10**5 and mx.get_cache_memory() < 100

# where memory is short, the part that is needed pushes out the others, and they come back when they are needed. With
# --cpu ComfyUI evicts nothing by itself, so the device is given another name and its free memory is counted here.
model_management.unload_all_models()
DEVICE = torch.device("cpu:0")
parts = [host.ManagedPart(f"part {number}", lambda device, on_step: torch.zeros(250_000), 10**6) for number in range(3)]
for part in parts:
    part.load_device = DEVICE
capacity = model_management.minimum_inference_memory() + 1.5e6


def free_memory_left(device=None, torch_free_too=False):
    left = capacity - sum(part.loaded_size() for part in parts)
    return (left, left) if torch_free_too else left


model_management.get_free_memory = free_memory_left
for part in (*parts, parts[0]):
    tensor = weakref.ref(part.get(ignore))
    assert [other for other in parts if other.loaded_size()] == [part]
    evicted = [other for other in parts if other is not part]
    assert tensor() is part.value and all(other.value is None for other in evicted)
capacity += 3e6  # room for all, unless somebody says that he needs some to work in
for part in parts:
    part.get(ignore)
assert all(part.loaded_size() for part in parts)
tensor = weakref.ref(parts[0].value)
parts[2].get(ignore, working_bytes=int(capacity))
assert parts[2].loaded_size() and not parts[0].loaded_size() and tensor() is None

# the language model's work, too: what is loaded elsewhere goes where it does not fit beside
parts, backbone.load_device = [parts[0], backbone], DEVICE
handle = backbone.get(ignore)
handle.working = replace(handle.working, size=10**10)
for left, there in ((2e10, True), (6e9, False)):
    capacity = left + sum(part.size for part in parts)
    parts[0].get(ignore)
    tasks.text_to_vq(backbone, "a cat", on_step=ignore)
    assert backbone.loaded_size() and bool(parts[0].loaded_size()) == there
print("all is well")
