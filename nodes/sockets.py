"""The custom socket types, and inputs that several nodes have."""

from comfy_api.latest import io

from ..llada2_mlx.checkpoint.layout import Part
from ..llada2_mlx.shapes.world import SUMMARY
from . import host

# A ``host.ManagedBackbone``.
BackboneSocket = io.Custom("LLADA2_BACKBONE")
# A batch: a tuple of ``llada2_mlx.vq.VQGrid`` of one size.
VQSocket = io.Custom("LLADA2_VQ")
# Pictures that are read together: a ``llada2_mlx.vq.GridSet``. A socket of its own, because a set cannot be decoded.
VQSetSocket = io.Custom("LLADA2_VQ_SET")

# A ``llada2_mlx.chat.Conversation``, which never changes.
ChatSocket = io.Custom("LLADA2_CHAT")

# How many inputs for pictures LLaDA2JoinVQ can grow; each takes a batch.
MOST_JOINED = 32
# What a choice of a decoder is called in a node.
DECODERS = {"full": Part.DECODER, "turbo": Part.DECODER_TURBO}
# A ``llada2_mlx.backbone.sprint.Sprint``.
SprintSocket = io.Custom("LLADA2_SPRINT")


def model_input(what: str, own: str | None = None) -> io.Combo.Input:
    """The list of models; ``own`` is a first choice that follows what comes over a link."""
    if own is not None:
        return io.Combo.Input(
            "model",
            options=[own, *host.model_names()],
            tooltip=f"Whose {what} to use. {own}: the model is chosen once, in Load LLaDA2 Backbone. Another has to have the same codes.",
        )
    return io.Combo.Input(
        "model",
        options=host.model_names(),
        tooltip=f"Whose {what} to use: a folder under models/llada2, the built-in model, or one of the hub, which is downloaded on first use; models/llada2/hub.txt can name more, one id a line. "
        f"{host.BUILT_IN} is a toy to try the nodes with: it knows {SUMMARY}.",
    )


def pictures_input(tooltip: str, optional: bool = False) -> io.Input:
    """A batch, whose pictures are read one by one, or a set. Lazy: a model of other codes is refused before a picture is made."""
    return io.MultiType.Input("vq", [VQSocket, VQSetSocket], lazy=True, optional=optional, tooltip=tooltip)


def seed_input(effect: str, after: bool | io.ControlAfterGenerate = True) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=after, tooltip=effect)


def upscale_input(**options) -> io.Int.Input:
    """The side of a decoded picture over that of the tokenizer's."""
    return io.Int.Input(
        "upscale",
        default=2,
        min=1,
        max=2,
        tooltip="2: twice the size that the tokenizer sees (32 pixels per code). 1: its size.",
        **options,
    )


def token_seed_input() -> io.Int.Input:
    """The backbone's seed. It stays fixed by default: at temperature 0 another one would only repeat the work."""
    effect = (
        "Only matters above temperature 0: at 0 the codes or the answer are the same for every seed, and a picture is varied by the decoder's "
        "seed. In a batch, picture i uses seed + i."
    )
    return seed_input(effect, io.ControlAfterGenerate.fixed)


def steps_input(tooltip: str, default: int = 8, name: str = "steps", **options) -> io.Int.Input:
    return io.Int.Input(name, default=default, min=1, max=256, tooltip=tooltip, **options)


def guidance_input(tooltip: str, default: float, name: str = "guidance") -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=30.0, step=0.1, tooltip=tooltip)


def answer_inputs(context: str = "") -> list[io.Input]:
    """How an answer is written; ``context`` is what more there is to say of its length."""
    return [
        steps_input("Denoising steps for each block of tokens. Fewer is faster and rougher.", 32),
        io.Int.Input(
            "max_new_tokens",
            default=2048,
            min=1,
            max=8192,
            tooltip=f"The answer's length at most; it ends by itself before.{context}",
        ),
        token_seed_input(),
        temperature_input(),
        *block_inputs(guided=False),
    ]


def temperature_input(of: str = "", name: str = "temperature") -> io.Float.Input:
    return io.Float.Input(
        name,
        default=0.0,
        min=0.0,
        max=10.0,
        step=0.05,
        tooltip=f"{of}0 always takes the most probable token. Above 0 tokens are drawn at random; higher is wilder.",
    )


def choice_inputs() -> list[io.Input]:
    """How tokens are drawn above temperature 0. Optional: a graph of an earlier version has none."""
    return [
        io.Int.Input(
            "top_k",
            default=0,
            min=0,
            max=2**20,
            optional=True,
            advanced=True,
            tooltip="Above temperature 0, how many of the most probable tokens can be drawn; 0 is all.",
        ),
        io.Float.Input(
            "top_p",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="Above temperature 0, the probability that the tokens which can be drawn have together; 0 leaves the most "
            "probable one, 1 all.",
        ),
    ]


def sprint_input(
    tooltip: str = "From LLaDA2 SPRINT: may be faster where much stands before, and is not exact.",
) -> io.Input:
    return SprintSocket.Input("sprint", optional=True, tooltip=tooltip)


def block_inputs(*, guided: bool) -> list[io.Input]:
    """The advanced inputs of a generation."""
    inputs = [
        io.Int.Input(
            "block_length",
            default=32,
            min=1,
            max=1024,
            advanced=True,
            tooltip="Tokens that are denoised together. The model was trained with 32.",
        ),
        io.Float.Input(
            "threshold",
            default=0.95,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="A token more probable than this is accepted at once. Lower is faster and rougher.",
        ),
    ]
    if guided:
        inputs.append(
            io.Float.Input(
                "rescale",
                default=0.7,
                min=0.0,
                max=1.0,
                step=0.05,
                advanced=True,
                tooltip="How far guidance is scaled back to the spread of the unguided prediction; it changes the order in which tokens settle.",
            )
        )
    return inputs
