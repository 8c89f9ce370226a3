"""Published tensors -> MLX parameters: the one place where foreign names become ours."""

from __future__ import annotations

from collections.abc import Collection, Generator
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint.config import BackboneConfig
from ..checkpoint.hub import again
from ..checkpoint.layout import Checkpoint, TensorInfo, check_tensors, safetensors_header
from ..errors import CheckpointError
from ..progress import Progress
from .network import LLaDA2
from .precision import Quantization, build, is_router, on_cpu, parameter_type

EIGHT, SCALE, SIDE = "F8_E4M3", "_scale_inv", 128  # a float8 tensor NAME has NAME_scale_inv, a scale a 128 x 128 block
STORED = ("BF16", "F16", "F32", EIGHT)


def published_names(parameter: str, shape: tuple[int, ...]) -> list[str]:
    """The checkpoint's tensors that make up one of our parameters, in the order in which they are stacked.

    Everything has its published name except a layer's experts: ``mlp.switch_mlp.gate_proj.weight`` [E, out, in]
    is ``mlp.experts.0.gate_proj.weight`` ... ``mlp.experts.E-1.gate_proj.weight``.
    """
    if ".switch_mlp." not in parameter:
        return [parameter]
    return [parameter.replace(".switch_mlp.", f".experts.{expert}.") for expert in range(shape[0])]


def stored_type(tensors: dict[str, TensorInfo]) -> str:
    """The precision that a backbone is stored in: float32, or bf16 for all smaller types."""
    return "float32" if tensors["model.word_embeddings.weight"].dtype == "F32" else "bf16"


def check_backbone(
    config: BackboneConfig, block: Quantization | None, tensors: dict[str, TensorInfo], checkpoint: Checkpoint
) -> None:
    """Compare names and shapes in the checkpoint with those of the network, without reading a weight.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, or of a type that cannot be read.
    """
    expected = {}
    for parameter, value in tree_flatten(build(config, block).parameters()):
        names = names_of(parameter, value.shape, tensors)
        shape = value.shape if names == [parameter] else value.shape[1:]
        expected.update(dict.fromkeys(names, shape))
        kinds = ("U32",) if value.dtype == mx.uint32 else STORED
        for name in names:
            if name in tensors:
                require_type(name, tensors[name], kinds)
            if name in tensors and tensors[name].dtype == EIGHT:
                expected[name + SCALE] = scales_shape(shape)
    check_tensors(tensors, expected, checkpoint.root)


