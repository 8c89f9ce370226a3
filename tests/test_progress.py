"""What is shown, and how often."""

from __future__ import annotations

from llada2_mlx.progress import Pace


def test_what_is_shown_keeps_its_pace() -> None:
    now = [0.0]
    pace, shown = Pace(0.125, lambda: now[0]), []
    for step in range(300):
        now[0] = step / 100
        if pace.due(at_once=step == 150):
            shown.append(step)
    assert shown[:3] == [0, 13, 26] and 150 in shown
    assert all(later - earlier >= 13 for earlier, later in zip(shown, shown[1:], strict=False) if later != 150)
    assert max(sum(begin <= step < begin + 100 for step in shown) for begin in range(200)) <= 10
