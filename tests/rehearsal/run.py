"""Everything once at full size, with synthetic weights: how long it takes, and how much memory.

``python tests/rehearsal/run.py FOLDER`` needs 45 GB of disk and 15 GB of memory. Stopped, it goes on where it was; a
stage that is named with ``--stages`` runs again. Each stage is a process of its own, so that its peak is its own. With ``--mac 16``
both models that MLX runs work as on a Mac of 16 GB, and a stage fails in which MLX has more in use than Metal recommends there.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BLOCK = 32
PROMPT = (
    "A red fox in deep snow under tall pines at dawn, breath in the cold air, soft light from the left, a photograph"
)


class Rehearsal:
    """The stages, in their order. ``whole`` is the checkpoint as published, ``small`` its copy with 4 bits.

    Args:
        mac: GB of a Mac that the language model and the decoder with 8 bits work as on; 0: as here.
        steps: of a block. The most is taken by what comes before the second.
        side: codes of a side of the picture that is understood.
    """

    def __init__(self, folder: Path, mac: int = 0, steps: int = 8, side: int = 50) -> None:
        self.folder, self.whole, self.small = folder, folder / "whole", folder / "small"
        self.mac, self.steps, self.side = mac, steps, side
        self.told: dict[str, float] = {}
        self.more = 0  # bytes that weights take here and not on a Mac
        self.cache = 0  # bytes of freed buffers that MLX may keep in this stage
        self.decoder_bytes = 0  # of the decoder's copy, as on that Mac

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Note the seconds of a part of a stage."""
        began = time.perf_counter()
        yield
        self.told[what] = round(time.perf_counter() - began, 1)

    def write(self) -> None:
        """write the backbone, 32.6 GB in bf16"""
        from pieces import write_backbone

        with self.timed("seconds"):
            write_backbone(self.whole)

    def convert(self) -> None:
        """convert it to 4 bits"""
        from llada2_mlx.backbone.convert import convert
        from llada2_mlx.checkpoint.layout import Checkpoint, Part
        from llada2_mlx.worker import MLXWorker

        with self.timed("seconds"):
            copy = MLXWorker().drive(convert(Checkpoint(self.whole), self.small, 4))
        self.told["GB"] = round(sum(path.stat().st_size for path in copy.files(Part.BACKBONE)) / 1e9, 2)
        shutil.rmtree(self.whole)  # its room is needed

    def open(self) -> None:
        """open the copy, and read its weights"""
        with self.timed("seconds to open"):
            backbone = self._backbone()
        with self.timed("seconds to read"):
            backbone.load()

    def draw(self) -> None:
        """one block of text to image at 1024 x 1024 with guidance"""
        from llada2_mlx import prompts
        from llada2_mlx.backbone.denoising import Vocabulary
        from llada2_mlx.backbone.guidance import Guidance

        backbone = self._backbone()
        tokens = backbone.tokens
        make = lambda text: prompts.text_to_image(tokens, text, 32, 32).branches
        self._block(backbone, make, PROMPT, Vocabulary(tokens.mask, tokens.image_offset), Guidance.simple(2.0))

    def understand(self) -> None:
        """one block of understanding"""
        self._understand(self._backbone())

    def _understand(self, backbone) -> None:
        from llada2_mlx import prompts
        from llada2_mlx.backbone.denoising import Vocabulary
        from llada2_mlx.backbone.guidance import Guidance
        from llada2_mlx.vq import VQGrid

        tokens = backbone.tokens
        grid = VQGrid.from_list([37 * i % 16384 for i in range(self.side**2)], self.side, self.side, 16384)
        make = lambda text: prompts.understand(tokens, grid, text).branches
        self._block(backbone, make, PROMPT, Vocabulary(tokens.mask, ends=frozenset({tokens.end})), Guidance())

    def parts(self) -> None:
        """write the image tokenizer, a decoder and the VAE, 15.3 GB"""
        from pieces import write_image_parts

        with self.timed("seconds"):
            write_image_parts(self.small)

    def encode(self) -> None:
        """encode a picture of 512 x 512"""
        from PIL import Image

        from llada2_mlx.checkpoint.layout import Part
        from llada2_mlx.imaging.prepare import Purpose

        tokenizer = self._part(Part.IMAGE_TOKENIZER)
        with self.timed("seconds"):
            grid = tokenizer.encode(Image.radial_gradient("L").resize((512, 512)).convert("RGB"), Purpose.EDIT, 512)
        assert (grid.height, grid.width) == (32, 32)

    def decode(self) -> None:
        """two decoder steps at 512 x 512, without guidance"""
        from llada2_mlx.checkpoint.layout import Part
        from llada2_mlx.imaging.flow import DecodeOptions
        from llada2_mlx.vq import VQGrid

        decoder = self._part(Part.DECODER_TURBO)
        grid = VQGrid.from_list([37 * i % 16384 for i in range(256)], 16, 16, 16384)
        with self.timed("seconds"):
            latents = decoder.sample([grid], DecodeOptions(steps=3, guidance=0.0))
        assert latents.shape == (1, 16, 64, 64) and latents.isfinite().all()

    def copy_decoder(self) -> None:
        """copy the decoder with 8 bits"""
        from llada2_mlx.imaging.decoder_copy import convert_decoder, own_copy, weights_of
        from llada2_mlx.worker import MLXWorker

        folder = self._decoder_folder()
        with self.timed("seconds"):
            copy = MLXWorker().drive(convert_decoder(folder, own_copy(folder)))
        self.told["GB"] = round(weights_of(copy).stat().st_size / 1e9, 2)

    def decode_copy(self) -> None:
        """one step of the copy in MLX at 64 x 64, without guidance"""
        self._decode_small(self._decoder_copy())

    def together(self) -> None:
        """both copies in memory: one block of understanding, and a step of the decoder's at 64 x 64"""
        decoder = self._decoder_copy()
        more, cache = self.more, self.cache
        backbone = self._backbone(beside=self.decoder_bytes)
        self.more, self.cache = self.more + more, max(self.cache, cache)  # they work one after the other
        self._understand(backbone)
        self._decode_small(decoder)

    def pixels(self) -> None:
        """VAE, latents to 512 x 512 pixels"""
        import torch

        from llada2_mlx.checkpoint.layout import Part

        vae = self._part(Part.VAE)
        with self.timed("seconds"):
            pixels = vae.decode(torch.zeros(1, 16, 64, 64))
        assert pixels.shape == (1, 512, 512, 3)

    def _backbone(self, beside: int = 0):
        """The copy with 4 bits, which works as it would beside so many bytes of another model."""
        from macs import as_on_metal, recommended
        from published import BACKBONE

        from llada2_mlx.backbone.handle import Backbone
        from llada2_mlx.backbone.precision import choose, precision_bytes, run_type
        from llada2_mlx.backbone.working import fit
        from llada2_mlx.checkpoint.layout import Checkpoint

        backbone = Backbone(Checkpoint(self.small))
        if self.mac:  # here it would work otherwise: MLX on a CPU writes scores out, and keeps scales in float32
            there = recommended(self.mac)
            with as_on_metal():
                if not beside:
                    assert choose(BACKBONE, "bf16", there)[0] == backbone.precision == "4bit"
                weights = precision_bytes(BACKBONE, "4bit")
                backbone.working = fit(BACKBONE, run_type("4bit"), there - weights - beside)
            self.more, self.cache = backbone.size - weights, backbone.working.cache
            self.told["positions in a pass"] = backbone.working.piece
        return backbone

    def _decoder_folder(self) -> Path:
        from llada2_mlx.checkpoint.layout import Part
        from llada2_mlx.imaging.decoder import decoder_folder

        return self.small / decoder_folder(Part.DECODER_TURBO)

    def _decoder_copy(self):
        from macs import as_on_metal

        from llada2_mlx.checkpoint.layout import Checkpoint, Part
        from llada2_mlx.imaging.decoder_copy import CACHE, memory_bytes, own_copy, work_bytes
        from llada2_mlx.imaging.decoder_mlx import MLXDecoder
        from llada2_mlx.imaging.flow import DecodeOptions
        from llada2_mlx.vq import VQGrid

        copy = own_copy(self._decoder_folder())
        if self.mac:
            here, large = memory_bytes(copy, True), VQGrid.from_list([0] * 32 * 32, 32, 32, 16384)
            with as_on_metal():
                self.decoder_bytes = memory_bytes(copy, True)
                whole = self.decoder_bytes + work_bytes(copy, [large], DecodeOptions())
            self.told["GB reckoned for the decoder at 1024 x 1024"] = round(whole / 1e9, 2)
            self.more, self.cache = here - self.decoder_bytes, CACHE
        with self.timed("seconds to read the decoder"):
            return MLXDecoder(Checkpoint(self.small), Part.DECODER_TURBO, quantised=True)

    def _decode_small(self, decoder) -> None:
        from llada2_mlx.imaging.flow import DecodeOptions
        from llada2_mlx.vq import VQGrid

        grid = VQGrid.from_list([37 * i for i in range(4)], 2, 2, 16384)
        with self.timed("seconds to decode"):
            latents = decoder.sample([grid], DecodeOptions(steps=2, guidance=0.0))
        assert latents.shape == (1, 16, 8, 8) and latents.isfinite().all()

    def _part(self, part):
        from llada2_mlx.checkpoint.layout import Checkpoint
        from llada2_mlx.imaging import load_part

        with self.timed("seconds to read"):
            return load_part(Checkpoint(self.small), part)

    def _block(self, backbone, make, text, vocabulary, guidance) -> None:
        """The first block after a prompt; the text is cut so that the prompt fills its own blocks."""
        from llada2_mlx.backbone.acceptance import Sampling
        from llada2_mlx.backbone.denoising import Draft, generate

        while len(make(text)[0]) % BLOCK:
            text = text[:-1]  # the tokenizer written here knows bytes alone
        backbone.load()
        with self.timed("seconds"):
            draft = Draft.blank(make(text), BLOCK, vocabulary.mask)
            sampling = Sampling(steps=self.steps, threshold=1.0, block_length=BLOCK)
            result = backbone.run(generate, draft, vocabulary, sampling, guidance)
        report = result.report
        self.told |= {"prompt": len(make(text)[0]), "steps": report.steps, "positions": report.positions}
        assert (report.blocks, report.steps) == (1, self.steps)


