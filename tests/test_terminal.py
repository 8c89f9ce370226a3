"""``llada2-mlx chat``, with lines from a pipe and at a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pictures import noise
from PIL import Image
from synthetic import tiny

from llada2_mlx import chat, cli, commands
from llada2_mlx.progress import Progress
from llada2_mlx.terminal import _shows, _Written
from llada2_mlx.vq import GridSet, VQGrid

QUICK = ("--max-new-tokens", "24", "--steps", "2")


@pytest.fixture
def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Say some lines, with a tiny model: exit status, stdout, stderr, and the arguments of every reply."""
    monkeypatch.chdir(tmp_path)
    for module in (cli, commands):
        monkeypatch.setattr(module, "BUILT_IN", tiny())
    noise(300, 200).save("one.png")
    Image.new("RGB", (900, 800), "red").save("the second.png")
    Path("text.png").write_text("no picture")
    calls, reply = [], chat.reply
    monkeypatch.setattr(chat, "reply", lambda *words, **options: calls.append(words[1:]) or reply(*words, **options))

    def talk(lines: str, *words: str) -> tuple[int, str, str, list]:
        calls.clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status = cli.main(["chat", *QUICK, *words])
        return status, *capsys.readouterr(), list(calls)

    return talk


def test_a_conversation_in_a_pipe(talk) -> None:
    status, out, err, calls = talk("Who are you?\n\n   \nWhere?\n", "--system", "Be brief.")
    assert (status, err) == (0, "")
    (before, first, _), (conversation, second, _) = calls
    assert (first, second, before.turns, before.system) == ("Who are you?", "Where?", (), "Be brief.")
    (turn,) = conversation.turns
    assert turn.text == "Who are you?" and turn.answer and conversation.system == "Be brief."
    shown = "".join(character for character in turn.answer if character >= " " or character in "\n\t")
    assert out.startswith(f"{shown}\n") and len(out) > len(shown) + 1


def test_sprint_is_used_in_every_turn(talk, monkeypatch: pytest.MonkeyPatch) -> None:
    used, reply = [], chat.reply
    monkeypatch.setattr(
        chat, "reply", lambda *words, sprint, **rest: used.append(sprint) or reply(*words, sprint=sprint, **rest)
    )
    assert talk("Who?\nWhere?\n", "--sprint", "--keep-ratio", "0.3", "--warm-up", "1")[0] == 0
    assert [(each.keep_ratio, each.warm_up) for each in used] == [(0.3, 1)] * 2
    assert talk("Who?\n")[0] == 0 and used[-1] is None


def test_pictures_are_shown_with_what_is_said_next(talk) -> None:
    lines = "/image one.png\nWhat is it?\nAnd?\n/image one.png\n/image 'the second.png'\nWhich?\n"
    status, _, err, calls = talk(lines)
    assert (status, err) == (0, "")
    one, none, both = (pictures for _, _, pictures in calls)
    assert isinstance(one, VQGrid) and (one.height, one.width) == (12, 18) and none is None
    assert isinstance(both, GridSet) and [(each.height, each.width) for each in both.grids] == [(12, 18), (26, 28)]
    calls = talk("What is it?\n", "--image", "the second.png")[3]
    assert (calls[0][2].height, calls[0][2].width) == (46, 52)


