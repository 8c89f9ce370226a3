"""LLaDA2Redraw and LLaDA2Grow: a part of a picture, or what is around it, drawn anew; every other code is kept."""

from __future__ import annotations

from comfy_api.latest import io

from ..llada2_mlx import prompts
from ..llada2_mlx.checkpoint.codebook import doubt
from ..llada2_mlx.checkpoint.sizes import DECODED_PIXELS
from ..llada2_mlx.grids import LEAST_THRESHOLD, MOST_GROWN, MOST_THRESHOLD, grown, require_added, require_covered
from ..llada2_mlx.vq import picture_seed
from . import host
from .sockets import (
    BackboneSocket,
    VQSocket,
    block_inputs,
    choice_inputs,
    guidance_input,
    steps_input,
    temperature_input,
    token_seed_input,
)

_WHOLE, _BEFORE = (each.value for each in prompts.Seeing)
_MOST = 255  # codes on a side that a size token can say


def _shared_inputs() -> list[io.Input]:
    """Inputs from what is written to how: the same for both nodes."""
    return [
        io.String.Input(
            "text",
            multiline=True,
            dynamic_prompts=True,
            default="",
            tooltip=f"Where the model sees {_WHOLE}: an instruction, as for LLaDA2 Edit. Where it sees {_BEFORE}: a prompt that "
            "describes the picture as it shall be, as for LLaDA2 Text to VQ.",
        ),
        io.Combo.Input(
            "seeing",
            options=[_WHOLE, _BEFORE],
            default=_BEFORE,
            tooltip=f"{_WHOLE}: it is read first, as when it is edited, so that the new part can fit all of it. {_BEFORE}: only the "
            "rows above and what is close, as when it is drawn; less work.",
        ),
        steps_input("Denoising steps for each block of codes."),
        guidance_input("How strongly to follow the text; 1 is none and takes half the work.", 2.0),
        token_seed_input(),
        temperature_input(),
        *block_inputs(guided=True),
        *choice_inputs(),
    ]


def _outputs() -> list[io.Output]:
    return [
        VQSocket.Output("vq", tooltip="The picture as codes, for ZImage Decode or LLaDA2 Understand."),
        io.Mask.Output(
            "redrawn",
            tooltip="What was drawn, whole codes, at the size of the decoded picture: to put the decoded picture into the original.",
        ),
        io.Mask.Output(
            "confidence",
            tooltip="How sure the model was of each code when it settled, 0 to 1; 1 where the code was kept.",
        ),
    ]


