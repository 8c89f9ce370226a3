"""What ``llada2-mlx demo`` makes, made once for all tests that look at it."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from html import unescape
from pathlib import Path

from PIL import Image

from llada2_mlx import cli


@dataclass(frozen=True)
class Demo:
    """The folder, what the command said and its status."""

    folder: Path
    said: str
    status: int

    def picture(self, caption: str) -> Image.Image:
        """The picture that the page shows over a caption."""
        page = (self.folder / "gallery.html").read_text(encoding="utf-8")
        figures = re.findall(r'<img src="([^"]+)"[^>]*><figcaption>(.*?)</figcaption>', page)
        (name,) = [name for name, text in figures if unescape(text) == caption]
        with Image.open(self.folder / name) as picture:
            return picture.convert("RGB")


def make(folder: Path) -> Demo:
    """Run the command as a user does."""
    with redirect_stdout(io.StringIO()) as said:
        status = cli.main(["demo", str(folder)])
    return Demo(folder, said.getvalue(), status)
