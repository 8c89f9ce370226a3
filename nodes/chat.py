"""LLaDA2Chat: what was said so far and what is said now -> an answer."""

from comfy_api.latest import io

from ..llada2_mlx import prompts
from ..llada2_mlx.checkpoint.codebook import doubt
from ..llada2_mlx.errors import RequestError
from ..llada2_mlx.vq import readings
from . import host
from .sockets import (
    BackboneSocket,
    ChatSocket,
    answer_inputs,
    choice_inputs,
    pictures_input,
    sprint_input,
)


class LLaDA2Chat(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2Chat",
            display_name="LLaDA2 Chat",
            category="LLaDA2",
            description="One turn of a conversation, which can show pictures. Link the conversation of one LLaDA2 Chat to the next: it reads only what "
            "is new. Two may go on from the same one. The answer shows as it grows.",
            search_aliases=["llada", "chat", "conversation", "talk", "llm", "text generation", "assistant", "vlm"],
            inputs=[
                BackboneSocket.Input("backbone", tooltip="From Load LLaDA2 Backbone."),
                io.String.Input(
                    "message", multiline=True, default="", tooltip="What you say. All of it is plain text."
                ),
                *answer_inputs(" The conversation and it have to fit into the model's context."),
                ChatSocket.Input(
                    "conversation",
                    optional=True,
                    tooltip="What was said before, from another LLaDA2 Chat; without it a conversation begins.",
                ),
                pictures_input(
                    "A picture that you show with the message, from SigLIP-VQ Encode with purpose understand; or several, from LLaDA2 Join VQ.",
                    optional=True,
                ),
                *choice_inputs(),
                sprint_input(),
                io.String.Input(
                    "system",
                    multiline=True,
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="What the model is told of its part, where a conversation begins; empty is what it was trained with.",
                ),
            ],
            outputs=[
                io.String.Output("text", tooltip="The answer."),
                ChatSocket.Output("conversation", tooltip="All that was said, for the next LLaDA2 Chat."),
                io.String.Output("transcript", tooltip="All that was said, as a text."),
            ],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, message: str | None = None) -> bool | str:
        return host.refusal((prompts.require_text, message, "message"))

    @classmethod
    @host.explains
    def check_lazy_status(cls, backbone, message: str, vq=None, **_) -> list[str]:
        if not host.is_linked(cls.hidden.dynprompt, "vq"):
            return []
        return host.wanted_picture(cls.hidden.dynprompt, backbone, vq, message, "message")

    @classmethod
    @host.explains
    def execute(
        cls,
        backbone,
        message,
        steps,
        max_new_tokens,
        seed,
        temperature,
        block_length,
        threshold,
        conversation=None,
        vq=None,
        top_k=0,
        top_p=1.0,
        sprint=None,
        system="",
    ) -> io.NodeOutput:
        from ..llada2_mlx import chat
        from ..llada2_mlx.backbone.acceptance import Sampling

        pictures = _together(vq)
        if conversation is None:
            conversation = chat.Conversation(system)
        elif prompts.trim(system) not in ("", prompts.trim(conversation.system)):
            host.warn(
                "The conversation has begun with another system text, which stays. Set it in its first LLaDA2 Chat."
            )
        host.warn(
            doubt(pictures, backbone.checkpoint, "understanding") if pictures is not None else None,
            backbone.tokens.doubt(message),
        )
        show = host.progress_text()
        answer = chat.reply(
            backbone,
            conversation,
            message,
            pictures,
            max_new_tokens,
            Sampling(block_length, steps, threshold, temperature, top_k, top_p, seed),
            on_step=host.progress(),
            on_text=show,
            sprint=sprint,
        )
        show(answer.text, final=True)
        if not answer.text:
            host.tell("The model ended its answer before the first word.")
        return io.NodeOutput(answer.text, answer.conversation, answer.conversation.transcript())


def _together(vq):
    """The picture of a message, or its set; a batch of several is neither."""
    if vq is None:
        return None
    together = readings(vq)
    if len(together) != 1:
        raise RequestError(
            f"A batch of {len(together)} pictures is linked. A message shows one, or a set: link LLaDA2 Join VQ between."
        )
    return together[0]
