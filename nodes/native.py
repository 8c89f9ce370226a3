"""LLaDA2LoadZImageDecoder and LLaDA2VQToConditioning: the decoder in ComfyUI's own samplers."""

from __future__ import annotations

from comfy_api.latest import io

from ..llada2_mlx.checkpoint.codebook import require_same
from ..llada2_mlx.checkpoint.layout import Part
from . import host
from .sockets import DECODERS, BackboneSocket, VQSocket, model_input, upscale_input


class LLaDA2LoadZImageDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2LoadZImageDecoder",
            display_name="Load ZImage Decoder",
            category="LLaDA2",
            description="Opens the model's diffusion decoder and VAE as ComfyUI's own, for KSampler and all that works with it: schedulers, "
            "EasyCache, LoRA, latent previews, inpainting. cfg 2.0 is the guidance of 1.0 in ZImage Decode: cfg is guidance + 1.",
            search_aliases=["llada", "z-image", "diffusion model", "unet loader", "ksampler", "diffusion decoder"],
            inputs=[
                model_input("decoder and VAE", own=host.BACKBONES),
                io.Combo.Input(
                    "decoder",
                    options=list(DECODERS),
                    default="turbo",
                    tooltip="full: best, 50 steps. turbo: distilled to 8 steps.",
                ),
                BackboneSocket.Input(
                    "backbone", optional=True, tooltip="From Load LLaDA2 Backbone, so that the model is chosen there."
                ),
            ],
            outputs=[
                io.Model.Output(
                    "MODEL",
                    tooltip="The decoder, with its shift of 6 and its guidance. Link LLaDA2 VQ to Conditioning to the same sampler.",
                ),
                io.Vae.Output("VAE", tooltip="For VAE Decode and VAE Encode."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model: str | None = None, *, decoder: str | None = None) -> bool | str:
        part = DECODERS.get(decoder)  # ComfyUI's own check does not run for what is named here
        if decoder is not None and part is None:
            return f"The decoder has to be {' or '.join(DECODERS)}."
        return host.refusal((host.check_model, model, part, Part.VAE))

    @classmethod
    def fingerprint_inputs(cls, model: str, decoder: str, **_) -> tuple:
        return host.fingerprint(model, DECODERS[decoder], Part.VAE)

    @classmethod
    @host.explains
    def execute(cls, model: str, decoder: str, backbone=None) -> io.NodeOutput:
        model = host.model_of_backbone(model, backbone)
        vae = host.comfy_vae(model)  # first: it takes moments, and says what is wrong with its config
        return io.NodeOutput(host.comfy_decoder(model, DECODERS[decoder]), vae)


class LLaDA2VQToConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2VQToConditioning",
            display_name="LLaDA2 VQ to Conditioning",
            category="LLaDA2",
            description="What a KSampler needs to decode codes with the model of Load ZImage Decoder: positive and negative conditioning, and an "
            "empty latent of the right size. A batch gives a batch.",
            search_aliases=["llada", "vq", "codes", "conditioning", "ksampler", "empty latent", "sigvq"],
            inputs=[
                # lazy: what is wrong with the choice of a model is said before the codes are drawn
                VQSocket.Input(
                    "vq", lazy=True, tooltip="Codes from LLaDA2 Text to VQ, LLaDA2 Edit or SigLIP-VQ Encode."
                ),
                model_input("SigVQ prior", own=host.CODES),
                upscale_input(),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="The codes' features."),
                io.Conditioning.Output("negative", tooltip="Zeros of the same shape, as published."),
                io.Latent.Output(
                    "latent",
                    tooltip="Empty, of the picture's size. For a picture of your own, take VAE Encode in its place, with the same size.",
                ),
            ],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, model: str | None = None) -> bool | str:
        return host.refusal((host.check_model, model, Part.PRIOR))

    @classmethod
    @host.explains
    def check_lazy_status(cls, model: str, upscale: int, vq=None, **_) -> list[str]:
        from ..llada2_mlx.imaging.prior import check_conditioning

        if vq is not None:
            return []
        host.check_codes(cls.hidden.dynprompt, model, lambda used: check_conditioning(used, upscale))
        return ["vq"]

    @classmethod
    def fingerprint_inputs(cls, model: str, **_) -> tuple:
        return host.fingerprint(model, Part.PRIOR)

    @classmethod
    @host.explains
    def execute(cls, vq, model: str, upscale: int) -> io.NodeOutput:
        import torch

        from ..llada2_mlx.imaging.decoder import latent_sides
        from ..llada2_mlx.imaging.prior import check_conditioning

        model = host.model_of_codes(model, vq)
        checkpoint = host.checkpoint(model, Part.PRIOR)
        check_conditioning(checkpoint, upscale, vq)
        for grid in vq:
            require_same(grid, checkpoint)
        host.warn(checkpoint.image_sizes.doubt_grid("drawing", vq[0]))
        prior = host.image_part(model, Part.PRIOR).get(host.progress())
        features = torch.stack([prior.features(grid) for grid in vq]).cpu()
        latent = host.empty_latent(len(vq), *latent_sides(vq[0], upscale))
        return io.NodeOutput([[features, {}]], [[torch.zeros_like(features), {}]], latent)
