"""``VQGrid``: a picture as image codes, the only thing that crosses between MLX and PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .errors import RequestError
from .files import replacing


@dataclass(frozen=True)
class Origin:
    """Where codes come from; each is empty where it is not known, as in a file of an older version.

    Args:
        model: the name of the model.
        vectors, table: fingerprints of its codebook, as the image tokenizer and as the decoders have it.
        use: what a picture was encoded for, "understanding" or "editing"; empty too for one that was drawn.
    """

    model: str = ""
    vectors: str = ""
    table: str = ""
    use: str = ""

    def may_equal(self, other: Origin) -> bool:
        """Whether the codebooks are the same one, as far as both are known."""
        for one, another in ((self.vectors, other.vectors), (self.table, other.table)):
            if one and another:
                return one == another
        return True


@dataclass(frozen=True, eq=False)
class VQGrid:
    """A grid of image codes.

    Args:
        codes: integers [height, width], each in ``0 .. codebook_size - 1``; kept as int32, read-only.
        codebook_size: how many codes the model that made the grid has.
        origin: which model that is; two grids of the same codes are equal wherever they come from.

    Raises:
        RequestError: the codes are no two-dimensional grid of integers, or one is outside the codebook.
    """

    codes: np.ndarray
    codebook_size: int
    origin: Origin = Origin()

    def __post_init__(self) -> None:
        try:
            codes = np.asarray(self.codes)
        except ValueError:  # rows of different lengths
            codes = np.empty(0)
        if codes.ndim != 2 or 0 in codes.shape or not np.issubdtype(codes.dtype, np.integer):
            raise RequestError(
                f"A grid of codes is a non-empty [height, width] array of integers, not {codes.dtype} {list(codes.shape)}."
            )
        if not isinstance(self.codebook_size, int) or not 0 < self.codebook_size < 2**31:
            raise RequestError(f"A codebook has a positive number of codes, not {self.codebook_size!r}.")
        least, most = int(codes.min()), int(codes.max())
        if least < 0 or most >= self.codebook_size:
            raise RequestError(
                f"The grid holds codes from {least} to {most}; the codebook has 0 to {self.codebook_size - 1}."
            )
        codes = codes.astype(np.int32)
        codes.setflags(write=False)
        object.__setattr__(self, "codes", codes)

    @property
    def height(self) -> int:
        """Rows of codes."""
        return self.codes.shape[0]

    @property
    def width(self) -> int:
        """Columns of codes."""
        return self.codes.shape[1]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VQGrid):
            return NotImplemented
        return self.codebook_size == other.codebook_size and np.array_equal(self.codes, other.codes)

    __hash__ = None

    def __repr__(self) -> str:
        return f"VQGrid({self.height} x {self.width} codes of {self.codebook_size})"

    @classmethod
    def from_list(
        cls, codes: list[int], height: int, width: int, codebook_size: int, origin: Origin = Origin()
    ) -> VQGrid:
        """A grid from its codes row by row."""
        if len(codes) != height * width or height < 1:
            raise RequestError(f"{len(codes)} codes do not make a grid of {height} x {width}.")
        return cls(np.asarray(codes).reshape(height, width), codebook_size, origin)

    def to_list(self) -> list[int]:
        """The codes row by row."""
        return self.codes.flatten().tolist()

    def save(self, path: str | Path, notes: Mapping[str, str] | None = None) -> None:
        """Write the grid as safetensors, its size and codebook in the metadata; whole or not at all.

        Args:
            notes: what else to write into the metadata; ``load`` does not read it.
        """
        metadata = {
            **(notes or {}),
            "format": "llada2-vq",
            "height": str(self.height),
            "width": str(self.width),
            "codebook_size": str(self.codebook_size),
            **{key: known for key, known in asdict(self.origin).items() if known},
        }
        with replacing(Path(path)) as partial:
            partial.write_bytes(save({"codes": self.codes}, metadata))  # save_file makes a file for its owner alone

    @classmethod
    def load(cls, path: str | Path) -> VQGrid:
        """Read a grid that ``save`` wrote.

        Raises:
            RequestError: the file is damaged or holds no grid, or its metadata does not fit its codes.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata, codes = file.metadata() or {}, file.get_tensor("codes")
            origin = Origin(**{field.name: metadata.get(field.name, "") for field in fields(Origin)})
            grid = cls(codes, int(metadata["codebook_size"]), origin)
            stated = int(metadata["height"]), int(metadata["width"])
        except FileNotFoundError:
            raise RequestError(f"There is no file {path}.") from None
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from None
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise RequestError(
                f"{path} is not a grid of codes ({error}); save one with `llada2-mlx encode` or `t2i --codes`."
            ) from None
        if stated != (grid.height, grid.width):
            raise RequestError(f"{path} states {stated[0]} x {stated[1]} codes and holds {grid.height} x {grid.width}.")
        return grid


@dataclass(frozen=True)
class GridSet:
    """Several pictures that are read together, in their order; their sizes are free.

    A batch is a tuple of grids, of which each is for itself. So neither can be taken for the other.

    Raises:
        RequestError: there is no picture, or two are of different codebooks.
    """

    grids: tuple[VQGrid, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", tuple(self.grids))
        if not self.grids:
            raise RequestError("The set holds no picture. Connect one at least.")
        for (at, one), (number, other) in combinations(enumerate(self.grids, 1), 2):
            if one.codebook_size != other.codebook_size or not one.origin.may_equal(other.origin):
                raise RequestError(
                    f"The pictures of a set have to be codes of one model: picture {at} is of {_model_of(one)}, "
                    f"picture {number} of {_model_of(other)}. Encode all of them with the same model."
                )

    def __len__(self) -> int:
        return len(self.grids)

    def with_last(self, number: int) -> GridSet:
        """The same pictures with picture ``number`` at the end, counted from 1; 0 is the one that is last already.

        Raises:
            RequestError: there is no such picture.
        """
        if not 0 <= number <= len(self):
            raise RequestError(
                f"Picture {number} is asked for, and the set has {len(self)}. Choose 1 to {len(self)}, or 0 for the last."
            )
        at = (number or len(self)) - 1
        return GridSet((*self.grids[:at], *self.grids[at + 1 :], self.grids[at]))


# What a task reads: one picture, or several together.
Pictures = VQGrid | GridSet


def grids_of(pictures: Pictures) -> tuple[VQGrid, ...]:
    """The pictures that are read together, one or several."""
    return pictures.grids if isinstance(pictures, GridSet) else (pictures,)


def readings(vq: Sequence[VQGrid] | GridSet) -> tuple[Pictures, ...]:
    """What a task reads at once: each picture of a batch by itself, or a set as a whole."""
    return (vq,) if isinstance(vq, GridSet) else tuple(vq)


def with_source(vq: Sequence[VQGrid] | GridSet, number: int) -> Sequence[VQGrid] | GridSet:
    """``vq`` with the picture that is to be changed as the last of its set; 0 is the one that is.

    Raises:
        RequestError: the set has no such picture, or a picture is chosen where there is no set.
    """
    if isinstance(vq, GridSet):
        return vq.with_last(number)
    if number:
        raise RequestError(
            f"source is {number}: it chooses a picture of a set, and this is a batch, of which every picture is changed. Set it to 0."
        )
    return vq


def _model_of(grid: VQGrid) -> str:
    return grid.origin.model or f"a model with {grid.codebook_size} codes"


def picture_seed(seed: int, index: int) -> int:
    """The seed of picture ``index`` of a batch: ``seed + index``, within 64 bits."""
    return (seed + index) % 2**64
