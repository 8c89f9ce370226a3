"""Published tensors -> MLX parameters: the one place where foreign names become ours."""

from __future__ import annotations

from collections.abc import Generator
from math import prod

import mlx.core as mx
from mlx.utils import tree_flatten

from .checkpoint import Checkpoint, TensorInfo, check_tensors
from .config import BackboneConfig
from .errors import CheckpointError
from .model import LLaDA2
from .progress import Progress

PRECISIONS = {"bf16": mx.bfloat16, "float32": mx.float32}
_STORED = {"BF16": mx.bfloat16, "F16": mx.bfloat16, "F32": mx.float32}


def published_names(parameter: str, shape: tuple[int, ...]) -> list[str]:
    """The checkpoint's tensors that make up one of our parameters, in the order in which they are stacked.

    Everything has its published name except a layer's experts: ``mlp.switch_mlp.gate_proj.weight`` [E, out, in]
    is ``mlp.experts.0.gate_proj.weight`` ... ``mlp.experts.E-1.gate_proj.weight``.
    """
    if not _is_stack(parameter):
        return [parameter]
    return [parameter.replace(".switch_mlp.", f".experts.{expert}.") for expert in range(shape[0])]


def _is_stack(parameter: str) -> bool:
    """Whether a parameter stacks the experts of a layer, each of which is a tensor of its own in the checkpoint."""
    return ".switch_mlp." in parameter


def check_backbone(config: BackboneConfig, tensors: dict[str, TensorInfo], checkpoint: Checkpoint) -> None:
    """Compare names and shapes in the checkpoint with those of the network, without reading a weight.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, or of a type that cannot be read.
    """
    expected = {}
    for parameter, value in tree_flatten(LLaDA2(config).parameters()):
        shape = value.shape[1:] if _is_stack(parameter) else value.shape
        expected.update(dict.fromkeys(published_names(parameter, value.shape), shape))
    check_tensors(tensors, expected, checkpoint.root)
    for name, info in tensors.items():
        if info.dtype not in _STORED:
            raise CheckpointError(
                f"{name} in {info.file} is stored as {info.dtype}; only {', '.join(_STORED)} can be read. "
                "Choose the model in one of these."
            )


def compute_type(precision: str, tensors: dict[str, TensorInfo]) -> mx.Dtype:
    """The type to run in: as asked, or with ``auto`` the one that the embedding is stored in, float32 on a CPU."""
    if precision != "auto":
        return PRECISIONS[precision]
    return mx.float32 if _on_cpu() else _STORED.get(tensors["model.word_embeddings.weight"].dtype, mx.bfloat16)


def _parameter_type(parameter: str, dtype: mx.Dtype) -> mx.Dtype:
    """The type to keep a parameter in, in a network of type ``dtype``."""
    # the router is float32 by design; MLX's CPU backend multiplies experts in no other type
    return mx.float32 if ".mlp.gate." in parameter or (_is_stack(parameter) and _on_cpu()) else dtype


def memory_bytes(tensors: dict[str, TensorInfo], dtype: mx.Dtype) -> int:
    """What the weights take in memory, in a network of type ``dtype``."""
    kept = lambda name: _parameter_type(name.replace(".mlp.experts.", ".mlp.switch_mlp."), dtype)
    return sum(prod(info.shape) * kept(name).size for name, info in tensors.items())


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def load_backbone(checkpoint: Checkpoint, dtype: mx.Dtype) -> Generator[Progress, None, LLaDA2]:
    """Build the network and read its weights, parameter by parameter, to run in ``dtype``.

    A file is mapped lazily and a tensor is read when its parameter's turn comes; experts are stacked one
    layer's projection at a time, so that never more than one stack exists twice.

    Yields:
        Progress after each parameter.

    Returns:
        The network, all its weights in memory.

    Raises:
        CheckpointError: a tensor holds values that are not finite.
    """
    tensors = checkpoint.backbone_tensors()
    model = LLaDA2(checkpoint.config)
    files = {path: mx.load(str(path)) for path in {info.file for info in tensors.values()}}
    parameters = tree_flatten(model.parameters())
    for done, (parameter, empty) in enumerate(parameters, 1):
        names = published_names(parameter, empty.shape)
        read = [files[tensors[name].file].pop(name) for name in names]
        value = mx.stack(read) if _is_stack(parameter) else read[0]
        del read
        if ".mlp.gate." not in parameter:
            value = value.astype(dtype)
        value = value.astype(_parameter_type(parameter, dtype))
        finite = mx.isfinite(value).reshape(len(names), -1).all(axis=-1)
        mx.eval(value, finite)
        if bad := [name for name, ok in zip(names, finite.tolist()) if not ok]:
            raise CheckpointError(
                f"{tensors[bad[0]].file} holds values that are not finite (NaN or infinity) in {bad[0]}. Download it again."
            )
        model.load_weights([(parameter, value)], strict=False)
        yield Progress("loading weights", done, len(parameters))
    return model
