"""Every ATen operation of the tokenizer, the decoder and the VAE has an MPS kernel, or is composed of such."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from pictures import noise
from synthetic import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from llada2_mlx.checkpoint.layout import Checkpoint, Part
from llada2_mlx.imaging.flow import SOLVERS, DecodeOptions, Sampler
from llada2_mlx.imaging.prepare import Purpose
from llada2_mlx.imaging.tokenizer import ImageTokenizer
from llada2_mlx.imaging.transformer_torch import Decoder
from llada2_mlx.imaging.vae import VAE
from llada2_mlx.vq import VQGrid

CPU = torch.device("cpu")
# what PyTorch picks on a CPU, and on MPS in its place
ON_MPS = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": "aten._scaled_dot_product_attention_math_for_mps.default"
}
COMPOSED = "Composite"  # dispatch keys that begin so are made of other operations, on every device


class Operations(TorchDispatchMode):
    """Collects the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))  # such as aten.add.Tensor
        return function(*args, **(kwargs or {}))


@cache
def declared() -> dict[str, dict]:
    """What the installed PyTorch declares of each operation, by its name and overload."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    return {entry["func"].partition("(")[0]: entry for entry in yaml.safe_load(path.read_text())}


def without_mps(names: set[str]) -> Iterator[str]:
    for name in sorted(names):
        namespace, _, operation = ON_MPS.get(name, name).partition(".")
        entry = declared().get(operation.removesuffix(".default"))
        if namespace != "aten" or entry is None:
            yield name
            continue
        entry = declared().get(entry.get("structured_delegate"), entry)
        keys = {key.strip() for keys in entry.get("dispatch", {COMPOSED: ""}) for key in keys.split(",")}
        if not any(key == "MPS" or key.startswith(COMPOSED) for key in keys):
            yield name


def collect(work) -> set[str]:
    with Operations() as found:
        work()
    return found.names


def test_the_tokenizer() -> None:
    tokenizer = ImageTokenizer(Checkpoint(tiny()), CPU)
    # the position embedding runs on the CPU wherever the rest does
    embed, inside = tokenizer.vision.embeddings.embeddings, set()
    forward = embed.forward

    def aside(*args):
        with Operations() as found:
            result = forward(*args)
        inside.update(found.names)
        return result

    embed.forward = aside
    names = collect(lambda: tokenizer.encode(noise(128, 160), Purpose.UNDERSTAND))
    assert len(names) > 20 and not list(without_mps(names | inside))


@pytest.mark.parametrize("solver", [*SOLVERS, "published"])
def test_the_decoder(solver: str) -> None:
    decoder = Decoder(Checkpoint(tiny()), Part.DECODER, CPU)
    options = DecodeOptions(steps=3, upscale=1)
    how = {"sampler": Sampler.RENOISE} if solver == "published" else {"solver": solver}
    grid = VQGrid.from_list(list(range(64)), 8, 8, decoder.codebook_size)
    names = collect(lambda: decoder.sample([grid], replace(options, **how)))
    assert len(names) > 20 and not list(without_mps(names))


def test_the_vae_whole_and_in_tiles() -> None:
    vae = VAE(Checkpoint(tiny()), CPU)
    names = collect(lambda: vae.decode(torch.zeros(1, 16, 8, 8))) | collect(
        lambda: vae.decode(torch.zeros(1, 16, 8, 136))
    )
    assert len(names) > 10 and not list(without_mps(names))


def test_an_operation_without_a_kernel_would_be_found() -> None:
    assert list(without_mps({"aten.geqrf.default", "prims.sum.default", "aten.add.Tensor"})) == [
        "aten.geqrf.default",
        "prims.sum.default",
    ]
