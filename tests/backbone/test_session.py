"""What has been written is continued, trimmed, forked and joined, and nothing of it is computed twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.denoising import Draft, Generation, Method, Vocabulary, generate
from llada2_mlx.backbone.guidance import Guidance
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.session import Session

SAMPLING = Sampling(steps=4, threshold=1.0)
SIMPLE = Guidance.simple(2.0)


def ids(count: int, seed: int = 0) -> list[int]:
    """Random text ids below the golden tokenizer's special ones."""
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


@pytest.fixture
def image(backbone: Backbone) -> Vocabulary:
    return Vocabulary(backbone.tokens.mask, first=backbone.config.image_token_offset)


@pytest.fixture
def write(backbone: Backbone, image: Vocabulary):
    """Write some codes after what the branches go on with."""

    def write(branches, length: int, session: Session | None = None, guidance=Guidance(), **options) -> Generation:
        draft = Draft.blank(branches, length, backbone.tokens.mask)
        return backbone.run(generate, draft, image, SAMPLING, guidance, session=session, keep=True, **options)

    return write


@pytest.mark.parametrize("method", [Method.CACHED, Method.RECOMPUTE, Method.PLAIN])
@pytest.mark.parametrize(
    ("prompt", "first", "more"), [(40, 24, 0), (40, 30, 0), (33, 64, 19), (70, 5, 50), (64, 32, 32)]
)
def test_a_session_goes_on_as_if_all_had_been_the_prompt(
    write, method: Method, prompt: int, first: int, more: int
) -> None:
    began = write((ids(prompt),), first, method=method)
    between = ids(more, 5)
    continued = write((between,), 40, began.session, method=method)
    anew = write(([*ids(prompt), *began.ids, *between],), 40, method=method)
    assert continued.ids == anew.ids
    assert continued.session.ids.tolist() == anew.session.ids.tolist()


def test_what_is_final_is_not_computed_again(write) -> None:
    began = write((ids(320),), 64)
    assert began.session.final == 352 and len(began.session) == 384  # the last block is final when another follows
    report = write(([],), 32, began.session).report
    assert report.positions == 64 + 3 * 32  # that block along with the first step
    assert write(([*ids(320), *began.ids],), 32).report.positions == 384 + 4 * 32


def test_a_session_of_several_branches_goes_on(write) -> None:
    began = write((ids(45, 1), ids(30, 2)), 51, guidance=SIMPLE)
    more = ids(9, 3)
    continued = write((more, more), 40, began.session, SIMPLE)
    anew = write(([*ids(45, 1), *began.ids, *more], [*ids(30, 2), *began.ids, *more]), 40, guidance=SIMPLE)
    assert continued.ids == anew.ids and continued.report.positions < anew.report.positions


