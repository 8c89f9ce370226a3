"""LoadLLaDA2Backbone: a model folder -> a handle on its language model."""

from comfy_api.latest import io

from ..llada2_mlx.checkpoint.config import PRECISIONS
from ..llada2_mlx.checkpoint.layout import Part
from . import host
from .sockets import BackboneSocket, model_input


class LoadLLaDA2Backbone(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadLLaDA2Backbone",
            display_name="Load LLaDA2 Backbone (MLX)",
            category="LLaDA2",
            description="Opens the LLaDA2.0-Uni language model, which draws, reads and edits pictures as codes. "
            "Its weights are read when a node first uses them, and let go when ComfyUI needs the memory.",
            search_aliases=["llada", "llada2", "mlx", "load model", "diffusion language model", "checkpoint loader"],
            inputs=[
                model_input("language model"),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="auto: the most exact that fits into this machine's memory. 8bit, 6bit and 4bit run from a smaller copy, which is "
                    "made inside the model's folder on first use; of a hub model that is not here yet, while it is downloaded, and then the copy alone is "
                    "kept. bf16 is what the published model is stored in.",
                ),
            ],
            outputs=[BackboneSocket.Output("backbone", tooltip="For the text-to-VQ, understand and edit nodes.")],
        )

    @classmethod
    def validate_inputs(cls, model: str | None = None) -> bool | str:
        return host.refusal((host.check_model, model, Part.BACKBONE))

    @classmethod
    def fingerprint_inputs(cls, model: str, precision: str) -> tuple:
        return host.fingerprint(model, Part.BACKBONE)

    @classmethod
    @host.explains
    def execute(cls, model: str, precision: str) -> io.NodeOutput:
        return io.NodeOutput(host.backbone(model, precision))
