"""``llada2-mlx``: draw, ask about and edit pictures from a terminal."""

from __future__ import annotations

import argparse
import sys

from . import __version__, commands
from .checkpoint.config import PRECISIONS
from .checkpoint.layout import BUILT_IN, HUB_MODEL
from .commands import ALL_TASKS, DECODERS, ENGINES, PARTS, PRESETS, PURPOSES, RANKS, SAMPLERS, SEEING, WAY, FilePath
from .errors import LLaDA2Error


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments) or 0
    except (LLaDA2Error, OSError) as error:
        print(f"llada2-mlx: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("llada2-mlx: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--model",
        type=FilePath,
        default=str(BUILT_IN),
        help=f"a model folder, or a hub id such as {HUB_MODEL}; the built-in one if left out",
    )
    common.add_argument(
        "--precision",
        default="auto",
        choices=PRECISIONS,
        help="of the backbone; 8bit, 6bit and 4bit run from a converted copy that is made on first use; auto: the most exact that fits",
    )
    common.add_argument("--device", help="where PyTorch runs: mps, cuda or cpu; the first that there is if left out")

    sampling = argparse.ArgumentParser(add_help=False)
    sampling.add_argument(
        "--seed", type=int, default=0, help="of the decoder's noise, and of the tokens above temperature 0"
    )
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    sampling.add_argument("--top-k", type=int, default=0, help="above temperature 0: how many candidates stay (0: all)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="above temperature 0: the probability that stays")
    sampling.add_argument("--block-length", type=int, default=32, help="positions in a block")
    sampling.add_argument(
        "--threshold", type=float, default=0.95, help="a candidate more probable than this is accepted at once"
    )

    sprinting = argparse.ArgumentParser(add_help=False)
    sprinting.add_argument(
        "--sprint", action="store_true", help="may be faster where much stands before, and is not exact; with:"
    )
    sprinting.add_argument("--keep-ratio", type=float, default=0.7, help="part of what stands before that is looked at")
    sprinting.add_argument("--warm-up", type=int, default=2, help="steps of a block that look at all of it")
    sprinting.add_argument("--alpha", type=float, default=0.5, help="rank by keys (1) or by the model's confidence (0)")
    sprinting.add_argument("--text-keep-ratio", type=float, default=1.0, help="1 keeps all text")
    sprinting.add_argument("--image-keep-ratio", type=float, default=0.0, help="1 keeps all codes of pictures")
    sprinting.add_argument("--remasking", choices=RANKS, default="confidence", help="which tokens settle first")

    guided = argparse.ArgumentParser(add_help=False)
    guided.add_argument("--rescale", type=float, default=0.7, help="of guided logits, 0 to 1")
    guided.add_argument("--steps", type=int, default=8, help="denoising steps for a block")

    to_file = argparse.ArgumentParser(add_help=False)
    to_file.add_argument(
        "-o", "--output", type=FilePath, default="picture.png", help="the PNG file to write (default: picture.png)"
    )

    in_engine = argparse.ArgumentParser(add_help=False)
    in_engine.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="what the decoder runs in; mlx-8bit makes a copy of half the size on first use; auto: on a Mac what fits, else torch",
    )

    decoding = argparse.ArgumentParser(add_help=False)
    decoding.add_argument("--decoder", choices=DECODERS, default="turbo", help="default: turbo")
    decoding.add_argument("--decoder-steps", type=int, help="default: 50 full, 8 turbo")
    decoding.add_argument("--decoder-guidance", type=float, default=1.0, help="1: as published, 0: none (default: 1)")
    decoding.add_argument(
        "--preset",
        choices=PRESETS,
        default="custom",
        help="of the full decoder, in place of its steps, solver, time shift and interval of guidance; network calls with "
        "guidance: published 98, balanced 48, fast 24. custom: what the other options say (default)",
    )
    decoding.add_argument(
        "--sampler", choices=SAMPLERS, help=f"published: fresh noise at each step (default: {WAY['sampler']})"
    )
    decoding.add_argument(
        "--solver", help=f"of the ODE: ab2, dpmpp_2m, unipc_2, or torchdiffeq's (default: {WAY['solver']})"
    )
    decoding.add_argument(
        "--time-shift", type=float, help=f"of the ODE's times to the noise (default: {WAY['time_shift']:g})"
    )
    decoding.add_argument(
        "--guidance-start",
        type=float,
        help=f"the time from which the decoder is guided, 0: noise (default: {WAY['guidance_start']:g})",
    )
    decoding.add_argument(
        "--guidance-end", type=float, help=f"and before this, 1: picture (default: {WAY['guidance_end']:g})"
    )
    decoding.add_argument(
        "--cache-threshold",
        type=float,
        default=0.0,
        help="step cache of the decoder: up to which part the first layer may have changed for a call to take from an earlier one "
        "what the other layers add, 0: off (default: 0)",
    )
    decoding.add_argument(
        "--upscale", type=int, default=2, choices=(1, 2), help="size of the picture over the tokenizer's (default: 2)"
    )

    parser = argparse.ArgumentParser(prog="llada2-mlx", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    words = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command, *parents: argparse.ArgumentParser, running: bool = True) -> argparse.ArgumentParser:
        parents = (common, *parents) if running else parents
        subparser = words.add_parser(
            command.__name__, help=command.__doc__, description=command.__doc__, parents=parents
        )
        subparser.set_defaults(command=command)
        return subparser

    encoding = argparse.ArgumentParser(add_help=False)
    encoding.add_argument(
        "--size",
        type=int,
        default=0,
        help="side in pixels of a square about as large as the encoded picture; 0: the model's own",
    )

    with_others = argparse.ArgumentParser(add_help=False)
    with_others.add_argument(
        "--with",
        dest="others",
        metavar="IMAGE",
        type=FilePath,
        action="append",
        default=[],
        help="another picture; may be given several times. In a question they follow the first picture, in an edit they stand before the "
        "picture that is changed",
    )

    confident = argparse.ArgumentParser(add_help=False)
    confident.add_argument(
        "--confidence",
        type=FilePath,
        metavar="FILE",
        help="also write to this PNG file how sure the model was of each code, white: sure; as large as the picture",
    )

    p = add(commands.t2i, sampling, guided, sprinting, to_file, confident, decoding, in_engine)
    p.add_argument("prompt")
    p.add_argument("--width", type=int, default=0, help="pixels; 0: the model's own")
    p.add_argument("--height", type=int, default=0, help="pixels; 0: the model's own")
    p.add_argument("--guidance", type=float, default=2.0, help="1: none")
    p.add_argument("--codes", type=FilePath, help="also write the codes to this .safetensors file")
    p.add_argument(
        "--pictures", type=int, default=1, help="how many to draw, above temperature 0; picture i has seed + i"
    )
    p.add_argument("--thinking", action="store_true", help="let the model plan the picture in words first; with:")
    p.add_argument("--thinking-steps", type=int, default=32, help="denoising steps for a block of the plan")
    p.add_argument("--thinking-length", type=int, default=4096, help="tokens of the plan at most")
    p.add_argument("--thinking-temperature", type=float, default=0.0, help="of the plan")

    p = add(commands.understand, sampling, sprinting, encoding, with_others)
    p.add_argument("image", type=FilePath)
    p.add_argument("question")
    p.add_argument("--steps", type=int, default=32, help="denoising steps for a block")
    p.add_argument("--max-new-tokens", type=int, default=2048)

    p = add(commands.chat, sampling, sprinting, encoding)
    p.add_argument(
        "--system", default="", help="what the model is told of its part; what it was trained with if left out"
    )
    p.add_argument(
        "--image",
        type=FilePath,
        action="append",
        default=[],
        help="shown with what you say first; may be given several times",
    )
    p.add_argument("--steps", type=int, default=32, help="denoising steps for a block")
    p.add_argument("--max-new-tokens", type=int, default=2048, help="of an answer")

    p = add(commands.edit, sampling, guided, sprinting, to_file, decoding, in_engine, encoding, with_others)
    p.add_argument("image", type=FilePath)
    p.add_argument("instruction")
    p.add_argument("--guidance", type=float, default=4.0, help="of the text")
    p.add_argument("--image-guidance", type=float, default=0.0, help="0: none")
    p.add_argument(
        "--published-crop", action="store_true", help="crop the middle of the picture without scaling it first"
    )

    redrawing = argparse.ArgumentParser(add_help=False)
    redrawing.add_argument("image", type=FilePath, help="a picture, or codes that were saved as .safetensors")
    redrawing.add_argument(
        "--guidance", type=float, help="1: none (default: 4 where the whole picture is seen, else 2)"
    )
    redrawing.add_argument("--image-guidance", type=float, default=0.0, help="where the whole picture is seen; 0: none")
    redrawing.add_argument(
        "--seeing",
        choices=SEEING,
        default="before",
        help="what the model sees: what comes before, and the text describes the picture; or the whole picture, and the text is an "
        "instruction (default: before)",
    )

    p = add(commands.redraw, sampling, guided, to_file, confident, decoding, in_engine, encoding, redrawing)
    p.add_argument("mask", type=FilePath, help="a picture of any size, white where the other is to be redrawn")
    p.add_argument("text")
    p.add_argument(
        "--invert-mask",
        action="store_true",
        help="the mask is black where the other is to be redrawn: so a file of --confidence is a mask of what is least certain",
    )
    p.add_argument("--mask-threshold", type=float, default=0.1, help="the part of a code that has to be covered")
    p.add_argument("--mask-grow", type=int, default=0, help="codes by which the mask grows")

    p = add(commands.grow, sampling, guided, to_file, confident, decoding, in_engine, encoding, redrawing)
    p.add_argument("text")
    for side in ("left", "top", "right", "bottom"):
        p.add_argument(f"--{side}", type=int, default=0, help="codes to add there")

    p = add(commands.story, sampling, guided, decoding, in_engine)
    p.add_argument("prompt")
    p.add_argument(
        "-o",
        "--output",
        type=FilePath,
        default="story",
        metavar="FOLDER",
        help="a new or empty folder (default: story); gets index.html, story.md, and of each picture a PNG file and its codes",
    )
    p.add_argument("--pictures", type=int, default=10, help="at most (default: 10)")
    p.add_argument("--picture-codes", type=int, default=4096, help="of a picture at most (default: 4096)")
    p.add_argument("--text-length", type=int, default=8192, help="tokens of all texts at most (default: 8192)")
    p.add_argument("--text-guidance", type=float, default=7.5, help="how closely pictures follow the words")
    p.add_argument("--image-guidance", type=float, default=1.5, help="how closely they keep to the pictures before")
    p.add_argument("--text-steps", type=int, default=32, help="denoising steps for a block of text")
    p.add_argument("--text-temperature", type=float, default=0.0, help="of the texts")

    p = add(commands.encode, encoding)
    p.add_argument("image", type=FilePath)
    p.add_argument("-o", "--output", type=FilePath, default="codes.safetensors")
    p.add_argument("--purpose", choices=PURPOSES, default="understand")

    p = add(commands.decode, to_file, decoding, in_engine)
    p.add_argument("codes", type=FilePath)
    p.add_argument("--seed", type=int, default=0, help="of the noise")

    p = add(commands.look)
    p.add_argument("codes", type=FilePath)
    p.add_argument(
        "-o", "--output", type=FilePath, default="look.png", help="the PNG file to write (default: look.png)"
    )
    p.add_argument("--pixels", type=int, default=16, help="on a side of a code (default: 16)")

    p = add(commands.download, running=False)
    p.add_argument("model", nargs="?", default=HUB_MODEL, help=f"a hub id (default: {HUB_MODEL})")
    p.add_argument(
        "--parts",
        nargs="+",
        choices=(*PARTS, "all"),
        default=ALL_TASKS,
        help=f"default: what drawing, asking and editing need with the turbo decoder: {' '.join(ALL_TASKS)}",
    )
    p.add_argument(
        "--bits",
        type=int,
        choices=(4, 6, 8),
        help="get the language model with so many bits: it is converted while it arrives, and at most three of its files "
        "lie on the disk at one time, beside the copy; it then runs with these bits alone",
    )

    p = add(commands.convert, running=False)
    p.add_argument("model", metavar="source", type=FilePath, help="a model folder, or a hub id")
    p.add_argument("destination", type=FilePath, help="the folder to make")
    p.add_argument(
        "--bits",
        type=int,
        choices=(4, 6, 8, 16),
        default=8,
        help="of the experts; all else has at least 8 (default: 8)",
    )
    p.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), default=64, help="weights that share a scale (default: 64)"
    )

    p.add_argument(
        "--decoder-bits",
        type=int,
        choices=(8, 16),
        default=16,
        help="8: the decoders take half the memory, and run in MLX alone (default: 16, as they are)",
    )

    add(commands.info)
    p = add(commands.doctor, running=False)
    p.add_argument("--device", help="where PyTorch runs: mps, cuda or cpu; the first that there is if left out")
    p.add_argument(
        "--models",
        metavar="FOLDER",
        type=FilePath,
        action="append",
        default=[],
        help="a folder with models in it, such as ComfyUI's models/llada2; may be given several times",
    )
    p.add_argument("--json", action="store_true", help="print the same as JSON")
    p = add(commands.bench, decoding, in_engine)
    p.set_defaults(seed=0)
    p.add_argument("--size", type=int, default=0, help="side of the picture in pixels; 0: the model's own, 512 at most")
    p.add_argument("--runs", type=int, default=3, help="how often a stage of seconds is run (default: 3)")
    p.add_argument("--json", metavar="FILE", type=FilePath, help="also write the figures to this .json file")
    add(commands.demo).add_argument("folder", nargs="?", type=FilePath, default="demo")
    return parser


if __name__ == "__main__":
    sys.exit(main())
