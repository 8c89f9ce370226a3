"""LLaDA2Story: a request -> texts and pictures in turn."""

from comfy_api.latest import io

from ..llada2_mlx import prompts
from ..llada2_mlx.checkpoint.sizes import DECODED_PIXELS
from . import host
from .sockets import (
    BackboneSocket,
    VQSocket,
    block_inputs,
    choice_inputs,
    guidance_input,
    seed_input,
    steps_input,
    temperature_input,
)


class LLaDA2Story(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2Story",
            display_name="LLaDA2 Story",
            category="LLaDA2",
            description="Tells a story in words and pictures, in one go: the model says when a picture comes and of what size it is, "
            "and each picture sees those before it. The story shows as it grows.",
            search_aliases=[
                "llada",
                "story",
                "interleaved",
                "comic",
                "text and images",
                "illustrated",
                "several pictures",
            ],
            inputs=[
                BackboneSocket.Input("backbone", tooltip="From Load LLaDA2 Backbone."),
                io.String.Input(
                    "prompt", multiline=True, dynamic_prompts=True, default="", tooltip="What to tell, in any language."
                ),
                io.Int.Input(
                    "pictures",
                    default=10,
                    min=1,
                    max=64,
                    tooltip="Pictures at most. The story ends by itself before, or where the model begins one more.",
                ),
                steps_input("Denoising steps for each block of a picture."),
                guidance_input("How closely a picture follows the words; 1 is none.", 7.5, name="text_guidance"),
                guidance_input(
                    "How closely a picture keeps to those before it; 0 is none and takes less work. The first picture has none.",
                    1.5,
                    name="image_guidance",
                ),
                seed_input(
                    "Only matters above a temperature of 0. Picture i, and the text before it, use seed + i, counted from 0.",
                    io.ControlAfterGenerate.fixed,
                ),
                temperature_input("Of the pictures. "),
                temperature_input("Of the texts. ", "text_temperature"),
                steps_input(
                    "Denoising steps for each block of text. Fewer is faster and rougher.",
                    32,
                    name="text_steps",
                    advanced=True,
                ),
                io.Int.Input(
                    "text_length",
                    default=8192,
                    min=1,
                    max=131072,
                    advanced=True,
                    tooltip="Tokens of all texts together at most; the story ends by itself before.",
                ),
                io.Int.Input(
                    "picture_codes",
                    default=4096,
                    min=64,
                    max=65536,
                    advanced=True,
                    tooltip="Codes of a picture at most: the story ends before a larger one. A code is "
                    f"{DECODED_PIXELS} x {DECODED_PIXELS} pixels, so 1024 x 1024 pixels are 1024 codes.",
                ),
                *block_inputs(guided=True),
                *choice_inputs(),
            ],
            outputs=[
                io.String.Output("text", is_output_list=True, tooltip="The texts, as a list in their order."),
                VQSocket.Output(
                    "vq",
                    is_output_list=True,
                    tooltip="The pictures as codes, as a list in their order, because their sizes may differ: ZImage Decode runs once for "
                    "each.",
                ),
                io.String.Output(
                    "markdown",
                    tooltip="The story as one text. ![picture 1](picture_1.png) says where the first picture stands; save the pictures "
                    "under these names beside it.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt: str | None = None) -> bool | str:
        return host.refusal((prompts.require_text, prompt, "prompt"))

    @classmethod
    @host.explains
    def execute(
        cls,
        backbone,
        prompt,
        pictures,
        steps,
        text_guidance,
        image_guidance,
        seed,
        temperature,
        text_temperature,
        text_steps,
        text_length,
        picture_codes,
        block_length,
        threshold,
        rescale,
        top_k=0,
        top_p=1.0,
    ) -> io.NodeOutput:
        from ..llada2_mlx import story
        from ..llada2_mlx.backbone.acceptance import Sampling

        prompts.require_text(prompt, "prompt")
        host.warn(backbone.tokens.doubt(prompt))
        show, on_step = host.progress_text(), host.progress()
        # Nodes 2.0 shows a text as Markdown, and there are no files that its links could lead to
        show_story = lambda text, final=False: show(story.without_links(text), final=final)
        told = story.tell(
            backbone,
            prompt,
            pictures,
            picture_codes,
            text_length,
            text_guidance,
            image_guidance,
            rescale,
            Sampling(block_length, steps, threshold, temperature, top_k, top_p, seed),
            text_steps,
            text_temperature,
            on_step=on_step,
            on_text=show_story,
            on_codes=host.appearing(backbone.source, on_step),
            on_picture=_announce,
        )
        host.warn(*told.warnings)
        show_story(told.markdown, final=True)
        grids = [(grid,) for grid in host.named(backbone.source, told.grids)]
        return io.NodeOutput(host.listed(told.texts), host.listed(grids), told.markdown)


def _announce(number: int, grid) -> None:
    width, height = DECODED_PIXELS * grid.width, DECODED_PIXELS * grid.height
    # it leaves, because the story says where its pictures stand
    host.tell(f"Picture {number} is finished: {width} x {height} pixels.", leaving=True)