STAGES = [name for name, value in vars(Rehearsal).items() if name[0] != "_" and name != "timed" and callable(value)]


def main() -> None:
    """Run the stages that are not done yet, and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoint is written; it stays there")
    parser.add_argument("--stages", nargs="*", choices=STAGES, help="run these again; what is not done yet if left out")
    parser.add_argument(
        "--mac", type=int, default=0, metavar="GB", help="a Mac's memory, whose limit MLX has to keep to"
    )
    parser.add_argument("--steps", type=int, default=8, help="of a block; 2 find the same peak sooner (default 8)")
    parser.add_argument(
        "--side", type=int, default=50, help="codes of a side of the picture that is understood (default 50)"
    )
    parser.add_argument("--alone", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        return _alone(Rehearsal(arguments.folder, arguments.mac, arguments.steps, arguments.side), arguments.alone)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = arguments.folder / "results.json"
    done = json.loads(results.read_text()) if results.exists() else {}
    same = ["--mac", str(arguments.mac), "--steps", str(arguments.steps), "--side", str(arguments.side)]
    for stage in arguments.stages or [name for name in STAGES if name not in done]:
        command = [sys.executable, __file__, str(arguments.folder), "--alone", stage, *same]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        done[stage] = json.loads(said.splitlines()[-1])
        results.write_text(json.dumps(done, indent=1))
        print(stage, done[stage], flush=True)
    print("\n| stage | figures | in MLX | peak of the process |\n|---|---|---|---|")
    for stage in (name for name in STAGES if name in done):
        told = {**done[stage]}
        peak, in_mlx = told.pop("peak"), told.pop("in MLX", None)
        figures = ", ".join(f"{value} {name}" for name, value in told.items())
        in_mlx = "" if in_mlx is None else f"{in_mlx:.2f} GB"
        print(f"| {getattr(Rehearsal, stage).__doc__} | {figures} | {in_mlx} | {peak:.1f} GB |")


def _alone(rehearsal: Rehearsal, stage: str) -> None:
    """Run a stage, and fail where MLX had more in use than Metal recommends on the Mac.

    MLX's CPU backend pays no heed to its memory limit, so that its peak is looked at. There the scales of few bits are float32: what
    that adds to the weights is taken off. What the work takes more there, float32 and written scores, is not.
    """
    import mlx.core as mx
    from macs import recommended

    mx.reset_peak_memory()
    getattr(rehearsal, stage)()
    if rehearsal.mac:
        used, limit = mx.get_peak_memory() - rehearsal.more + rehearsal.cache, recommended(rehearsal.mac)
        rehearsal.told["in MLX"] = used / 1e9
        assert used <= limit, f"MLX had {used / 1e9:.2f} GB in use, and {limit / 1e9:.2f} are recommended"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    print(json.dumps(rehearsal.told | {"peak": peak}))


if __name__ == "__main__":
    main()
