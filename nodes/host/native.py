"""The decoder and the VAE of a model as ComfyUI's own MODEL and VAE, under its own memory management."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import comfy.latent_formats
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy import model_management
from comfy.model_patcher import CoreModelPatcher, ModelPatcher

from ...llada2_mlx.checkpoint.layout import Checkpoint, Part
from ...llada2_mlx.errors import CheckpointError
from ...llada2_mlx.imaging.flow import guide
from .folders import checkpoint
from .preview import is_flux_build, latent_colours
from .progress import progress

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CPU = torch.device("cpu")
SHIFT = 6.0  # of the decoder's times, as published
PUBLISHED_WIDTH = 3840  # which ComfyUI's own detection knows
TOKEN_SIDE = 2  # of the picture, in latents
# what diffusers' class assumes where a config says nothing, under the names of ComfyUI's class
DEFAULTS = {
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "rope_theta": 256.0,
}


def comfy_decoder(model: str, part: Part, disable_dynamic: bool = False) -> ModelPatcher:
    """A decoder of a model of the list as a MODEL of ComfyUI's own class (NextDiT), with the published shift and guidance.

    Args:
        disable_dynamic: ComfyUI's, for a copy that does not load its weights as they are needed.

    Raises:
        CheckpointError: the part is missing, damaged, or of another network.
    """
    from ...llada2_mlx.imaging.decoder import decoder_folder
    from ...llada2_mlx.imaging.device import read_config, read_tensors

    found = checkpoint(model, part, Part.VAE)
    folder = decoder_folder(part)
    path = found.only_safetensors(folder)
    config = DEFAULTS | read_config(found, folder)
    weights = renamed(read_tensors(path, CPU, on_step=progress()), config)
    names = set(weights)
    load = _load_published if config.get("dim", PUBLISHED_WIDTH) == PUBLISHED_WIDTH else _load_of_another_width
    try:
        patcher = load(weights, config, disable_dynamic)
    except model_management.OOM_EXCEPTION:
        raise
    except (RuntimeError, KeyError, AssertionError, TypeError) as error:
        raise CheckpointError(f"The tensors in {path} do not fit its config: {' '.join(str(error).split())}") from error
    if differing := sorted(names ^ set(patcher.model.diffusion_model.state_dict())):
        raise CheckpointError(f"The tensors in {path} do not fit its config: {differing[0]} is missing or too much.")
    patcher.cached_patcher_init = comfy_decoder, (model, part)  # how ComfyUI makes another copy
    patcher.set_model_sampler_cfg_function(published_guidance)
    _as_published(patcher.model, found)
    return patcher


def comfy_vae(model: str) -> comfy.sd.VAE:
    """The VAE of a model of the list as a VAE of ComfyUI's; of its own class where the build is FLUX's.

    Raises:
        CheckpointError: the part is missing or damaged, or does not fit its config.
    """
    from ...llada2_mlx.imaging.vae import VAE

    return as_comfy_vae(VAE(checkpoint(model, Part.VAE), CPU, progress()).model)


def as_comfy_vae(network: AutoencoderKL) -> comfy.sd.VAE:
    """diffusers' VAE as one of ComfyUI's."""
    return comfy.sd.VAE(sd=network.state_dict()) if is_flux_build(network.config) else OtherVAE(network)


def empty_latent(batch: int, height: int, width: int) -> dict[str, Any]:
    """A LATENT of zeros, [batch, 16, height, width] float32."""
    samples = torch.zeros(batch, comfy.latent_formats.Flux.latent_channels, height, width)
    return {"samples": samples, "downscale_ratio_spacial": 8}


def published_guidance(args: dict[str, Any]) -> torch.Tensor:
    """The published guidance as a sampler's cfg function: a cfg scale of 2 is a guidance of 1.

    What ComfyUI hands over, ``x - denoised``, is the velocity times a number; ``guide`` of each whole picture is
    the same whatever that number is.
    """
    pairs = zip(args["cond"], args["uncond"], strict=True)
    return torch.stack([guide(positive, negative, args["cond_scale"] - 1) for positive, negative in pairs])


def renamed(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights under the names of ComfyUI's class, with queries, keys and values in one tensor; ``tensors`` is emptied.

    Raises:
        CheckpointError: queries, keys and values are not complete.
    """
    own: dict[str, torch.Tensor] = {}
    joined: dict[str, dict[int, torch.Tensor]] = {}
    names = comfy.utils.z_image_to_diffusers(config)
    for name in list(tensors):
        tensor, published = tensors.pop(name), name.replace("semantic_embedder", "cap_embedder")
        target = names.get(published, published)
        if isinstance(target, str):
            own[target] = tensor
        else:
            joined.setdefault(target[0], {})[target[1][1]] = tensor
    for name in list(joined):
        rows = joined.pop(name)
        if len(rows) != 3:
            raise CheckpointError(f"The decoder lacks queries, keys or values of {name}. Download it again.")
        own[name] = torch.cat([rows[at] for at in sorted(rows)])
    return own


