"""A few kills of each kind of work, so that the command keeps working; ``make kills`` does many."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from reliability.kills import DecoderCopying, Work, torment, works


@pytest.fixture(scope="module")
def all_works(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Work]]:
    with ExitStack() as stack:
        yield {work.name: work for work in works(tmp_path_factory.mktemp("works"), stack)}


@pytest.mark.parametrize("name", ["download", "conversion while downloading", "conversion", "saving a grid", "a story"])
def test_killed_anywhere_the_next_run_is_right(all_works: dict[str, Work], tmp_path: Path, name: str) -> None:
    score = torment(all_works[name], tmp_path, 1, random.Random(name))
    assert score.kills and not score.problems, score.problems


def test_killed_at_its_first_changes_a_decoder_copy_is_made(tmp_path: Path) -> None:
    """Before the copy's folder says what it is, it has nothing but what the killed run was writing."""
    score = torment(DecoderCopying(), tmp_path, 0, random.Random(0), at=(3, 4, 5))
    assert score.kills == 3 and not score.problems, score.problems
