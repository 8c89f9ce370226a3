"""Run by test_native.py in ComfyUI's interpreter: the decoder as ComfyUI's own model, against our own.

Arguments: the pack's folder, a base directory with the models "exact" (Shapes in float32), "golden" (the same of the
fixtures) and "torn" (Shapes without a tensor). The current directory is ComfyUI's.
"""

from memory_base import CPU, host, ignore  # first: it finds ComfyUI

# isort: split
import comfy.model_detection
import comfy.samplers
import comfy.sd
import numpy as np
import torch
from comfy import model_management, sample
from comfy.ldm.lumina.model import NextDiT
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from the_pack.llada2_mlx.checkpoint.layout import Part
from the_pack.llada2_mlx.errors import CheckpointError
from the_pack.llada2_mlx.imaging.flow import DecodeOptions, ode_times
from the_pack.llada2_mlx.vq import VQGrid
from the_pack.nodes.host import native
from the_pack.nodes.native import DECODERS, LLaDA2LoadZImageDecoder, LLaDA2VQToConditioning

TOLERANCE = 1e-3  # relative; in float32 it is 3e-6


def codes(model: str, height: int, width: int, seed: int) -> VQGrid:
    size = host.image_part(model, Part.PRIOR).get(ignore).module.prior_token_embedding.num_embeddings
    return VQGrid(np.random.default_rng(seed).integers(0, size, (height, width)), size)


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / ours.norm())


def noise(options: DecodeOptions, latent: dict) -> torch.Tensor:
    """ComfyUI's noise of our seeds: it draws a whole batch from one, ours has one for each picture."""
    one, batch = latent["samples"][:1], len(latent["samples"])
    return torch.cat([sample.prepare_noise(one, options.seed + index) for index in range(batch)])


# the same noise, times and guidance through ComfyUI's sampler and through ours
loaded = {}
for model, which, guidance, upscale, size, batch in (
    ("exact", "full", 1.0, 2, (8, 8), 2),
    ("exact", "full", 0.0, 2, (8, 8), 1),
    ("exact", "turbo", 2.5, 1, (8, 10), 1),
    ("golden", "full", 1.0, 2, (8, 10), 1),
    ("golden", "turbo", 1.0, 1, (8, 8), 1),
):
    if (model, which) not in loaded:
        loaded[model, which] = LLaDA2LoadZImageDecoder.execute(model, which).args
    patcher, vae = loaded[model, which]
    options = DecodeOptions(steps=6, guidance=guidance, seed=5, upscale=upscale)
    grids = tuple(codes(model, *size, seed=number) for number in range(batch))
    # Shapes states that its decoders enlarge by 2 alone, which is refused in the node; here the arithmetic counts
    positive, negative, latent = LLaDA2VQToConditioning.execute(grids, model, 2).args
    if upscale == 1:
        latent = host.empty_latent(batch, *(side // 2 for side in latent["samples"].shape[2:]))
    expected = host.image_part(model, DECODERS[which]).get(ignore).sample(grids, options, ignore)
    sigmas = 1 - ode_times(options.steps, options.time_shift, CPU)
    euler = comfy.samplers.sampler_object("euler")
    start = noise(options, latent)
    inputs = positive, negative, latent["samples"]
    found = sample.sample_custom(patcher, start, guidance + 1, euler, sigmas, *inputs, disable_pbar=True)
    distance = far(expected, patcher.model.process_latent_in(found))
    print(model, which, guidance, upscale, size, batch, f"{distance:.1e}")
    assert distance < TOLERANCE

# KSampler's own times: "simple" with so many steps as 1,000 can be divided into are the published ones
patcher, vae = loaded["exact", "full"]
grid = codes("exact", 8, 8, 0)
positive, negative, latent = LLaDA2VQToConditioning.execute((grid,), "exact", 2).args
assert torch.count_nonzero(negative[0][0]) == 0 and negative[0][0].shape == positive[0][0].shape == (1, 256, 64)
options = DecodeOptions(steps=6, seed=7)
expected = host.image_part("exact", Part.DECODER).get(ignore).sample((grid,), options, ignore)
start, inputs = noise(options, latent), (positive, negative, latent["samples"])
found = sample.sample(patcher, start, 5, 2.0, "euler", "simple", *inputs, denoise=1.0, disable_pbar=True, seed=7)
assert far(expected, patcher.model.process_latent_in(found)) < TOLERANCE

# the VAE in both directions
pixels = vae.decode(found)
assert pixels.shape == (1, 256, 256, 3)
assert far(host.image_part("exact", Part.VAE).get(ignore).decode(expected), pixels) < TOLERANCE
assert vae.encode(pixels).shape == found.shape
assert far(pixels, vae.decode(vae.encode(pixels))) < 0.1
assert far(pixels, vae.decode_tiled(found, tile_x=24, tile_y=24, overlap=4)) < 0.1

# ComfyUI counts the codes as so many latents more: at upscale 2 they are as many tokens as the picture
base = patcher.model.memory_required([1, 16, 32, 32])
assert patcher.model.memory_required([1, 16, 32, 32], {"c_crossattn": [[1, 256, 64]]}) == 2 * base
assert patcher.model.extra_conds_shapes(cross_attn=positive[0][0])["c_crossattn"] == [1, 256, 64]

# it comes and goes by ComfyUI's own management, and a copy has the published shift, scale and guidance too
model_management.load_models_gpu([patcher])
assert patcher.is_clone(model_management.loaded_models()[0])
model_management.unload_all_models()
copy = patcher.clone(force_deepcopy=True)
assert copy.model is not patcher.model and copy.model.model_sampling.shift == 6.0
assert copy.model.latent_format.scale_factor == patcher.model.latent_format.scale_factor != 0.3611
again = sample.sample(copy, start, 5, 2.0, "euler", "simple", *inputs, denoise=1.0, disable_pbar=True, seed=7)
assert torch.equal(again, found)

# a file that lacks something is said, not drawn with
for which, sentence in (("full", "missing or too much"), ("turbo", "queries, keys or values")):
    try:
        native.comfy_decoder("torn", DECODERS[which])
    except CheckpointError as error:
        assert sentence in str(error), error
    else:
        raise AssertionError("half a decoder was loaded")

# the published width, without values: ComfyUI recognises it by itself, and every tensor has its place
config = {"dim": 3840, "n_layers": 3, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "cap_feat_dim": 4096}
with torch.device("meta"):
    tensors = ZImageTransformer2DModel(**config).state_dict()
tensors = {name.replace("cap_embedder", "semantic_embedder"): tensor for name, tensor in tensors.items()}
weights = native.renamed(tensors, native.DEFAULTS | config)
known = comfy.model_detection.model_config_from_unet(weights, "")
assert type(known).__name__ == "ZImage" and known.unet_config["time_scale"] == 1000.0
known.set_inference_dtype(torch.bfloat16, None)
network = NextDiT(**known.unet_config, device=torch.device("meta"), operations=torch.nn)
shapes = lambda state: {name: tuple(tensor.shape) for name, tensor in state.items()}
assert shapes(network.state_dict()) == shapes(weights)

# FLUX's build of a VAE goes into ComfyUI's own class, and gives the same
build = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
flux = AutoencoderKL(**build, **blocks, use_quant_conv=False, use_post_quant_conv=False).eval()
assert native.is_flux_build(flux.config)
latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    expected = ((flux.decode(latents, return_dict=False)[0] + 1) / 2).clamp(0, 1).movedim(1, -1)
theirs = native.as_comfy_vae(flux)
assert type(theirs) is comfy.sd.VAE and far(expected, theirs.decode(latents)) < TOLERANCE
print("all is well")