def shapes_of(config: BackboneConfig, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a checkpoint that is not quantised, without the scales of a float8 one.

    Args:
        names: of the tensors that it has, which say whether it has a layer's experts one by one or as a stack.
    """
    shapes = {}
    for parameter, value in tree_flatten(build(config).parameters()):
        own = names_of(parameter, value.shape, names)
        shapes |= dict.fromkeys(own, value.shape if own == [parameter] else value.shape[1:])
    return shapes


def check_file(shapes: dict[str, tuple[int, ...]], names: Collection[str], path: Path) -> dict[str, TensorInfo]:
    """The tensors in one file of a checkpoint, compared with what the network needs, without reading a weight.

    Args:
        shapes: of all that the network needs, see ``shapes_of``.
        names: what the file has to hold.

    Raises:
        CheckpointError: as ``check_backbone``.
    """
    tensors = safetensors_header(path)
    expected = {name: shapes[name] for name in names if name in shapes}
    expected |= {name: scales_shape(shapes[base]) for name in names if (base := scaled_by(name)) in shapes}
    for name, info in tensors.items():
        require_type(name, info)
    check_tensors(tensors, expected, path)
    return tensors


def require_type(name: str, info: TensorInfo, kinds: tuple[str, ...] = STORED) -> None:
    """Refuse a tensor of a type that cannot be read."""
    if info.dtype not in kinds:
        raise CheckpointError(
            f"{name} in {info.file} is stored as {info.dtype}; only {', '.join(kinds)} can be read. Choose the model in "
            "one of these."
        )


def scaled_by(name: str) -> str:
    """The float8 tensor that a tensor of this name has the scales of; an empty text where it is none."""
    return name.removesuffix(SCALE) if name.endswith(SCALE) else ""


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a float8 matrix."""
    return tuple(-(-side // SIDE) for side in shape)


class Reader:
    """Reads parameters of a checkpoint, or of one of its files, each once.

    A file is mapped lazily and a tensor is read when its parameter's turn comes; experts are stacked one layer's
    projection at a time, so that never more than one stack exists twice.
    """

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._files = {path: mx.load(str(path)) for path in {info.file for info in self._tensors.values()}}

    def read(self, parameter: str, shape: tuple[int, ...], dtype: mx.Dtype | None) -> mx.array:
        """A parameter, in memory.

        Args:
            dtype: that of the network; None keeps the type that the parameter is stored in.

        Raises:
            CheckpointError: a tensor holds values that are not finite.
        """
        names = names_of(parameter, shape, self._tensors)
        read = [self._read(name, dtype) for name in names]
        value = read[0] if names == [parameter] else mx.stack(read)
        del read
        if value.dtype == mx.uint32:
            mx.eval(value)
            return value
        if dtype is not None:
            if not is_router(parameter):
                value = value.astype(dtype)
            value = _laid_out(parameter, value.astype(parameter_type(parameter, dtype)))
        finite = mx.isfinite(value).reshape(len(names), -1).all(axis=-1)
        mx.eval(value, finite)
        if bad := [name for name, ok in zip(names, finite.tolist()) if not ok]:
            raise CheckpointError(
                f"{self._tensors[bad[0]].file} holds values that are not finite (NaN or infinity) in {bad[0]}. "
                f"{again(self._tensors[bad[0]].file)}"
            )
        return value

    def _read(self, name: str, dtype: mx.Dtype | None) -> mx.array:
        value = self.take(name)
        if self._tensors[name].dtype != EIGHT:
            return value
        return from_eight(value, self.take(name + SCALE)).astype(dtype or mx.bfloat16)

    def take(self, name: str) -> mx.array:
        """A tensor as it is stored, float8 as bytes; not yet in memory."""
        return self._files[self._tensors[name].file].pop(name)


def from_eight(value: mx.array, scale: mx.array) -> mx.array:
    """A float8 matrix, given as bytes, in float32: each block of 128 x 128 has a scale."""
    rows, columns = value.shape
    scale = mx.repeat(mx.repeat(scale.astype(mx.float32), SIDE, axis=0)[:rows], SIDE, axis=1)[:, :columns]
    return mx.from_fp8(value, mx.float32) * scale


def load_backbone(
    checkpoint: Checkpoint, dtype: mx.Dtype, block: Quantization | None = None
) -> Generator[Progress, None, LLaDA2]:
    """Build the network and read its weights, parameter by parameter, to run in ``dtype``.

    Args:
        block: how the checkpoint is quantised.

    Yields:
        Progress after each parameter.

    Returns:
        The network, all its weights in memory.

    Raises:
        CheckpointError: a tensor holds values that are not finite.
    """
    model, reader = build(checkpoint.config, block), Reader(checkpoint.backbone_tensors())
    parameters = tree_flatten(model.parameters())
    for done, (parameter, empty) in enumerate(parameters, 1):
        model.load_weights([(parameter, reader.read(parameter, empty.shape, dtype))], strict=False)
        yield Progress("loading weights", done, len(parameters))
    return model


def _laid_out(parameter: str, value: mx.array) -> mx.array:
    """The same matrix, column by column in memory where MLX runs on a CPU: its float32 products take half the time so.

    The embedding and the head stay row by row: rows are taken from them. Scales and offsets do, too.
    """
    matrix = parameter.startswith("model.layers.") and parameter.endswith(".weight") and value.ndim > 1
    if not matrix or value.dtype != mx.float32 or not on_cpu():
        return value
    return mx.contiguous(value.swapaxes(-1, -2)).swapaxes(-1, -2)


def names_of(parameter: str, shape: tuple[int, ...], tensors: Collection[str]) -> list[str]:
    """The tensors of a parameter: itself in a converted checkpoint, as published in one that is not."""
    return [parameter] if parameter in tensors else published_names(parameter, shape)