def test_reset_begins_anew_and_exit_ends(talk) -> None:
    status, _, err, calls = talk("One\n/image one.png\n/reset\nTwo\n/exit\nThree\n", "--system", "Be brief.")
    assert status == 0 and err == "(a new conversation)\n"
    assert [(said, pictures) for _, said, pictures in calls] == [("One", None), ("Two", None)]
    assert calls[1][0] == chat.Conversation("Be brief.")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/image gone.png", "There is no picture gone.png."),
        ("/image text.png", "text.png cannot be read as a picture"),
        ("/image", "/image is no command. The commands are:\n/image FILE"),
        ("/dance wildly", "/dance wildly is no command."),
        ("/image 'half", "There is no picture 'half."),
        ("x" * 9000, "The conversation is too long"),
        ("a\udcff", "The text cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(talk, line: str, sentence: str) -> None:
    status, out, err, calls = talk(f"{line}\n/help\nAre you there?\n")
    assert status == 1 and f"llada2-mlx: {sentence}" in err and "Ctrl-C ends an answer" in err
    assert calls[-1][1:] == ("Are you there?", None) and calls[-1][0].turns == () and out.strip()


def test_a_slash_may_begin_a_message(talk) -> None:
    assert talk(" /image is what?\n")[3][0][1] == " /image is what?"


def test_a_picture_that_is_missing_is_said_at_once(talk) -> None:
    status, _, err, calls = talk("Hello\n", "--image", "gone.png")
    assert status == 1 and err == "llada2-mlx: There is no picture gone.png.\n" and not calls


def test_control_characters_of_an_answer_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    written = _Written()
    written.grow("a\x1b[2J\x07b")
    written.grow("a\x1b[2J\x07b\tc\n猫")
    written.end()
    assert capsys.readouterr().out == "a[2Jb\tc\n猫\n"


@pytest.mark.parametrize("steps", [3, 0])
def test_what_was_written_before_an_interrupt_is_the_answer(talk, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    show, left = commands._Bars.__call__, [steps]

    def interrupt(bars: commands._Bars, progress: Progress) -> None:
        show(bars, progress)
        if progress.phase == "denoising":
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt

    monkeypatch.setattr(commands._Bars, "__call__", interrupt)
    status, out, err, calls = talk("Who are you?\nAnd now?\n", "--max-new-tokens", "100")
    assert status == 0 and len(calls) == 2
    if not steps:
        assert "stopped before there was an answer" in err and calls[1][0] == chat.Conversation()
        return
    (turn,) = calls[1][0].turns
    assert "(stopped)" in err and turn.text == "Who are you?" and 0 < len(turn.ids) < 90
    assert out.startswith("".join(filter(_shows, turn.answer)))


def test_an_interrupt_while_a_picture_is_encoded(talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_codes", interrupt)
    status, _, err, calls = talk("/image one.png\nWhat is it?\nAnd without it?\n")
    assert status == 0 and "(stopped)" in err
    assert [(said, pictures) for _, said, pictures in calls] == [("And without it?", None)]


SLOW = ("--model", str(tiny()), "--steps", "32", "--threshold", "1", "--max-new-tokens", "6000")


def test_an_interrupt_ends_the_answer_and_not_the_program() -> None:
    words = [sys.executable, "-m", "llada2_mlx.cli", "chat", *SLOW]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, bufsize=0, **pipes) as process:
        try:
            process.stdin.write(b"Who are you? What can you do?\n")
            begun = b""
            while len(begun) < 20:  # it arrives as it is written, not all at the end
                begun += process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            said = process.stderr.readline()
            while b"(stopped)" not in said:
                assert said, "the program ended"
                said = process.stderr.readline()
            process.stdin.write(b"/image gone.png\n/exit\n")
            rest, err = process.communicate(timeout=60)
            assert process.returncode == 1 and b"There is no picture gone.png" in err
        finally:
            process.kill()  # the end of ``with`` waits for it


def test_at_a_terminal() -> None:
    """Ctrl-C in an answer, Ctrl-C at the prompt, and Ctrl-D to leave."""
    parent, child = pty.openpty()
    words = [sys.executable, "-m", "llada2_mlx.cli", "chat", *SLOW]
    environment = os.environ | {"TERM": "dumb"}
    process = subprocess.Popen(
        words,
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
        env=environment,
        preexec_fn=_own_terminal,
    )
    os.close(child)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([parent], [], [], 1)[0]:
                seen += os.read(parent, 1000).decode(errors="replace")
        seen = seen[seen.index(text) + len(text) :]

    try:
        until("Say something, or /help.")
        until("> ")
        os.write(parent, b"Who are you?\n")
        until("Who are you?\r\n")
        deadline = time.monotonic() + 60
        while len(seen) < 20 and time.monotonic() < deadline:
            seen += os.read(parent, 100).decode(errors="replace")
        os.write(parent, b"\x03")
        until("(stopped)")
        until("> ")
        time.sleep(1)  # the prompt stands there a moment before lines are read
        os.write(parent, b"\x03")
        until("(/exit or Ctrl-D leaves)")
        until("> ")
        os.write(parent, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
