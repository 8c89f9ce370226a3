"""LLaDA2TextToVQ and LLaDA2Edit: the nodes that draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..llada2_mlx import prompts
from ..llada2_mlx.checkpoint.codebook import doubt
from ..llada2_mlx.checkpoint.sizes import DECODED_PIXELS
from ..llada2_mlx.errors import RequestError
from ..llada2_mlx.vq import readings, with_source
from . import host
from .sockets import (
    MOST_JOINED,
    BackboneSocket,
    VQSocket,
    block_inputs,
    choice_inputs,
    guidance_input,
    pictures_input,
    sprint_input,
    steps_input,
    temperature_input,
    token_seed_input,
)

if TYPE_CHECKING:
    from ..llada2_mlx.tasks import Thinking

_STEPS = "Denoising steps for each block of tokens. More is slower and can be better; 8 to 16 are usual."
_VQ_OUT = "The picture as codes, for ZImage Decode or LLaDA2 Understand."


def _side_input(name: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=prompts.LARGEST_SIDE,
        step=prompts.SIDE_STEP,
        tooltip=f"{name.capitalize()} of the decoded picture in pixels, {prompts.SMALLEST_SIDE} to {prompts.LARGEST_SIDE}. "
        f"Below {prompts.SMALLEST_SIDE} it is the model's own.",
    )


class LLaDA2TextToVQ(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2TextToVQ",
            display_name="LLaDA2 Text to VQ",
            category="LLaDA2",
            description="Draws a picture from a text, as a grid of codes. ZImage Decode turns the codes into pixels.",
            search_aliases=["llada", "text to image", "t2i", "generate image", "block diffusion", "sampler"],
            inputs=[
                BackboneSocket.Input("backbone", tooltip="From Load LLaDA2 Backbone."),
                io.String.Input(
                    "prompt", multiline=True, dynamic_prompts=True, default="", tooltip="What to draw, in any language."
                ),
                _side_input("width"),
                _side_input("height"),
                steps_input(_STEPS),
                guidance_input("How strongly to follow the prompt; 1 is none and takes half the work.", 2.0),
                token_seed_input(),
                temperature_input(),
                *block_inputs(guided=True),
                io.DynamicCombo.Input(
                    "mode",
                    options=[
                        io.DynamicCombo.Option("standard", []),
                        io.DynamicCombo.Option("thinking", _thinking_inputs()),
                    ],
                    optional=True,
                    tooltip="thinking: the model plans the picture in words before it draws it, and may choose another size.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="Pictures that are drawn together. On a Mac it should take less time than one after the other: that is computed, "
                    "and a CPU gained nothing. At temperature 0 all are the same.",
                ),
                *choice_inputs(),
                sprint_input(),
            ],
            outputs=[
                VQSocket.Output("vq", tooltip=_VQ_OUT),
                io.String.Output("reasoning", tooltip="What the model wrote before it drew; empty without thinking."),
                io.Mask.Output(
                    "confidence",
                    tooltip="How sure the model was of each code when it settled, 0 to 1, at the size of the decoded picture.",
                ),
            ],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, prompt: str | None = None, *, mode: dict | None = None) -> bool | str:
        # ComfyUI reports a fault once for each positional argument; "mode" comes in any case, without its values
        return host.refusal((prompts.require_text, prompt, "prompt"))

    @classmethod
    @host.explains
    def execute(
        cls,
        backbone,
        prompt,
        width,
        height,
        steps,
        guidance,
        seed,
        temperature,
        block_length,
        threshold,
        rescale,
        mode=None,
        batch_size=1,
        top_k=0,
        top_p=1.0,
        sprint=None,
    ) -> io.NodeOutput:
        from ..llada2_mlx import tasks
        from ..llada2_mlx.backbone.acceptance import Sampling
        from ..llada2_mlx.imaging.pixels import to_mask

        prompts.require_text(prompt, "prompt")
        thinking = _thinking(host.given(cls.hidden.dynprompt, "mode"), mode)
        width, height = prompts.side_or_own(width), prompts.side_or_own(height)
        prompts.require_size(width, height)
        rows, columns = tasks.grid_size(backbone, width, height)
        size = DECODED_PIXELS * columns, DECODED_PIXELS * rows
        host.warn(backbone.checkpoint.image_sizes.doubt("drawing", *size), backbone.tokens.doubt(prompt))
        show, on_step = host.progress_text(), host.progress()
        drawing = tasks.text_to_vq(
            backbone,
            prompt,
            width,
            height,
            guidance,
            rescale,
            Sampling(block_length, steps, threshold, temperature, top_k, top_p, seed),
            on_step=on_step,
            on_codes=host.appearing(backbone.source, on_step),
            thinking=thinking,
            on_text=show,
            sprint=sprint,
            pictures=batch_size,
        )
        drawing = tasks.of_one_size(drawing, seed)
        host.warn(*drawing.warnings)
        if drawing.reasoning:
            show(drawing.reasoning, final=True)
        grids = host.named(backbone.source, drawing.grids)
        return io.NodeOutput(grids, drawing.reasoning, to_mask(drawing.confidence, DECODED_PIXELS))


def _thinking_inputs() -> list[io.Input]:
    return [
        steps_input("Denoising steps for each block of the plan.", 32),
        io.Int.Input(
            "length", default=4096, min=1, max=32768, tooltip="Tokens of the plan at most; it ends by itself before."
        ),
        temperature_input("Of the plan; above 0 every picture of a batch has one of its own. "),
    ]


def _thinking(choice: str | None, mode: dict | None) -> Thinking | None:
    """The choice of a mode as the graph has it, and with the inputs of its own; a graph of an earlier version has none."""
    from ..llada2_mlx.tasks import Thinking

    if choice not in (None, "standard", "thinking"):  # ComfyUI leaves out a choice that does not exist
        raise RequestError("The mode has to be standard or thinking, with the inputs that belong to it.")
    return Thinking(mode["steps"], mode["length"], mode["temperature"]) if choice == "thinking" else None


class LLaDA2Edit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2Edit",
            display_name="LLaDA2 Edit",
            category="LLaDA2",
            description="Changes a picture as an instruction says. The picture comes as codes from SigLIP-VQ Encode with purpose edit, "
            "and the result has its size. Every picture of a batch is edited; of a set from LLaDA2 Join VQ the last one is, with the others to refer to.",
            search_aliases=["llada", "edit image", "instruction", "image to image", "img2img", "change picture"],
            inputs=[
                BackboneSocket.Input("backbone", tooltip="From Load LLaDA2 Backbone."),
                pictures_input(
                    "The picture to change, from SigLIP-VQ Encode with purpose edit; or, from LLaDA2 Join VQ, pictures to refer to and it as the last."
                ),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to change, in any language.",
                ),
                steps_input(_STEPS),
                guidance_input("How strongly to follow the instruction; 1 is none.", 4.0, name="text_guidance"),
                guidance_input(
                    "How strongly to keep to the source picture; 0 is none, above 0 takes half as much work again.",
                    0.0,
                    name="image_guidance",
                ),
                token_seed_input(),
                temperature_input(),
                *block_inputs(guided=True),
                *choice_inputs(),
                sprint_input("Is not used in editing, as published: the node says that it ran without."),
                io.Int.Input(
                    "source",
                    default=0,
                    min=0,
                    max=MOST_JOINED,
                    optional=True,
                    advanced=True,
                    tooltip="Which picture of a set is to be changed, counted from 1; 0 is the last. The model reads it after the others, which keep their "
                    "order: count them so in the instruction.",
                ),
            ],
            outputs=[VQSocket.Output("vq", tooltip=_VQ_OUT)],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, instruction: str | None = None) -> bool | str:
        return host.refusal((prompts.require_text, instruction, "instruction"))

    @classmethod
    @host.explains
    def check_lazy_status(cls, backbone, instruction: str, vq=None, **_) -> list[str]:
        return host.wanted_picture(cls.hidden.dynprompt, backbone, vq, instruction, "instruction")

    @classmethod
    @host.explains
    def execute(
        cls,
        backbone,
        vq,
        instruction,
        steps,
        text_guidance,
        image_guidance,
        seed,
        temperature,
        block_length,
        threshold,
        rescale,
        top_k=0,
        top_p=1.0,
        sprint=None,
        source=0,
    ) -> io.NodeOutput:
        from ..llada2_mlx import tasks
        from ..llada2_mlx.backbone.acceptance import Sampling

        prompts.require_text(instruction, "instruction")
        vq = with_source(vq, source)
        host.warn(doubt(readings(vq)[0], backbone.checkpoint, "editing"), backbone.tokens.doubt(instruction))
        edited = []
        for pictures, own_seed, on_step in host.readings(vq, seed):
            drawing = tasks.edit(
                backbone,
                pictures,
                instruction,
                text_guidance,
                image_guidance,
                rescale,
                Sampling(block_length, steps, threshold, temperature, top_k, top_p, own_seed),
                on_step=on_step,
                on_codes=host.appearing(backbone.source, on_step),
                sprint=sprint,
            )
            edited.append(drawing.grid)
        host.warn(*drawing.warnings)
        return io.NodeOutput(host.named(backbone.source, edited))