@pytest.mark.parametrize("length", [100, 96, 70, 64, 31, 0])
def test_a_trimmed_session_has_forgotten_what_came_after(write, length: int) -> None:
    session = write((ids(60),), 60).session
    kept = session.ids[0, :length].tolist()
    session.trim(length)
    assert len(session) == length and session.final == min(96, length // 32 * 32)
    assert write((ids(20, 9),), 33, session).ids == write(([*kept, *ids(20, 9)],), 33).ids


def test_a_fork_goes_its_own_way(write) -> None:
    began = write((ids(50),), 46).session
    written = began.ids[0].tolist()
    other = began.fork()
    one, two = write((ids(16, 1),), 40, began), write((ids(16, 2),), 40, other)
    assert one.ids == write(([*written, *ids(16, 1)],), 40).ids
    assert two.ids == write(([*written, *ids(16, 2)],), 40).ids


def test_some_branches_of_a_session_and_joining_them_again(write) -> None:
    both = write((ids(45, 1), ids(30, 2)), 51, guidance=SIMPLE)
    first, second = both.session.fork([0]), both.session.fork([1])
    assert (first.begins, second.begins) == ((0,), (15,))
    alone = write((ids(8, 3),), 40, first.fork())
    assert alone.ids == write(([*ids(45, 1), *both.ids, *ids(8, 3)],), 40).ids
    more = ids(8, 4)
    joined = write((more, more), 40, first.join(second), SIMPLE)
    apart = write((more, more), 40, both.session, SIMPLE)
    assert (joined.ids, joined.report.positions) == (apart.ids, apart.report.positions)
    again = write((ids(8, 3),), 40, second.join(first).fork([1, 0]).join(first).fork([2]))
    assert (again.ids, again.report.positions) == (alone.ids, alone.report.positions)


def test_a_fresh_branch_joins_one_that_has_written(write, backbone: Backbone) -> None:
    """As thinking needs it: text in one branch, then a picture in two."""
    thought = write((ids(70, 1),), 58).session
    without = write((ids(20, 2),), 8).session
    aligned = Session.begin((thought.ids[0], without.ids[0]), 32, len(thought.layers)).fork([1])
    joined = write(([], []), 40, thought.join(aligned), SIMPLE)
    anew = write((thought.fork().ids[0, :128].tolist(), without.ids[0].tolist()), 40, guidance=SIMPLE)
    assert joined.ids == anew.ids


def test_sessions_that_do_not_fit_are_refused(write) -> None:
    session, other = write((ids(40),), 24).session, write((ids(40),), 30).session
    with pytest.raises(ValueError, match="same position"):
        session.join(other)
    with pytest.raises(ValueError, match="branches do not fit"):
        write(([],), 8, session, SIMPLE)
    with pytest.raises(ValueError, match="another method"):
        write(([],), 8, session, method=Method.PLAIN)
    with pytest.raises(ValueError, match="equally many"):
        session.append(([1], [2]))
    with pytest.raises(ValueError, match="cannot be trimmed"):
        session.trim(65)


# --- drafts ---------------------------------------------------------------------------------------------------------


def test_only_blocks_with_a_mask_are_run(backbone: Backbone, image: Vocabulary) -> None:
    offset, mask = backbone.config.image_token_offset, backbone.tokens.mask
    kept = [offset + code for code in np.random.default_rng(7).integers(0, 128, 128).tolist()]
    body = kept[:40] + [mask] * 20 + kept[60:]  # of blocks 2 to 6 only 3 and 4 hold a mask
    draft = Draft((ids(70, 1), ids(40, 2)), tuple(body))
    for method in Method:
        done = backbone.run(generate, draft, image, Sampling(steps=4, threshold=1.0), SIMPLE, method=method)
        assert (done.report.blocks, done.report.steps) == (2, 4)  # 18 masks and 2, at most 8 a step
        assert done.ids[:40] == kept[:40] and done.ids[60:] == kept[60:]
        assert min(done.ids) >= offset
        if method is Method.CACHED:
            codes = done.ids
            assert done.report.positions == 2 * (128 + 2 * 32 + 64)  # what comes after the last mask is not even read
        assert done.ids == codes


def test_a_draft_without_masks_costs_nothing(backbone: Backbone, image: Vocabulary) -> None:
    body = tuple([backbone.config.image_token_offset] * 40)
    done = backbone.run(generate, Draft((ids(40),), body), image)
    assert (done.ids, done.report.steps, done.report.positions) == (list(body), 0, 0)


def test_kept_codes_are_seen_by_what_is_written(backbone: Backbone, image: Vocabulary) -> None:
    offset, mask = backbone.config.image_token_offset, backbone.tokens.mask
    run = lambda code: backbone.run(
        generate, Draft((ids(40),), (offset + code,) * 24 + (mask,) * 32), image, SAMPLING
    ).ids[24:]
    assert run(1) != run(2)
    assert (
        run(1) == backbone.run(generate, Draft.blank(([*ids(40), *[offset + 1] * 24],), 32, mask), image, SAMPLING).ids
    )


# --- vocabulary -----------------------------------------------------------------------------------------------------


def test_any_of_several_ends_ends_a_text(backbone: Backbone) -> None:
    mask = backbone.tokens.mask
    run = lambda ends: backbone.run(
        generate, Draft.blank((ids(40),), 64, mask), Vocabulary(mask, ends=frozenset(ends)), SAMPLING, keep=True
    )
    text = run(()).ids
    early, late = text[10], next(each for each in text[40:] if each not in text[:40])
    cut = text[: text.index(early) + 1]
    assert run((early, late)).ids == run((late, early)).ids == cut
    assert run((late,)).ids == text[: text.index(late) + 1]
    assert run((early,)).session.ids.tolist() == [[*ids(40), *cut]]


@pytest.mark.parametrize("method", Method)
def test_only_rows_of_the_vocabulary_are_chosen(backbone: Backbone, method: Method) -> None:
    vocabulary = Vocabulary(backbone.tokens.mask, first=20, stop=30)
    draft = Draft.blank((ids(40),), 40, backbone.tokens.mask)
    done = backbone.run(generate, draft, vocabulary, replace(SAMPLING, temperature=1.0), method=method)
    assert set(done.ids) <= set(range(20, 30)) and len(set(done.ids)) > 1
    if method is Method.CACHED:
        assert done.report.head_rows == 10 * done.report.steps
