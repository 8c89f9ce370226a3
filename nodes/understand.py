"""LLaDA2Understand: a picture and a question -> an answer."""

from comfy_api.latest import io

from ..llada2_mlx import prompts
from ..llada2_mlx.checkpoint.codebook import doubt
from ..llada2_mlx.vq import readings
from . import host
from .sockets import (
    BackboneSocket,
    answer_inputs,
    choice_inputs,
    pictures_input,
    sprint_input,
)


class LLaDA2Understand(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2Understand",
            display_name="LLaDA2 Understand",
            category="LLaDA2",
            description="Answers a question about a picture, or about several. The picture comes as codes from SigLIP-VQ Encode with purpose understand; "
            "a batch gives a list of answers, a set from LLaDA2 Join VQ one answer about all its pictures. The answer shows as it grows.",
            search_aliases=["llada", "vqa", "caption", "describe image", "image to text", "question", "interrogate"],
            inputs=[
                BackboneSocket.Input("backbone", tooltip="From Load LLaDA2 Backbone."),
                pictures_input(
                    "The picture, from SigLIP-VQ Encode with purpose understand; or several, from LLaDA2 Join VQ: number them in the question."
                ),
                io.String.Input(
                    "question",
                    multiline=True,
                    default="Describe this image in detail.",
                    tooltip="What you want to know.",
                ),
                *answer_inputs(),
                *choice_inputs(),
                sprint_input(),
            ],
            outputs=[
                io.String.Output("text", is_output_list=True, tooltip="The answer, or one for each picture of a batch.")
            ],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, question: str | None = None) -> bool | str:
        return host.refusal((prompts.require_text, question, "question"))

    @classmethod
    @host.explains
    def check_lazy_status(cls, backbone, question: str, vq=None, **_) -> list[str]:
        return host.wanted_picture(cls.hidden.dynprompt, backbone, vq, question, "question")

    @classmethod
    @host.explains
    def execute(
        cls,
        backbone,
        vq,
        question,
        steps,
        max_new_tokens,
        seed,
        temperature,
        block_length,
        threshold,
        top_k=0,
        top_p=1.0,
        sprint=None,
    ) -> io.NodeOutput:
        from ..llada2_mlx import tasks
        from ..llada2_mlx.backbone.acceptance import Sampling

        prompts.require_text(question, "question")
        host.warn(doubt(readings(vq)[0], backbone.checkpoint, "understanding"), backbone.tokens.doubt(question))
        answers = []
        show = host.progress_text()
        for pictures, own_seed, on_step in host.readings(vq, seed):
            answer = tasks.understand(
                backbone,
                pictures,
                question,
                max_new_tokens,
                Sampling(block_length, steps, threshold, temperature, top_k, top_p, own_seed),
                on_step=on_step,
                on_text=show,
                sprint=sprint,
            )
            show(answer.text, final=True)
            answers.append(answer.text)
        return io.NodeOutput(answers)
