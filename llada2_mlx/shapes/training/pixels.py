"""Scenes -> what the networks see."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..world import Scene, draw_array


def drawn(scenes: Iterable[Scene]) -> torch.Tensor:
    """The pictures of scenes, [batch, 3, height, width] float32 in -1 .. 1."""
    batch = torch.stack([torch.from_numpy(draw_array(scene)) for scene in scenes])
    return batch.permute(0, 3, 1, 2).float() / 127.5 - 1
