"""SigLIPVQEncode and ZImageDecode: between pixels and codes."""

import torch
from comfy_api.latest import io

from ..llada2_mlx.checkpoint.codebook import require_same
from ..llada2_mlx.checkpoint.layout import Checkpoint, Part
from ..llada2_mlx.errors import RequestError
from ..llada2_mlx.imaging.decoder import AUTO, ENGINES, LatentDecoder, check_decode
from ..llada2_mlx.imaging.flow import CUSTOM, PRESETS, SOLVERS, DecodeOptions, OnLatent, Sampler, with_preset
from ..llada2_mlx.imaging.pixels import to_images
from ..llada2_mlx.imaging.prepare import LARGEST_SIDE, SMALLEST_SIDE, UNIT, Purpose, prepare_for, side_or_own, use_of
from ..llada2_mlx.imaging.vae import VAE
from ..llada2_mlx.progress import OnStep
from ..llada2_mlx.vq import GridSet, VQGrid
from . import host
from .sockets import (
    DECODERS,
    MOST_JOINED,
    BackboneSocket,
    VQSetSocket,
    VQSocket,
    model_input,
    seed_input,
    upscale_input,
)

_PURPOSES = [purpose.value for purpose in Purpose]


class SigLIPVQEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SigLIPVQEncode",
            display_name="SigLIP-VQ Encode",
            category="LLaDA2",
            description="Turns pictures into codes that LLaDA2 reads. Choose what for: the sizes differ. A batch gives a batch.",
            search_aliases=["llada", "image tokenizer", "encode image", "image to vq", "siglip", "vae encode"],
            inputs=[
                # lazy: what is wrong with the choice of a model is said before a picture is made
                io.Image.Input("image", lazy=True, tooltip="The picture, or a batch."),
                model_input("image tokenizer", own=host.BACKBONES),
                io.Combo.Input(
                    "purpose",
                    options=_PURPOSES,
                    default="understand",
                    tooltip="understand: the picture's own size, at most 800 x 800 pixels of area. "
                    "understand with others: the same, at most 448 x 448, for a picture of a set from LLaDA2 Join VQ. "
                    "edit: scaled to cover the nearest size of about 512 x 512, then cropped. "
                    "edit as published: cropped without scaling, so that a large photo loses all but its middle. "
                    "A model may state other sizes of its own; then a picture is scaled to cover that size, and cropped.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=LARGEST_SIDE,
                    step=UNIT,
                    advanced=True,
                    tooltip="Side of a square, in the pixels that the tokenizer sees (16 per code; a decoded picture has 32 at upscale 2), "
                    f"that is about as large as the encoded picture: {SMALLEST_SIDE} to {LARGEST_SIDE}. Below {SMALLEST_SIDE} it is the model's own size.",
                ),
                BackboneSocket.Input(
                    "backbone", optional=True, tooltip="From Load LLaDA2 Backbone, so that the model is chosen there."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The mask of Load Image, which leaves transparency out of its picture: transparent parts become white.",
                ),
            ],
            outputs=[
                VQSocket.Output(
                    "vq", tooltip="The picture as codes, for LLaDA2 Understand, LLaDA2 Edit or ZImage Decode."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, model: str | None = None) -> bool | str:
        return host.refusal((host.check_model, model, Part.IMAGE_TOKENIZER))

    @classmethod
    @host.explains
    def check_lazy_status(cls, model: str, size: int = 0, image=None, backbone=None, **_) -> list[str]:
        host.check_model(host.model_of_backbone(model, backbone), Part.IMAGE_TOKENIZER)
        side_or_own(size)
        return ["image"] if image is None else []

    @classmethod
    def fingerprint_inputs(cls, model: str, **_) -> tuple:
        return host.fingerprint(model, Part.IMAGE_TOKENIZER)

    @classmethod
    @host.explains
    def execute(cls, image, model, purpose, size, backbone=None, mask=None) -> io.NodeOutput:
        purpose, model = Purpose(purpose), host.model_of_backbone(model, backbone)
        sizes, size = host.checkpoint(model, Part.IMAGE_TOKENIZER).image_sizes, side_or_own(size)
        prepared = [prepare_for(sizes, picture, purpose, size) for picture in to_images(image, mask)]
        host.warn(sizes.doubt(use_of(purpose), *prepared[0].size))
        on_step = host.progress()
        tokenizer = host.image_part(model, Part.IMAGE_TOKENIZER).get(on_step)
        return io.NodeOutput(host.named(model, tokenizer.encode_prepared(prepared, on_step, use_of(purpose))))


class LLaDA2JoinVQ(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        picture = VQSocket.Input("vq", tooltip="A picture as codes, or a batch, whose pictures follow one another.")
        names = [f"picture{number}" for number in range(1, MOST_JOINED + 1)]
        return io.Schema(
            node_id=host.JOIN,
            display_name="LLaDA2 Join VQ",
            category="LLaDA2",
            description="Makes one set of several pictures, to ask about them together in LLaDA2 Understand, or to edit the last with the others to "
            "refer to in LLaDA2 Edit. Their sizes are free, and they keep their order. Encode each with purpose understand with others, or edit.",
            search_aliases=["llada", "several pictures", "multiple images", "batch vq", "reference images", "combine"],
            inputs=[
                io.Autogrow.Input(
                    "pictures",
                    template=io.Autogrow.TemplateNames(picture, names=names, min=1),
                    tooltip="The pictures, in the order in which the model reads them. Connect one, and another input appears.",
                )
            ],
            outputs=[VQSetSocket.Output("set", tooltip="The pictures together, for LLaDA2 Understand or LLaDA2 Edit.")],
        )

    @classmethod
    @host.explains
    def execute(cls, pictures: io.Autogrow.Type | None = None) -> io.NodeOutput:
        inputs = sorted((pictures or {}).items(), key=lambda each: int(each[0].removeprefix("picture")))
        return io.NodeOutput(GridSet(tuple(grid for _, grids in inputs for grid in grids or ())))


class ZImageDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        solver = io.Combo.Input(
            "solver",
            options=list(SOLVERS),
            default="euler",
            advanced=True,
            tooltip="How the ODE is solved. euler, ab2, dpmpp_2m and unipc_2 call the network once a step.",
        )
        full = [
            io.Int.Input(
                "steps", default=50, min=2, max=1000, tooltip="Points of time; euler calls the network once less."
            ),
            solver,
        ]
        turbo = [
            io.Int.Input(
                "steps", default=8, min=2, max=1000, tooltip="Points of time; the ODE calls the network once less."
            ),
            io.Combo.Input(
                "sampler",
                options=[sampler.value for sampler in Sampler],
                default="ODE",
                advanced=True,
                tooltip="ODE: clean at 8 steps. as published: fresh noise at every step, which can give stripes; set guidance to 0 for it.",
            ),
        ]
        return io.Schema(
            node_id="ZImageDecode",
            display_name="ZImage Decode",
            category="LLaDA2",
            description="Turns codes into pictures with the model's diffusion decoder. "
            "Another seed gives a variation of the same picture, without drawing the codes again.",
            search_aliases=["llada", "decode vq", "vq to image", "z-image", "diffusion decoder", "vae decode"],
            inputs=[
                # lazy: what is wrong with the choice of a decoder is said before the codes are drawn
                VQSocket.Input(
                    "vq", lazy=True, tooltip="Codes from LLaDA2 Text to VQ, LLaDA2 Edit or SigLIP-VQ Encode."
                ),
                model_input("decoder", own=host.CODES),
                io.DynamicCombo.Input(
                    "decoder",
                    options=[io.DynamicCombo.Option("full", full), io.DynamicCombo.Option("turbo", turbo)],
                    tooltip="full: best, 50 steps. turbo: distilled to 8 steps.",
                ),
                io.Float.Input(
                    "guidance",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    advanced=True,
                    tooltip="How strongly to follow the codes. 1 is as published for the full decoder; 0 is none and takes half the work.",
                ),
                seed_input(
                    "Of the decoder's noise. One seed gives one picture on every machine; in a batch, picture i uses seed + i."
                ),
                upscale_input(advanced=True),
                *_path_inputs(),
                io.Combo.Input(
                    "engine",
                    options=list(ENGINES),
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="What the decoder runs in. torch: PyTorch. mlx: MLX, the same picture but for rounding. mlx-8bit: half the memory, from "
                    "a copy that is made on first use; nearly the same picture. auto: on a Mac what fits into it, elsewhere torch; it says what it took.",
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="The pictures.")],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, model: str | None = None, *, decoder: dict | None = None) -> bool | str:
        # ComfyUI reports a fault once for each positional argument; "decoder" comes in any case, without its values
        return host.refusal((host.check_model, model, Part.VAE))

    @classmethod
    @host.explains
    def check_lazy_status(
        cls, model: str, upscale: int, decoder: dict | None = None, vq=None, engine: str = AUTO, **given
    ) -> list[str]:
        DecodeOptions(**{name: given[name] for name in _PATH if name in given})  # says what is out of range
        choice = (decoder or {}).get("decoder")  # ComfyUI leaves out a choice that does not exist
        part = _part({"decoder": choice[0] if isinstance(choice, tuple) else choice})
        _check_preset(given.get("preset", CUSTOM), part)
        if vq is not None:
            return []

        def check(used: Checkpoint) -> None:
            check_decode(used, part, upscale)
            if engine != AUTO:  # which refuses nothing
                from ..llada2_mlx.imaging.engine import check_engine  # and with it MLX

                check_engine(used, part, engine)

        host.check_codes(cls.hidden.dynprompt, model, check)
        return ["vq"]

    @classmethod
    def fingerprint_inputs(cls, model: str, decoder: dict, **_) -> tuple:
        return host.fingerprint(model, _part(decoder), Part.VAE)

    @classmethod
    @host.explains
    def execute(cls, vq, model, decoder, guidance, seed, upscale, preset=CUSTOM, engine=AUTO, **path) -> io.NodeOutput:
        model = host.model_of_codes(model, vq)
        part, sampler = _part(decoder), Sampler(decoder.get("sampler", Sampler.ODE.value))
        options = DecodeOptions(
            decoder["steps"], guidance, seed, upscale, sampler, decoder.get("solver", "euler"), **path
        )
        _check_preset(preset, part)
        options = with_preset(options, preset)
        checkpoint = host.checkpoint(model, part, Part.VAE)
        check_decode(checkpoint, part, upscale, vq)
        for grid in vq:
            require_same(grid, checkpoint)
        host.warn(checkpoint.image_sizes.doubt_grid("drawing", vq[0]))
        on_step = host.progress()
        (decoder, working), vae = host.decoder(model, part, engine, vq, options), host.image_part(model, Part.VAE)
        show = host.appearing_latent(checkpoint, on_step)
        latents = _sample(decoder.get(on_step, working), vq, options, on_step, show)
        working = VAE.working_bytes(checkpoint, latents, vae.load_device)
        pictures = vae.get(on_step, working).decode(latents, on_step)
        host.appeared(pictures[-1], on_step)
        return io.NodeOutput(pictures)


def _sample(
    decoder: LatentDecoder, vq: tuple[VQGrid, ...], options: DecodeOptions, on_step: OnStep, on_latent: OnLatent
) -> torch.Tensor:
    """The latents; tells what the step cache saved. Here, so that nothing holds the decoder when the VAE needs room."""
    latents = decoder.sample(vq, options, on_step, on_latent)
    if decoder.skipped_calls:
        of = f" of {options.network_calls * len(vq)}" if options.network_calls else ""
        host.tell(f"The step cache saved {decoder.skipped_calls}{of} network calls.")
    return latents


# What comes after the first inputs, named as in ``DecodeOptions``; a graph that was saved before has none of it.
_PATH = ("time_shift", "guidance_start", "guidance_end", "cache_threshold")


def _path_inputs() -> list[io.Input]:
    """How the ODE's times are spaced, where in them there is guidance, and which calls are saved."""
    late = lambda name, least, most, step, tooltip: io.Float.Input(
        name,
        default=getattr(DecodeOptions, name),
        min=least,
        max=most,
        step=step,
        advanced=True,
        optional=True,
        tooltip=tooltip,
    )
    return [
        late(
            "time_shift",
            1.0,
            100.0,
            0.1,
            "How far the ODE's points of time are moved towards the noise: 6 as published, 1 leaves them even. "
            "With ab2 and few steps, 1 comes closest to the exact solution. Turbo as published does not use it.",
        ),
        late(
            "guidance_start",
            0.0,
            1.0,
            0.01,
            "The time from which there is guidance, from 0 (noise) to 1 (picture). Before it a call costs half.",
        ),
        late(
            "guidance_end",
            0.0,
            1.0,
            0.01,
            "The time from which there is no guidance any more, from 0 (noise) to 1 (picture). After it a call costs half.",
        ),
        _preset_input(),
        late(
            "cache_threshold",
            0.0,
            1.0,
            0.01,
            "Step cache: a call in which the first layer adds nearly the same as before, up to this part, takes from an earlier call what the other "
            "layers add. 0: off. 0.05 and less for many steps; with few steps, and with turbo, leave it off.",
        ),
    ]


def _preset_input() -> io.Combo.Input:
    calls = "; ".join(f"{name} {preset.network_calls}" for name, preset in PRESETS.items())
    return io.Combo.Input(
        "preset",
        options=[CUSTOM, *PRESETS],
        default=CUSTOM,
        optional=True,
        tooltip=f"Of the full decoder; network calls with guidance: {calls}. A preset wins over steps, solver, time shift and the start and end of "
        f"guidance on this node. {CUSTOM}: those decide, and untouched they are as published. For turbo leave it at {CUSTOM}.",
    )


def _check_preset(preset: str, part: Part) -> None:
    if preset != CUSTOM and part is not Part.DECODER:
        raise RequestError(
            f"The preset {preset!r} is of the full decoder. Choose the decoder full, or set preset to {CUSTOM}."
        )


def _part(decoder: dict) -> Part:
    """The part behind the choice of a decoder, which comes with the inputs of its own."""
    key = decoder.get("decoder")
    if key not in DECODERS:
        raise RequestError(f"The decoder has to be {' or '.join(DECODERS)}, with the inputs that belong to it.")
    return DECODERS[key]
