"""The nodes that take grids of codes as things: save, load, look at, cut, put together, compare."""

from comfy_api.latest import io, ui

from ..llada2_mlx.checkpoint.codebook import require_same
from ..llada2_mlx.checkpoint.layout import Part
from ..llada2_mlx.checkpoint.sizes import DECODED_PIXELS, ENCODED_PIXELS
from ..llada2_mlx.grids import Flip, Layout, crop, difference, flip, join, paired, paste
from ..llada2_mlx.imaging.look import LARGEST_SCALE, look_at
from ..llada2_mlx.imaging.pixels import to_cells, to_mask, to_pixels
from ..llada2_mlx.prompts import require_codebook
from . import host
from .sockets import BackboneSocket, VQSocket, model_input

_CATEGORY = "LLaDA2/codes"
_MOST = 4096  # codes on a side; more than any model has a size for
_CODE = f"A code is {DECODED_PIXELS} pixels of a decoded picture, or {ENCODED_PIXELS} of an encoded one."


def _place_inputs(what: str) -> list[io.Input]:
    place = lambda name, edge: io.Int.Input(
        name, default=0, min=0, max=_MOST, tooltip=f"How many codes {what} is from the grid's {edge} edge. {_CODE}"
    )
    return [place("left", "left"), place("top", "upper")]


def _side_input(name: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=_MOST,
        tooltip=f"{name.capitalize()} of the part in codes; 0 is up to the edge. {_CODE}",
    )


def _backbone_input() -> io.Input:
    return BackboneSocket.Input(
        "backbone",
        optional=True,
        tooltip="From Load LLaDA2 Backbone, if its model shall read or edit the result: then a size that it has no tokens for is "
        "refused. Without it you are only told.",
    )


def _check_result(backbone, grids) -> None:
    """Whether a model can read the result: refused where one is linked, else told."""
    if backbone is None:
        host.tell(host.size_note(grids))
    for grid in grids if backbone is not None else ():
        backbone.tokens.check_size(grid.height, grid.width)
        require_codebook(backbone.tokens, grid)
        require_same(grid, backbone.checkpoint)


