"""The decoder: seeds, batches, solvers, and devices without double precision. Parity is in test_parity.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from llada2_mlx.checkpoint.layout import Checkpoint, Part
from llada2_mlx.errors import LLaDA2Error, RequestError
from llada2_mlx.imaging import flow
from llada2_mlx.imaging.decoder import check_decode
from llada2_mlx.imaging.flow import FIXED_SOLVERS, SOLVERS, DecodeOptions, Sampler, guide, ode_times
from llada2_mlx.imaging.transformer_torch import Decoder
from llada2_mlx.imaging.vae import VAE
from llada2_mlx.progress import Progress
from llada2_mlx.vq import VQGrid

CPU = torch.device("cpu")
OPTIONS = DecodeOptions(steps=3, upscale=1)
LAYERS = 2  # of the tiny decoder, that see the latent


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(Checkpoint(tiny()), Part.DECODER_TURBO, CPU)


def grid(seed: int = 0, codes: int = 256) -> VQGrid:
    return VQGrid(np.random.default_rng(seed).integers(0, codes, (8, 10)), codes)


def test_one_seed_one_picture(decoder: Decoder) -> None:
    sample = lambda seed: decoder.sample([grid()], replace(OPTIONS, seed=seed))
    assert torch.equal(sample(5), sample(5))
    assert not torch.equal(sample(5), sample(6))
    assert torch.isfinite(sample(2**64 - 1)).all()


def test_a_picture_of_a_batch_is_what_it_is_alone(decoder: Decoder) -> None:
    batch = decoder.sample([grid(0), grid(1), grid(0)], replace(OPTIONS, seed=7))
    assert batch.shape == (3, 16, 16, 20) and batch.dtype == torch.float32
    for index, own in enumerate((grid(0), grid(1), grid(0))):
        assert torch.equal(batch[index : index + 1], decoder.sample([own], replace(OPTIONS, seed=7 + index)))


def test_grids_of_several_sizes_are_refused_before_any_work(decoder: Decoder) -> None:
    other = VQGrid(np.zeros((10, 8), int), 256)
    with pytest.raises(RequestError, match=r"several \(8 x 10, 10 x 8 codes, height x width\). Decode them one by one"):
        decoder.sample([grid(), other], OPTIONS, pytest.fail)
    with pytest.raises(RequestError, match="several"):
        check_decode(Checkpoint(tiny()), Part.DECODER_TURBO, 2, [grid(), other])
    with pytest.raises(RequestError, match="no grid to decode"):
        decoder.sample([], OPTIONS)


@pytest.mark.parametrize("sampler", list(Sampler))
def test_what_is_seen_of_the_picture_is_handed_over_after_each_call(decoder: Decoder, sampler: Sampler) -> None:
    """After the last call of Euler it is the picture itself."""
    seen: list[torch.Tensor] = []
    latents = decoder.sample([grid(0), grid(1)], replace(OPTIONS, sampler=sampler), on_latent=seen.append)
    calls = OPTIONS.steps - (sampler is Sampler.ODE)
    assert len(seen) == 2 * calls and all(each.shape == (16, 1, 16, 20) for each in seen)
    assert all(each.dtype == torch.float32 for each in seen)
    assert torch.equal(latents, decoder.sample([grid(0), grid(1)], replace(OPTIONS, sampler=sampler)))
    for picture, last in zip(latents, (seen[calls - 1], seen[-1]), strict=True):
        torch.testing.assert_close(picture, last[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("upscale", [1, 2])
def test_the_size_of_the_picture(decoder: Decoder, upscale: int) -> None:
    latents = decoder.sample([grid(), grid()], replace(OPTIONS, upscale=upscale))
    pixels = VAE(Checkpoint(tiny()), CPU).decode(latents)
    assert pixels.shape == (2, 128 * upscale, 160 * upscale, 3)
    assert pixels.dtype == torch.float32 and 0 <= pixels.min() < pixels.max() <= 1


def test_torch_seed_is_left_alone(decoder: Decoder) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    decoder.sample([grid()], replace(OPTIONS, sampler=Sampler.RENOISE))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_goes_to_the_same_picture(decoder: Decoder, solver: str) -> None:
    calls: list[Progress] = []
    fine = decoder.sample([grid()], replace(OPTIONS, steps=60, guidance=0.0))
    options = replace(OPTIONS, steps=12, guidance=0.0, solver=solver)
    latents = decoder.sample([grid()], options, calls.append)
    assert (latents - fine).norm() < 0.12 * fine.norm()
    if solver in FIXED_SOLVERS:
        assert len(calls) == 11 * len(FIXED_SOLVERS[solver]) * LAYERS == calls[-1].total
    else:
        assert len(calls) >= 11 and calls[0].done < calls[-1].done == calls[-1].total


def test_the_time_grid_runs_from_noise_to_picture() -> None:
    times = ode_times(5, 6.0, CPU)
    assert times.tolist() == pytest.approx([0, 0.25 / 4.75, 0.5 / 3.5, 0.75 / 2.25, 1])


def test_guidance_is_scaled_down_and_never_up() -> None:
    positive, negative = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])
    assert guide(positive, negative, 1.0).norm() == pytest.approx(5.0)
    assert guide(positive, positive * 2, 1.0).tolist() == [0.0, 0.0]
    assert guide(positive, positive * 1.5, 1.0).tolist() == pytest.approx([1.5, 2.0])


def test_without_guidance_the_network_sees_one_conditioning(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    forward = decoder.transformer.forward
    monkeypatch.setattr(
        decoder.transformer,
        "forward",
        lambda x, *rest, **options: (sizes.append(len(x)), forward(x, *rest, **options))[1],
    )
    decoder.sample([grid()], replace(OPTIONS, guidance=0.0))
    decoder.sample([grid()], OPTIONS)
    assert sizes == [1] * 2 + [1] * 4  # the branches of guidance run one after the other


def test_a_step_that_raises_ends_the_work(decoder: Decoder) -> None:
    calls = []

    def cancel(progress: Progress) -> None:
        calls.append(progress)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder.sample([grid()], replace(OPTIONS, steps=9), cancel)
    assert len(calls) == 2


def test_a_grid_of_another_model_is_refused_before_any_step(decoder: Decoder) -> None:
    calls = []
    with pytest.raises(RequestError, match="a model with 128 codes; the decoder of tiny knows 256"):
        decoder.sample([grid(), grid(codes=128)], OPTIONS, calls.append)
    assert not calls


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"steps": 0, "sampler": Sampler.RENOISE},
        {"guidance": -1},
        {"upscale": 3},
        {"solver": "best"},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(RequestError):
        DecodeOptions(**options)


class Doubles(TorchDispatchMode):
    """Collects the operations that give double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float64, torch.complex128):
            self.found.append(str(function))
        return result