class LLaDA2Redraw(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2Redraw",
            display_name="LLaDA2 Redraw",
            category="LLaDA2",
            description="Draws the masked part of a picture anew and keeps every other code as it is. Only blocks of codes that the "
            "mask touches are run.",
            search_aliases=["llada", "inpaint", "inpainting", "fill", "replace part", "mask edit", "local edit"],
            inputs=[
                BackboneSocket.Input("backbone", tooltip="From Load LLaDA2 Backbone."),
                # lazy: a model of other codes is refused before the picture is made
                VQSocket.Input(
                    "vq", lazy=True, tooltip="The picture, from SigLIP-VQ Encode with purpose edit, or drawn."
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="What is drawn anew, such as the mask painted in Load Image. It is fitted to the grid as the picture is: scaled "
                    "to cover it, and the middle counts. One for all pictures of a batch, or one for each.",
                ),
                *_shared_inputs(),
                io.Float.Input(
                    "mask_threshold",
                    default=0.1,
                    min=LEAST_THRESHOLD,
                    max=MOST_THRESHOLD,
                    step=0.01,
                    advanced=True,
                    optional=True,
                    tooltip="A code is drawn anew where the mask covers at least this part of it.",
                ),
                io.Int.Input(
                    "mask_grow",
                    default=0,
                    min=0,
                    max=MOST_GROWN,
                    advanced=True,
                    optional=True,
                    tooltip=f"Codes by which the mask grows in all directions. A code is {DECODED_PIXELS} pixels of the decoded picture.",
                ),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None) -> bool | str:
        return host.refusal((prompts.require_text, text, "text"))

    @classmethod
    @host.explains
    def check_lazy_status(cls, backbone, text: str, mask, vq=None, **_) -> list[str]:
        require_covered([(mask > 0).cpu().numpy()])  # what is missing is often that nothing was painted
        return host.wanted_picture(cls.hidden.dynprompt, backbone, vq, text, "text")

    @classmethod
    @host.explains
    def execute(cls, backbone, vq, mask, text, seeing, mask_threshold=0.1, mask_grow=0, **how) -> io.NodeOutput:
        from ..llada2_mlx import tasks
        from ..llada2_mlx.imaging.pixels import to_cells

        masks = [grown(cells, mask_grow) for cells in to_cells(mask, vq, mask_threshold)]
        require_covered(masks)
        redraw = lambda grid, cells, **options: tasks.redraw(backbone, grid, cells, text, **options)
        return _drawn(backbone, vq, masks, text, seeing, redraw, **how)


class LLaDA2Grow(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        side = lambda name: io.Int.Input(
            name,
            default=0,
            min=0,
            max=_MOST,
            tooltip=f"Codes to add {'on the ' + name if name in ('left', 'right') else 'at the ' + name}. A code is {DECODED_PIXELS} pixels of "
            "the decoded picture.",
        )
        return io.Schema(
            node_id="LLaDA2Grow",
            display_name="LLaDA2 Grow",
            category="LLaDA2",
            description="Draws what is around a picture and keeps every code of it. The new size needs size tokens: below 36 codes even "
            "sides.",
            search_aliases=["llada", "outpaint", "outpainting", "extend", "uncrop", "expand", "zoom out"],
            inputs=[
                BackboneSocket.Input("backbone", tooltip="From Load LLaDA2 Backbone."),
                VQSocket.Input(
                    "vq", lazy=True, tooltip="The picture, from SigLIP-VQ Encode with purpose edit, or drawn."
                ),
                *(side(name) for name in ("left", "top", "right", "bottom")),
                *_shared_inputs(),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None) -> bool | str:
        return host.refusal((prompts.require_text, text, "text"))

    @classmethod
    @host.explains
    def check_lazy_status(cls, backbone, text: str, left, top, right, bottom, vq=None, **_) -> list[str]:
        require_added(left, top, right, bottom)
        return host.wanted_picture(cls.hidden.dynprompt, backbone, vq, text, "text")

    @classmethod
    @host.explains
    def execute(cls, backbone, vq, left, top, right, bottom, text, seeing, **how) -> io.NodeOutput:
        from ..llada2_mlx import tasks

        sides = {"left": left, "top": top, "right": right, "bottom": bottom}
        grow = lambda grid, _, **options: tasks.grow(backbone, grid, text, **sides, **options)
        return _drawn(backbone, vq, [None] * len(vq), text, seeing, grow, **how)


def _drawn(backbone, vq, masks, text, seeing, draw, guidance, rescale, seed, **how) -> io.NodeOutput:
    """Each picture of a batch, drawn by ``draw(grid, mask, ...)``."""
    from ..llada2_mlx.backbone.acceptance import Sampling
    from ..llada2_mlx.imaging.pixels import to_mask

    prompts.require_text(text, "text")
    seen = doubt(vq[0], backbone.checkpoint, "editing") if seeing == _WHOLE else None
    host.warn(seen, backbone.tokens.doubt(text))
    common = {"seeing": prompts.Seeing(seeing), "guidance": guidance, "rescale": rescale}
    drawings = []
    for index, (grid, mask) in enumerate(zip(vq, masks, strict=True)):
        sampling, on_step = Sampling(seed=picture_seed(seed, index), **how), host.progress(index, len(vq))
        shown = {"on_step": on_step, "on_codes": host.appearing(backbone.source, on_step)}
        drawings.append(draw(grid, mask, sampling=sampling, **shown, **common))
    host.warn(None if seen else backbone.checkpoint.image_sizes.doubt_grid("drawing", drawings[0].grid))
    return io.NodeOutput(
        host.named(backbone.source, [drawing.grid for drawing in drawings]),
        to_mask([drawing.masked for drawing in drawings], DECODED_PIXELS),
        to_mask([drawing.confidence[0] for drawing in drawings], DECODED_PIXELS),
    )