class LLaDA2SaveVQ(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2SaveVQ",
            display_name="Save VQ",
            category=_CATEGORY,
            description="Saves codes in ComfyUI's output folder: a few kilobytes a picture. Load VQ, and the command line, read them "
            "again, and every decoder seed gives another picture of them.",
            search_aliases=["llada", "save codes", "save grid", "export vq", "keep", "save latent"],
            inputs=[
                VQSocket.Input("vq", tooltip="The codes. Each picture of a batch gets a file of its own."),
                io.String.Input(
                    "filename_prefix",
                    default="llada2/codes",
                    tooltip="What the file's name begins with, inside the output folder; a number follows. It may have folders, and "
                    "%width%, %height% (of the decoded picture in pixels), %year%, %month%, %day%, %hour%, %minute%, %second%.",
                ),
            ],
            outputs=[VQSocket.Output("vq", tooltip="The same codes.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        return host.refusal((host.check_prefix, filename_prefix))

    @classmethod
    @host.explains
    def execute(cls, vq, filename_prefix) -> io.NodeOutput:
        return io.NodeOutput(vq, ui={"vq": host.save_grids(vq, filename_prefix, cls.hidden)})


class LLaDA2LoadVQ(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2LoadVQ",
            display_name="Load VQ",
            category=_CATEGORY,
            description="Loads codes that Save VQ or the command line saved. They carry which model they are of.",
            search_aliases=["llada", "load codes", "load grid", "open vq", "import vq", "load latent"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.grid_names(),
                    tooltip="A saved grid in ComfyUI's input folder, or in its output folder, which [output] says. R refreshes the list.",
                )
            ],
            outputs=[VQSocket.Output("vq", tooltip="The codes, for every node that takes codes.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return host.refusal((host.check_grid, file))

    @classmethod
    def fingerprint_inputs(cls, file: str) -> tuple:
        return host.grid_fingerprint(file)

    @classmethod
    @host.explains
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput((host.load_grid(file),))


class LLaDA2LookAtVQ(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2LookAtVQ",
            display_name="Look at VQ",
            category=_CATEGORY,
            description="Shows codes as they are, without decoding: a square of one colour for each code. The colours come from the "
            "model's codebook, along the three directions in which it spreads most, so that codes for alike things look alike.",
            search_aliases=[
                "llada",
                "preview codes",
                "show vq",
                "visualise",
                "visualize",
                "view grid",
                "preview image",
            ],
            inputs=[
                # lazy: what is wrong with the choice of a model is said before the codes are drawn
                VQSocket.Input("vq", lazy=True, tooltip="The codes to look at."),
                model_input("codebook", own=host.CODES),
                io.Int.Input(
                    "pixels",
                    default=16,
                    min=1,
                    max=LARGEST_SCALE,
                    tooltip=f"Pixels on a side of a code. {ENCODED_PIXELS} gives the size of the encoded picture, "
                    f"{DECODED_PIXELS} that of the decoded one.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What is hatched in grey: each code that the mask covers to at least half. It is scaled to the grid.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image", is_output_list=True, tooltip="The pictures: a batch, or a list where the sizes differ."
                )
            ],
            hidden=[io.Hidden.dynprompt],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, model: str | None = None) -> bool | str:
        return host.refusal((host.check_model, model, Part.IMAGE_TOKENIZER))

    @classmethod
    @host.explains
    def check_lazy_status(cls, model: str, vq=None, **_) -> list[str]:
        if vq is not None:
            return []
        host.check_codes(cls.hidden.dynprompt, model, lambda used: used.require(Part.IMAGE_TOKENIZER))
        return ["vq"]

    @classmethod
    def fingerprint_inputs(cls, model: str, **_) -> tuple:
        return host.fingerprint(model, Part.IMAGE_TOKENIZER)

    @classmethod
    @host.explains
    def execute(cls, vq, model, pixels, mask=None) -> io.NodeOutput:
        checkpoint = host.checkpoint(host.model_of_codes(model, vq), Part.IMAGE_TOKENIZER)
        masked = to_cells(mask, vq)
        batches = to_pixels([look_at(grid, checkpoint, own, pixels) for grid, own in zip(vq, masked, strict=True)])
        shown = [image for batch in batches for image in ui.PreviewImage(batch).values]
        return io.NodeOutput(batches, ui={"images": shown})


class LLaDA2CropVQ(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2CropVQ",
            display_name="Crop VQ",
            category=_CATEGORY,
            description="Cuts a part out of codes. A decoder draws it anew, so that its edges need not look as they did.",
            search_aliases=["llada", "cut codes", "crop grid", "region", "crop image", "crop latent"],
            inputs=[
                VQSocket.Input("vq", lazy=True, tooltip="The codes. Of a batch, each picture is cut."),
                *_place_inputs("the part"),
                _side_input("width"),
                _side_input("height"),
                _backbone_input(),
            ],
            outputs=[VQSocket.Output("vq", tooltip="The part.")],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    @host.explains
    def check_lazy_status(cls, width: int, height: int, vq=None, backbone=None, **_) -> list[str]:
        if vq is not None:
            return []
        if backbone is not None:
            host.check_codes(cls.hidden.dynprompt, backbone.source)
            if width and height:
                backbone.tokens.check_size(height, width)
        return ["vq"]

    @classmethod
    @host.explains
    def execute(cls, vq, left, top, width, height, backbone=None) -> io.NodeOutput:
        parts = tuple(crop(grid, left, top, width, height) for grid in vq)
        _check_result(backbone, parts)
        return io.NodeOutput(parts)


class LLaDA2PasteVQ(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2PasteVQ",
            display_name="Paste VQ",
            category=_CATEGORY,
            description="Puts one grid of codes over another, in place of the codes that are there.",
            search_aliases=["llada", "composite codes", "insert", "overlay", "paste image", "latent composite"],
            inputs=[
                # lazy: two codebooks are refused before anything is drawn
                VQSocket.Input("vq", lazy=True, tooltip="The codes to paste into; the result has their size."),
                VQSocket.Input(
                    "piece",
                    lazy=True,
                    tooltip="The codes to put there. It has to fit inside. A single one goes into every picture of a batch.",
                ),
                *_place_inputs("the piece"),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Of the piece: only codes that it covers to at least half are put. It is scaled to the piece.",
                ),
            ],
            outputs=[VQSocket.Output("vq", tooltip="The codes with the piece in them.")],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    @host.explains
    def check_lazy_status(cls, vq=None, piece=None, **_) -> list[str]:
        return _both(cls, vq=vq, piece=piece)

    @classmethod
    @host.explains
    def execute(cls, vq, piece, left, top, mask=None) -> io.NodeOutput:
        pairs = paired(vq, piece)
        where = to_cells(mask, [own for _, own in pairs])
        pasted = [paste(grid, own, left, top, cells) for (grid, own), cells in zip(pairs, where, strict=True)]
        return io.NodeOutput(tuple(pasted))


class LLaDA2FlipVQ(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2FlipVQ",
            display_name="Flip VQ",
            category=_CATEGORY,
            description="Mirrors the layout of codes. What a single code shows is not mirrored, so that text and fine lines do not become "
            "their mirror image: for that, flip the picture and encode it.",
            search_aliases=["llada", "mirror codes", "flip grid", "flip image", "flip latent"],
            inputs=[
                VQSocket.Input("vq", tooltip="The codes. Of a batch, each picture is flipped."),
                io.Combo.Input(
                    "direction",
                    options=[each.value for each in Flip],
                    default=Flip.SIDES.value,
                    tooltip="What changes places. The codes move, and each stays as it is.",
                ),
            ],
            outputs=[VQSocket.Output("vq", tooltip="The flipped codes.")],
        )

    @classmethod
    @host.explains
    def execute(cls, vq, direction) -> io.NodeOutput:
        return io.NodeOutput(tuple(flip(grid, Flip(direction)) for grid in vq))


class LLaDA2StitchVQ(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2StitchVQ",
            display_name="Stitch VQ",
            category=_CATEGORY,
            description="Makes one grid of two, side by side or one below the other. To have several pictures read together, which stay "
            "pictures of their own, this is not needed.",
            search_aliases=["llada", "join codes", "concatenate", "side by side", "image stitch", "combine grids"],
            inputs=[
                # lazy: two codebooks are refused before anything is drawn
                VQSocket.Input("first", lazy=True, tooltip="The codes on the left, or above."),
                VQSocket.Input(
                    "second",
                    lazy=True,
                    tooltip="The codes on the right, or below. A single one goes with every picture of a batch.",
                ),
                io.Combo.Input(
                    "layout",
                    options=[each.value for each in Layout],
                    default=Layout.ROW.value,
                    tooltip="side by side: both need one height. one below the other: both need one width.",
                ),
                _backbone_input(),
            ],
            outputs=[VQSocket.Output("vq", tooltip="One grid of both.")],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    @host.explains
    def check_lazy_status(cls, first=None, second=None, **_) -> list[str]:
        return _both(cls, first=first, second=second)

    @classmethod
    @host.explains
    def execute(cls, first, second, layout, backbone=None) -> io.NodeOutput:
        joined = tuple(join(pair, Layout(layout)) for pair in paired(first, second))
        _check_result(backbone, joined)
        return io.NodeOutput(joined)


class LLaDA2CompareVQ(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LLaDA2CompareVQ",
            display_name="Compare VQ",
            category=_CATEGORY,
            description="Finds where two grids of codes differ. Both need one size and one model.",
            search_aliases=["llada", "difference", "diff codes", "changed", "mask of changes"],
            inputs=[
                # lazy: two codebooks are refused before anything is drawn
                VQSocket.Input("first", lazy=True, tooltip="The codes to compare."),
                VQSocket.Input(
                    "second",
                    lazy=True,
                    tooltip="Codes of the same size. A single one is compared with every picture of a batch.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "mask",
                    tooltip=f"1 where the codes differ, in the size of the decoded picture: {DECODED_PIXELS} pixels a code.",
                ),
                io.Int.Output("count", tooltip="How many codes differ, of all pictures of a batch together."),
            ],
            hidden=[io.Hidden.dynprompt],
        )

    @classmethod
    @host.explains
    def check_lazy_status(cls, first=None, second=None, **_) -> list[str]:
        return _both(cls, first=first, second=second)

    @classmethod
    @host.explains
    def execute(cls, first, second) -> io.NodeOutput:
        differing = [difference(*pair) for pair in paired(first, second)]
        count = sum(int(each.sum()) for each in differing)
        host.tell(f"{count} of {sum(each.size for each in differing)} codes differ.")
        return io.NodeOutput(to_mask(differing, DECODED_PIXELS), count)


def _both(node: type[io.ComfyNode], **grids) -> list[str]:
    """The inputs that are still to be made, if the graph does not say that they are of two codebooks."""
    if missing := [name for name, grid in grids.items() if grid is None]:
        host.check_one_codebook(node.hidden.dynprompt, *grids)
    return missing


GRID_NODES = [
    LLaDA2SaveVQ,
    LLaDA2LoadVQ,
    LLaDA2LookAtVQ,
    LLaDA2CropVQ,
    LLaDA2PasteVQ,
    LLaDA2FlipVQ,
    LLaDA2StitchVQ,
    LLaDA2CompareVQ,
]
