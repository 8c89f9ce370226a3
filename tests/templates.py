"""The templates. A file's name is the title that the browser of templates shows: ``LLaDA2 04 Edit a picture``.

The number is its place in the order of learning. Its graph in the API's form has a short name, ``edit_a_picture``; a
template that opens as an app (``.app``) is another view of a graph that has one.
"""

from __future__ import annotations

import re
from pathlib import Path

WORKFLOWS = Path(__file__).parent.parent / "workflows"
TITLE = re.compile(r"LLaDA2 (?P<number>\d\d) (?P<what>[A-Z][A-Za-z ]+?)(?P<app>\.app)?")


def graph_name(title: str) -> str:
    """The name of a template's graph in the API's form."""
    found = TITLE.fullmatch(title)
    assert found, f"{title!r} is no title of a template"
    return found["what"].lower().replace(" ", "_")


# title -> name of its graph, in the order of learning
TEMPLATES = {path.stem: graph_name(path.stem) for path in sorted(WORKFLOWS.glob("*.json"))}
