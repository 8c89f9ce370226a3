"""The VAE: its type, its tiles, and what it says of numbers that are none. Parity is in test_parity.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import tiny

from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.errors import LLaDA2Error
from llada2_mlx.imaging import vae as module
from llada2_mlx.imaging.tokenizer import _PositionsOnCPU
from llada2_mlx.imaging.vae import TILE, VAE

CPU = torch.device("cpu")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """[1, 3, height, width] in 0 .. 1."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0)[None] / 255


def latents(side: int) -> torch.Tensor:
    return torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("upcast", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_it_runs_in_float32_where_its_config_says_so(tmp_path: Path, upcast: bool, expected: torch.dtype) -> None:
    folder = Path(shutil.copytree(tiny(), tmp_path / "model"))
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(config | {"force_upcast": upcast}))
    assert VAE(Checkpoint(folder), CPU).model.dtype == expected


def test_tiles_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes' VAE on smooth latents, in tiles of 128 pixels and at once: the steps between neighbours are alike."""
    whole = VAE(Checkpoint(BUILT_IN), CPU)
    monkeypatch.setattr(module, "TILE", 128)
    tiled = VAE(Checkpoint(BUILT_IN), CPU)
    smooth = torch.nn.functional.interpolate(latents(6), size=(32, 32), mode="bicubic")
    at_once, in_tiles = whole.decode(smooth), tiled.decode(smooth)
    assert at_once.shape == in_tiles.shape == (1, 256, 256, 3)
    steps = lambda pixels: pixels.diff(dim=2).abs().mean(dim=(0, 1, 3))
    assert (steps(in_tiles) - steps(at_once)).max() < 0.02


def test_the_tiles_of_a_large_picture_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """1280 x 1280 in the tiles that are used, and at once: no step between neighbours is larger by two shades of 255.

    Shapes' VAE normalises over all channels at once, so that a tile of other contents has another tone: harder than the
    published one's 32 groups. On these latents the largest step is 0.0040 larger, and that at no seam. On a drawn picture it
    was 0.0018 larger with tiles of 1024 pixels, 0.0023 with 896, 0.0044 with 768 and 0.0063 with 640; an overlap of one half
    made it 0.0016, for 1.8 times the work.
    """
    tiled = VAE(Checkpoint(BUILT_IN), CPU)
    smooth = torch.nn.functional.interpolate(latents(10), size=(160, 160), mode="bicubic")
    in_tiles = tiled.decode(smooth)
    monkeypatch.setattr(tiled.model, "use_tiling", False)
    at_once = tiled.decode(smooth)
    assert not torch.equal(in_tiles, at_once)
    for side in (1, 2):
        steps = lambda pixels, side=side: pixels.diff(dim=side).abs().mean(dim=(0, 3 - side, 3))
        assert (steps(in_tiles) - steps(at_once)).max() < 2 / 255
    assert (in_tiles - at_once).abs().mean() < 0.03


def test_a_picture_of_1024_is_not_cut_and_a_larger_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, sizes = VAE(Checkpoint(tiny()), CPU), []
    handle = vae.model.decoder.register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[0].shape[-2:])))
    vae.decode(latents(128))
    assert sizes == [(128, 128)]
    sizes.clear()
    assert vae.decode(latents(136)).shape == (1, 1088, 1088, 3)
    handle.remove()
    assert len(sizes) == 4 and max(max(size) for size in sizes) == TILE // 8


def test_pixels_that_are_not_finite_are_no_picture() -> None:
    vae = VAE(Checkpoint(tiny()), CPU)
    vae.model.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(LLaDA2Error, match="The VAE gave values that are not finite"):
        vae.decode(latents(8))


def test_one_bad_picture_of_a_batch_is_said() -> None:
    vae, both = VAE(Checkpoint(tiny()), CPU), latents(8).repeat(2, 1, 1, 1)
    both[1, 3, 4, 5] = float("inf")
    assert vae.decode(both[:1]).shape == (1, 64, 64, 3)
    with pytest.raises(LLaDA2Error, match="The VAE gave values that are not finite"):
        vae.decode(both)


def test_pixels_can_be_used_with_autograd() -> None:
    pixels = VAE(Checkpoint(tiny()), CPU).decode(latents(8))
    assert not pixels.is_inference()
    (pixels * torch.ones(1, requires_grad=True)).sum().backward()


def test_colours_of_latents_are_those_of_the_picture() -> None:
    """A drawn picture, of which the colours of its latents show two thirds of the variance at that size."""
    vae = VAE(Checkpoint(BUILT_IN), CPU)
    with Image.open(Path(__file__).parents[2] / "docs/drawn.png") as image:
        pixels = to_tensor(image.convert("RGB"))
    with torch.no_grad():
        encoded = vae.model.encode(2 * pixels - 1).latent_dist.mode()
    latent = (encoded - vae.model.config.shift_factor) * vae.model.config.scaling_factor
    factors, bias = vae.colours()
    assert factors.shape == (16, 3) and bias.shape == (3,)
    shown = latent[0].movedim(0, -1) @ factors + bias
    small = torch.nn.functional.avg_pool2d(2 * pixels - 1, 8)[0].movedim(0, -1)
    assert torch.corrcoef(torch.stack([shown.flatten(), small.flatten()]))[0, 1] > 0.8


def test_positions_are_interpolated_on_the_cpu() -> None:
    from llada2_mlx.imaging.tokenizer import ImageTokenizer

    assert isinstance(ImageTokenizer(Checkpoint(tiny()), CPU).vision.embeddings, _PositionsOnCPU)
    seen = []

    class Embeddings(torch.nn.Module):
        def forward(self, patches: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            seen.append((patches.device.type, place.device.type))
            return patches

    found = _PositionsOnCPU(Embeddings())(torch.zeros(3, 4, device="meta"), torch.zeros(2, device=CPU))
    assert found.device.type == "meta" and seen == [("cpu", "cpu")]
