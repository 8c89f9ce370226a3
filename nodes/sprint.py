"""LLaDA2Sprint: how a generation may save work at the cost of exactness."""

from comfy_api.latest import io

from . import host
from .sockets import SprintSocket

# As ``llada2_mlx.backbone.sprint.Remasking`` has them, which needs MLX.
_RANKS = ["low confidence", "top-k margin", "negative entropy", "random"]


class LLaDA2Sprint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2Sprint",
            display_name="LLaDA2 SPRINT",
            category="LLaDA2",
            description="Drawing and answering that may be faster where much stands before, and is not exact: after the first steps of a "
            "block the model looks at a part of what stands before. Link it to a node that draws or answers.",
            search_aliases=["llada", "sprint", "speed", "fast", "acceleration", "kv cache", "pruning"],
            inputs=[
                io.Float.Input(
                    "keep_ratio",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="The part of what stands before that the later steps of a block look at. Lower is faster and rougher. On a CPU, "
                    "with 2,500 codes before a long answer, 0.7 was no faster than without SPRINT, and 0.3 was 1.3 times as fast.",
                ),
                io.Int.Input(
                    "warm_up", default=2, min=1, max=256, tooltip="Steps of each block that look at all of it."
                ),
                io.Float.Input(
                    "alpha",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="How positions are ranked: 1 by their keys' size, 0 by how sure the model is there. As published, where text is "
                    "always kept only 1 looks at the keys.",
                ),
                io.Float.Input(
                    "text_keep_ratio",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="1 keeps all text; anything below lets it be dropped.",
                ),
                io.Float.Input(
                    "image_keep_ratio",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="1 keeps all codes of pictures; anything below lets them be dropped.",
                ),
                io.Combo.Input(
                    "remasking",
                    options=_RANKS,
                    default=_RANKS[0],
                    advanced=True,
                    tooltip="Which tokens settle first: those that are most probable, whose lead over the second is largest, or whose "
                    "distribution is narrowest.",
                ),
            ],
            outputs=[
                SprintSocket.Output("sprint", tooltip="For LLaDA2 Text to VQ, LLaDA2 Understand and LLaDA2 Chat.")
            ],
        )

    @classmethod
    @host.explains
    def execute(cls, keep_ratio, warm_up, alpha, text_keep_ratio, image_keep_ratio, remasking) -> io.NodeOutput:
        from ..llada2_mlx.backbone.sprint import Remasking, Sprint

        return io.NodeOutput(
            Sprint(keep_ratio, warm_up, alpha, text_keep_ratio, image_keep_ratio, Remasking(remasking))
        )
