"""The same requests by the package mlx-vlm, where it is installed, on the same weights.

It has LLaDA2 as a text model (``llada2_moe``) and LLaDA-Image (``llada_image``), whose code sampler is the one to
compare with. Both take our network's arrays as they are: no weight exists twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from unittest import mock

import mlx.core as mx
from mlx.utils import tree_flatten

from llada2_mlx.backbone.denoising import Generation
from llada2_mlx.backbone.network import LLaDA2
from llada2_mlx.backbone.session import Report
from llada2_mlx.progress import Progress

from .measure import SAMPLING, STEPS, Job, Request

Work = Callable[[], list[int]]


def version() -> str | None:
    """The installed mlx-vlm's version, or None."""
    try:
        return metadata.version("mlx-vlm")
    except metadata.PackageNotFoundError:
        return None


def codes(request: Request) -> Job:
    """Its code sampler: no cache, both branches as one batch, the whole vocabulary's head, no rescale."""
    from mlx_vlm.models.llada2_moe.config import ModelConfig
    from mlx_vlm.models.llada_image import vq_sampling
    from mlx_vlm.models.llada_image.text_encoder import LLaDAImageTextEncoder

    def prepare(network: LLaDA2, report: Report) -> Work:
        config = network.config
        encoder = LLaDAImageTextEncoder(ModelConfig.from_dict(asdict(config)))
        _share(encoder, {name.removeprefix("model."): value for name, value in _weights(network, "model.")})

        def encode(ids: mx.array, **options: mx.array) -> mx.array:
            report.steps += 1
            report.positions += ids.size
            return encoder(ids, **options)

        def head(hidden: mx.array) -> mx.array:
            report.head_rows += hidden.shape[0] * config.vocab_size
            return network.lm_head(hidden)

        conditional, unconditional = request.branches

        def work() -> list[int]:
            # its ids are constants of the module
            with mock.patch.multiple(vq_sampling, MASK_TOKEN_ID=request.vocabulary.mask, END_OF_IMAGE_ID=-1):
                result = vq_sampling.generate_vq_tokens(
                    encode,
                    head,
                    conditional,
                    unconditional,
                    request.length,
                    codebook_size=config.codebook_size,
                    block_length=SAMPLING.block_length,
                    steps=STEPS,
                    cfg_scale=request.guidance.coefficients[0],
                    threshold=SAMPLING.threshold,
                    image_token_offset=config.image_token_offset,
                )
            return (result[0] + config.image_token_offset).tolist()

        return work

    return _job(prepare)


def text(request: Request) -> Job:
    """Its text generation: a cache of the prefix, one more pass to keep each block, the whole vocabulary's head.

    It has no quota for a step: it accepts what is over the threshold, or the best one alone. All over 0, and at
    most as many as our quota, is our rule where nothing is accepted early.
    """
    from mlx_vlm.models.llada2_moe.config import ModelConfig
    from mlx_vlm.models.llada2_moe.language import LanguageModel, LLaDA2MoeModel

    def prepare(network: LLaDA2, report: Report) -> Work:
        model = LanguageModel(ModelConfig.from_dict(asdict(network.config)))
        _share(model, dict(_weights(network)))

        def work() -> list[int]:
            with _counted(LLaDA2MoeModel, report):
                result = model.generate(
                    mx.array([request.branches[0]]),
                    block_length=SAMPLING.block_length,
                    steps=STEPS,
                    gen_length=request.length,
                    threshold=0.0,
                    max_transfer_per_step=SAMPLING.block_length // STEPS,
                    eos_id=-1,
                    mask_id=request.vocabulary.mask,
                )
            return result[0].tolist()

        return work

    return _job(prepare)


def _job(prepare: Callable[[LLaDA2, Report], Work]) -> Job:
    def job(network: LLaDA2) -> Generator[Progress, None, Generation]:
        report = Report()
        work = prepare(network, report)
        yield Progress("mlx-vlm", 0, 1)
        began = time.perf_counter()
        ids = work()
        report.seconds = time.perf_counter() - began
        return Generation(ids, report)

    return job


def _weights(network: LLaDA2, prefix: str = "") -> Iterator[tuple[str, mx.array]]:
    """Our parameters that begin with ``prefix``; the names of a layer's parts are the published ones in both."""
    return ((name, value) for name, value in tree_flatten(network.parameters()) if name.startswith(prefix))


def _share(module: object, weights: dict[str, mx.array]) -> None:
    module.load_weights(list(weights.items()), strict=True)


@contextmanager
def _counted(network: type, report: Report) -> Iterator[None]:
    """Count the positions that go through ``network``."""
    call = network.__call__

    def counting(self: object, inputs: mx.array, **options: object) -> mx.array:
        report.positions += inputs.size
        return call(self, inputs, **options)

    with mock.patch.object(network, "__call__", counting):
        yield
