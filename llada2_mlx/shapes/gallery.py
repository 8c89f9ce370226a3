"""What the built-in model can do, as a page to look at: pictures for prompts, answers to questions, edits."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .studio import Studio

PROMPTS = (
    "A large red circle in the top left and a small blue star in the bottom right, on a plain white background",
    "A green triangle in the top right, an orange ring in the bottom left and a black square in the bottom right, on light blue stripes",
    "A purple star at the top left and a yellow ring at the top right on a grey gradient",
    "Draw a pink square in the bottom left corner, on beige stripes",
)
QUESTIONS = (
    (0, "What is in the picture?"),
    (1, "How many shapes are there?"),
    (1, "What colour is the ring?"),
    (2, "Where is the star?"),
    (3, "What colour is the square?"),
)
EDITS = (
    (0, "Change the colour of the circle to yellow."),
    (0, "Paint the star purple."),
    (0, "Change the background to grey stripes."),
    (0, "Put it on a light blue gradient."),
)
_TILE, _MARGIN, _TEXT, _LINES = 256, 12, 18, 4


def make(folder: Path, studio: Studio, say: Callable[[str], None] = print) -> None:
    """Write ``folder/gallery.html`` with its pictures, and the same in one picture, ``gallery.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[list[tuple[Image.Image, str]]] = []
    drawn = []
    for prompt in PROMPTS:
        say(f"drawing: {prompt}")
        drawn.append(studio.draw(prompt))
    rows.append(list(zip(drawn, PROMPTS, strict=True)))
    answered: dict[int, list[str]] = {}
    for index, question in QUESTIONS:
        answer = studio.ask(drawn[index], question)
        say(f"asking: {question} {answer}")
        answered.setdefault(index, []).append(f"{question} {answer}")
    rows.append([(drawn[index], "\n".join(lines)) for index, lines in answered.items()])
    for index, instruction in EDITS:
        say(f"editing: {instruction}")
        edited = studio.edit(drawn[index], instruction)
        rows.append([(drawn[index], "before"), (edited, instruction)])
    rows[2:] = [rows[start] + (rows[start + 1] if start + 1 < len(rows) else []) for start in range(2, len(rows), 2)]
    _sheet(rows).save(folder / "gallery.png")
    (folder / "gallery.html").write_text(_page(folder, rows), encoding="utf-8")
    say(f"written: {folder / 'gallery.html'} and {folder / 'gallery.png'}")


def _sheet(rows: list[list[tuple[Image.Image, str]]]) -> Image.Image:
    """All rows of pictures in one, each picture over its text."""
    font = ImageFont.load_default(size=_TEXT - 4)
    width = max(map(len, rows)) * (_TILE + _MARGIN) + _MARGIN
    height = _TILE + 2 * _MARGIN + _TEXT * _LINES
    sheet = Image.new("RGB", (width, len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for top, row in enumerate(rows):
        for left, (picture, text) in enumerate(row):
            corner = _MARGIN + left * (_TILE + _MARGIN), _MARGIN + top * height
            sheet.paste(picture.resize((_TILE, _TILE)), corner)
            lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 38)]
            pen.text((corner[0], corner[1] + _TILE + 4), "\n".join(lines[:_LINES]), fill="black", font=font)
    return sheet


def _page(folder: Path, rows: list[list[tuple[Image.Image, str]]]) -> str:
    """The page, its pictures written beside it."""
    body = []
    for top, row in enumerate(rows):
        body.append("<section>")
        for left, (picture, text) in enumerate(row):
            name = f"{top + 1}-{left + 1}.png"
            picture.save(folder / name)
            caption = "<br>".join(escape(line) for line in text.splitlines())
            body.append(f'<figure><img src="{name}" width="256"><figcaption>{caption}</figcaption></figure>')
        body.append("</section>")
    style = "body{font:16px sans-serif;margin:2em} section{display:flex;gap:1em;flex-wrap:wrap} figure{margin:0;width:256px}"
    return (
        f"<!doctype html><meta charset=utf-8><title>Shapes</title><style>{style}</style><h1>Shapes</h1>\n"
        + "\n".join(body)
    )