@pytest.mark.parametrize(
    "options",
    [*({"solver": solver} for solver in (*FIXED_SOLVERS, "dopri5")), {"sampler": Sampler.RENOISE}],
    ids=str,
)
def test_no_double_precision_where_the_device_has_none(
    decoder: Decoder, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "has_float64", lambda device: False)
    options = replace(OPTIONS, guidance=0.0, **options)
    decoder.sample([grid()], OPTIONS)  # diffusers makes its rotary table once, in double precision on the CPU
    with Doubles() as doubles:
        single = decoder.sample([grid()], options)
    # the published sampler's noise is drawn in double precision, on the CPU
    drawn = {"aten.randn.generator"} if options.sampler is Sampler.RENOISE else set()
    assert set(doubles.found) <= drawn
    monkeypatch.undo()
    assert torch.allclose(single, decoder.sample([grid()], options), rtol=1e-2, atol=1e-2)


def test_the_published_sampler_calls_the_network_once_a_step(decoder: Decoder) -> None:
    calls = []
    decoder.sample([grid()], replace(OPTIONS, steps=4, sampler=Sampler.RENOISE), calls.append)
    assert [call.done for call in calls] == [*range(1, 2 * 4 * LAYERS + 1)]  # both branches


def test_the_context_refiner_runs_once_a_picture_and_branch(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    handle = decoder.transformer.context_refiner[0].layers[0].register_forward_hook(lambda *_: runs.append(1))
    both = decoder.sample([grid(), grid()], replace(OPTIONS, steps=5))
    handle.remove()
    assert len(runs) == 2 * 2
    assert torch.equal(decoder.sample([grid()], replace(OPTIONS, steps=5))[0], both[0])


def test_no_hook_is_left_when_the_work_is_ended_inside_a_call(decoder: Decoder) -> None:
    class Cancelled(BaseException):
        pass

    def cancel(progress: Progress) -> None:
        if progress.done == 3:
            raise Cancelled

    expected = decoder.sample([grid()], OPTIONS)
    with pytest.raises(Cancelled):
        decoder.sample([grid()], OPTIONS, cancel)
    layers = [*decoder.transformer.noise_refiner, *decoder.transformer.layers]
    assert not any(layer._forward_hooks for layer in layers)
    assert torch.equal(decoder.sample([grid()], OPTIONS), expected)


def test_latents_can_be_used_with_autograd(decoder: Decoder) -> None:
    latents = decoder.sample([grid()], OPTIONS)
    assert not latents.is_inference() and not decoder.features(grid()).is_inference()
    (latents * torch.ones(1, requires_grad=True)).sum().backward()


def test_a_decoder_that_gives_nothing_finite_is_said_in_its_first_call() -> None:
    broken, steps = Decoder(Checkpoint(tiny()), Part.DECODER, CPU), []
    next(iter(broken.transformer.layers[0].parameters())).data.fill_(float("nan"))
    for solver in ("euler", "dopri5"):
        with pytest.raises(LLaDA2Error, match="decoder gave values that are not finite .* network call 1"):
            broken.sample([grid()], replace(OPTIONS, solver=solver), steps.append)


@pytest.mark.parametrize("sampler", Sampler)
def test_what_is_not_finite_ends_the_work_in_its_step(decoder: Decoder, sampler: Sampler) -> None:
    """Not at the end of all steps, though only one value of one layer's output in one branch is none."""
    last, calls, steps = decoder.transformer.layers[-1], [], []

    def spoil(_, __, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:  # the negative branch of the third step
            output = output.clone()
            output[0, 5, 7] = float("inf")
        return output

    handle = last.register_forward_hook(spoil)
    try:
        with pytest.raises(
            LLaDA2Error, match="The decoder gave values that are not finite .* network call 3, so there is no"
        ):
            decoder.sample([grid()], replace(OPTIONS, steps=9, sampler=sampler), steps.append)
    finally:
        handle.remove()
    assert len(calls) == 6 and steps[-1].done == 6 * LAYERS < steps[-1].total


def test_a_prior_that_gives_nothing_finite_is_said() -> None:
    broken = Decoder(Checkpoint(tiny()), Part.DECODER, CPU)
    broken.prior.prior_token_embedding.weight.data.fill_(float("inf"))
    with pytest.raises(LLaDA2Error, match="prior gave values that are not finite"):
        broken.sample([grid()], OPTIONS)