class OtherVAE(comfy.sd.VAE):
    """ComfyUI's VAE around a network that its own class cannot hold, because it normalises in other groups.

    Args:
        network: diffusers' ``AutoencoderKL``, in the type that it runs in.
    """

    def __init__(self, network: AutoencoderKL):
        with _unwarned("No VAE weights detected"):
            # ComfyUI sets all its defaults for a VAE with 8 pixels a latent, and then finds no weights that it knows
            super().__init__(sd={})
        self.first_stage_model = _Coder(network)
        self.latent_channels = network.config.latent_channels
        self.disable_offload = True  # its layers are none of ComfyUI's, which could be loaded one by one
        self.device, self.output_device = model_management.vae_device(), model_management.intermediate_device()
        self.vae_dtype = network.dtype
        self.patcher = ModelPatcher(self.first_stage_model, self.device, model_management.vae_offload_device())
        self.model_size()


@contextmanager
def _unwarned(sentence: str) -> Iterator[None]:
    """Leave a warning out of the log that is not true here."""
    unsaid = lambda record: sentence not in record.getMessage()
    logging.getLogger().addFilter(unsaid)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(unsaid)


class _Coder(torch.nn.Module):
    """diffusers' VAE with the two calls that ComfyUI makes."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[batch, 3, height, width] in -1 .. 1 -> latents [batch, 16, height / 8, width / 8]."""
        return self.network.encode(pixels).latent_dist.mode()

    def decode(self, latents: torch.Tensor, **_: Any) -> torch.Tensor:
        """The way back."""
        return self.network.decode(latents, return_dict=False)[0]


def _load_published(weights: dict[str, torch.Tensor], config: dict[str, Any], disable_dynamic: bool) -> ModelPatcher:
    patcher = comfy.sd.load_diffusion_model_state_dict(weights, disable_dynamic=disable_dynamic)
    if patcher is None:
        raise CheckpointError("ComfyUI does not recognise the decoder; update ComfyUI, or use ZImage Decode.")
    return patcher


def _load_of_another_width(
    weights: dict[str, torch.Tensor], config: dict[str, Any], disable_dynamic: bool
) -> ModelPatcher:
    """As ``comfy.sd.load_diffusion_model_state_dict`` goes on after its detection, which knows the published width alone."""
    own = {name: config[name] for name in (*DEFAULTS, "dim", "axes_dims")}
    known = comfy.supported_models.ZImage(
        own
        | {
            "image_model": "lumina2",
            "patch_size": TOKEN_SIDE,
            "in_channels": config.get("in_channels", 16),
            "cap_feat_dim": weights["cap_embedder.1.weight"].shape[1],
            "n_kv_heads": config.get("n_kv_heads", config["n_heads"]),
            "time_scale": config.get("t_scale", 1000.0),
            "ffn_dim_multiplier": 8 / 3,
            "multiple_of": 1,  # diffusers does not round the width of the feed-forward part
            "z_image_modulation": True,
            "pad_tokens_multiple": 32,
        }
    )
    device, supported = model_management.get_torch_device(), known.supported_inference_dtypes
    dtype = model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    known.set_inference_dtype(dtype, model_management.unet_manual_cast(dtype, device, supported), device=device)
    model = known.get_model(weights, "")
    network = model.diffusion_model
    # diffusers embeds the time over a middle of 1024, whatever the width
    linear, first = type(network.x_embedder), network.t_embedder.mlp[0]
    kind = {"dtype": first.weight.dtype, "device": first.weight.device}
    network.t_embedder.mlp[0] = linear(first.in_features, 1024, bias=True, **kind)
    network.t_embedder.mlp[2] = linear(1024, min(config["dim"], 256), bias=True, **kind)
    model_management.archive_model_dtypes(network.t_embedder.eval().requires_grad_(False))
    patcher_class = ModelPatcher if disable_dynamic else CoreModelPatcher
    patcher = patcher_class(model, device, model_management.unet_offload_device())
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
    return patcher


def _as_published(model: torch.nn.Module, found: Checkpoint) -> None:
    """Give ComfyUI's model what it cannot know: the shift, the scale of the latents, and how long the conditioning is."""
    from ...llada2_mlx.imaging.device import read_config

    model.model_sampling.set_parameters(shift=SHIFT, multiplier=1.0)
    config, form = read_config(found, "vae"), model.latent_format
    form.scale_factor, form.shift_factor = config["scaling_factor"], config["shift_factor"]
    if not is_flux_build(config):
        form.latent_rgb_factors, form.latent_rgb_factors_bias = latent_colours(found)
        form.taesd_decoder_name = None
    # to ComfyUI a prompt is short; this one is as long as the picture, and counts as so many latents more
    shapes = model.extra_conds_shapes

    def with_codes(**conditions: Any) -> dict[str, Iterable[int]]:
        codes = conditions.get("cross_attn")
        return shapes(**conditions) | ({} if codes is None else {"c_crossattn": list(codes.shape)})

    model.extra_conds_shapes = with_codes
    model.memory_usage_factor_conds += ("c_crossattn",)
    model.memory_usage_shape_process["c_crossattn"] = lambda shape: [shape[0], 1, TOKEN_SIDE**2 * shape[1]]
