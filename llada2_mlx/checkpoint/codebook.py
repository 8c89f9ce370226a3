"""Which codebook a model's codes are of, and whether a grid of codes belongs to a model.

A codebook is known by its content, so that a copy of a model is the same model: by the vectors of the image tokenizer,
and, where that is not there, by the table that the decoders look codes up in.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from ..errors import RequestError
from ..vq import Origin, Pictures, VQGrid, grids_of
from .layout import Checkpoint, visible

VECTORS = "model.vqmodel.quantize.embedding.weight"  # in the image tokenizer's file
_SAMPLES, _SAMPLE_BYTES = 32, 2**16  # what is hashed of a table: enough to tell two trainings apart, at no cost


def origin(checkpoint: Checkpoint, name: str = "") -> Origin:
    """What the codes of a model carry. A file that is missing or damaged is left out; its loader says what is wrong.

    Args:
        name: what a person calls the model, if not as its folder.
    """
    folder = checkpoint.root / "image_tokenizer"
    weights = visible(folder, "*.safetensors")
    return Origin(
        model=name or checkpoint.root.name,
        vectors=_fingerprint(weights[0]) if len(weights) == 1 else "",
        table=_fingerprint(folder / "sigvq_embedding.pt"),
    )


def require_same(grid: VQGrid, checkpoint: Checkpoint) -> None:
    """Check that a grid's codes are of the codebook that a model has, as far as both are known.

    Raises:
        RequestError: they are of another codebook, and would be another picture.
    """
    require_one_codebook(grid.origin, checkpoint)


def require_one_codebook(theirs: Origin, checkpoint: Checkpoint) -> None:
    """The same of codes that are still to be made by the model that ``theirs`` says."""
    if not theirs.may_equal(origin(checkpoint)):
        raise RequestError(
            f"The codes are of the model {theirs.model or 'that made them'}, and {checkpoint.root.name} has another codebook. "
            "Use one model for all nodes of a graph."
        )


def doubt(pictures: Pictures, checkpoint: Checkpoint, use: str) -> str | None:
    """A sentence where a grid has another size or purpose than its use asks for, else None.

    Of a set it is about the first such picture, and says which that is.

    Args:
        use: "understanding" or "editing".
    """
    grids = grids_of(pictures)
    for number, grid in enumerate(grids, 1):
        if sentence := _doubt(grid, checkpoint, use):
            return f"Picture {number} of {len(grids)}: {sentence}" if len(grids) > 1 else sentence
    return None


def _doubt(grid: VQGrid, checkpoint: Checkpoint, use: str) -> str | None:
    if sentence := checkpoint.image_sizes.doubt_grid(use, grid):
        return sentence
    if grid.origin.use in ("", use):
        return None
    return f"These codes were made for {grid.origin.use}, not for {use}. Choose the purpose in SigLIP-VQ Encode."


def _fingerprint(path: Path) -> str:
    try:
        stat = path.stat()
        return _hashed(path, stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@lru_cache(maxsize=64)
def _hashed(path: Path, size: int, changed: int) -> str:
    """A hash of samples of the codebook's bytes: of its tensor in a safetensors file, else of the whole file."""
    with path.open("rb") as file:
        begin, end, said = 0, size, b""
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("truncated")
            stated = json.loads(file.read(length))[VECTORS]
            begin, end = (8 + length + offset for offset in stated["data_offsets"])
            said = json.dumps([stated["dtype"], stated["shape"]]).encode()
        seen = hashlib.sha256(said + str(end - begin).encode())
        for sample in range(_SAMPLES):
            file.seek(begin + (end - begin) * sample // _SAMPLES)
            seen.update(file.read(min(_SAMPLE_BYTES, end - file.tell())))
    return seen.hexdigest()[:32]
