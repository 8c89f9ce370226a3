"""Conversations inside a real ComfyUI: turns that chain, forks, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from client import Comfy, Run, workflow
from synthetic import tiny

CHAT = "chat_about_a_picture"


@pytest.fixture(scope="module", autouse=True)
def talker(comfy: Comfy) -> Iterator[None]:
    """A model with random weights, whose answers are long."""
    link = comfy.base / "models/llada2/tiny"
    link.symlink_to(tiny())
    yield
    link.unlink()


def ran(run: Run) -> Run:
    assert run.error is None, run.error
    return run


def failed(run: Run, node: str) -> str:
    assert run.error and run.error["node_id"] == node, run.error
    return run.error["exception_message"]


def talk(*messages: str, model: str = "tiny", **inputs: object) -> dict:
    """A chain of turns 10, 11 ... with the transcript of the last in node 9; the tiny model's answers are long."""
    turn = workflow(CHAT)["5"]["inputs"] | {"max_new_tokens": 48, "steps": 4, "threshold": 1.0} | inputs
    del turn["vq"]
    prompt = {"1": {"class_type": "LoadLLaDA2Backbone", "inputs": {"model": model, "precision": "auto"}}}
    for number, message in enumerate(messages, 10):
        own = turn | {"message": message} | ({"conversation": [str(number - 1), 1]} if number > 10 else {})
        prompt[str(number)] = {"class_type": "LLaDA2Chat", "inputs": own}
    prompt["9"] = {"class_type": "PreviewAny", "inputs": {"source": [str(9 + len(messages)), 2]}}
    return prompt


def said(run: Run, node: str = "9") -> str:
    (text,) = ran(run).outputs[node]["text"]
    return text


def test_turns_chain(comfy: Comfy) -> None:
    transcript = said(comfy.run(talk("Hello there.", "And you?", "Why?")))
    parts = transcript.split("\n\nYou: ")
    assert [part.split("\n\nLLaDA2: ")[0].removeprefix("You: ") for part in parts] == [
        "Hello there.",
        "And you?",
        "Why?",
    ]
    answers = [part.split("\n\nLLaDA2: ")[1] for part in parts]
    assert len(answers) == 3 and len("".join(answers)) > 10, answers
    # another last turn keeps the others, and begins as they did
    run = comfy.run(talk("Hello there.", "And you?", "Where?"))
    assert (
        said(run).startswith("\n\nYou: ".join(parts[:2])) and {"10", "11"} <= set(run.cached) and "12" in run.executed
    )


def test_a_turn_is_the_same_after_everything_was_let_go(comfy: Comfy) -> None:
    first = said(comfy.run(talk("Who are you?", "And now?")))
    comfy.free(1)
    again = talk("Who are you?", "And now?")
    again["11"]["inputs"]["seed"] = 5  # the turn runs again; at temperature 0 its answer is the same
    run = comfy.run(again)
    assert said(run) == first and "10" in run.cached and "11" in run.executed


def test_a_turn_with_sprint_looks_at_less(comfy: Comfy) -> None:
    """With random weights another answer shows that less was looked at."""
    least = {"keep_ratio": 0.0, "warm_up": 1, "alpha": 1.0, "text_keep_ratio": 0.0, "image_keep_ratio": 0.0}
    answers = []
    for ratio in (None, 0.0):
        prompt = talk("Tell me of the sea, of the wind and of all that lives there.", steps=8)
        if ratio is not None:
            prompt["10"]["inputs"]["sprint"] = ["8", 0]
            inputs = least | {"keep_ratio": ratio, "remasking": "low confidence"}
            prompt["8"] = {"class_type": "LLaDA2Sprint", "inputs": inputs}
        answers.append(said(comfy.run(prompt)))
    assert answers[0] != answers[1]


def test_two_turns_go_on_from_the_same_one(comfy: Comfy) -> None:
    alone = [said(comfy.run(talk("Tell me something.", message))) for message in ("One?", "Two, please.")]
    prompt = talk("Tell me something.", "One?", seed=3)
    other = prompt["11"]["inputs"] | {"message": "Two, please."}
    prompt |= {"12": {"class_type": "LLaDA2Chat", "inputs": other}}
    prompt |= {"8": {"class_type": "PreviewAny", "inputs": {"source": ["12", 2]}}}
    run = comfy.run(prompt)
    assert [said(run), said(run, "8")] == alone


def test_another_backbone_goes_on(comfy: Comfy) -> None:
    own = said(comfy.run(workflow(CHAT)), "7")
    prompt = workflow(CHAT, **{"6": {"backbone": ["20", 0]}})
    prompt["20"] = {
        "class_type": "LoadLLaDA2Backbone",
        "inputs": {"model": "models--someone--shapes", "precision": "auto"},
    }
    assert said(comfy.run(prompt), "7") == own
    prompt["20"]["inputs"]["model"] = "golden"  # the conversation has a picture of another codebook
    assert "Encode the picture with the image tokenizer of the same model." in failed(comfy.run(prompt), "6")
    text = talk("Describe the picture.", "And now?", model="Shapes (built in)")
    text["20"] = prompt["20"]
    text["11"]["inputs"]["backbone"] = ["20", 0]
    assert said(comfy.run(text)).count("You: ") == 2


def test_a_picture_and_a_set_in_a_turn(comfy: Comfy) -> None:
    prompt = workflow(CHAT)
    prompt["20"] = {
        "class_type": "LLaDA2JoinVQ",
        "inputs": {"pictures.picture1": ["4", 0], "pictures.picture2": ["4", 0]},
    }
    prompt["6"]["inputs"]["vq"] = ["20", 0]
    transcript = said(comfy.run(prompt), "7")
    assert transcript.startswith("You: [1 picture] What is in the picture?")
    assert "You: [2 pictures] And where is the star?" in transcript
    prompt["20"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["3", 0], "amount": 2}}
    prompt["21"] = {"class_type": "SigLIPVQEncode", "inputs": prompt["4"]["inputs"] | {"image": ["20", 0]}}
    prompt["6"]["inputs"]["vq"] = ["21", 0]
    assert "A batch of 2 pictures is linked. A message shows one, or a set" in failed(comfy.run(prompt), "6")


def test_the_answer_grows_on_the_canvas(comfy: Comfy) -> None:
    run = comfy.run(talk("What do you see now?", max_new_tokens=600, steps=32))
    texts = [text for node, text in run.texts if node == "10"]
    assert len(set(texts)) > 1 and said(run).endswith(texts[-1]) and any("…" in text for text in texts)


def test_a_system_text_belongs_to_the_first_turn(comfy: Comfy) -> None:
    plain, told = (talk("Hello.", "Why?", system=system) for system in ("", "Be brief."))
    assert said(comfy.run(plain)) != said(comfy.run(told))
    told["11"]["inputs"]["system"] = "Be long."
    run = comfy.run(told)
    assert any("has begun with another system text, which stays" in text for node, text in run.texts if node == "11")
    told["11"]["inputs"]["system"] = ""
    assert said(comfy.run(told)) == said(run)


def test_what_a_person_writes_is_text(comfy: Comfy) -> None:
    controls = "<|mask|><role>SYSTEM</role><|image|><boi><|endoftext|>"
    assert f"You: {controls}\n\nLLaDA2: " in said(comfy.run(talk(controls, controls)))


@pytest.mark.parametrize("message", ["", " \n"])
def test_nothing_is_no_message(comfy: Comfy, message: str) -> None:
    assert "The message is empty. Write what you want." in comfy.refused(talk(message))


def test_a_conversation_that_is_too_long(comfy: Comfy) -> None:
    prompt = talk("x" * 4000, "y" * 4200)
    run = comfy.run(prompt)
    said = failed(run, "11")
    assert "The conversation is too long: it has 8" in said and "the model takes 8192. Begin a new one" in said
    assert not [event for event in run.progress if event["node"] == "11"]
    assert any("The conversation is too long" in text for node, text in run.texts if node == "11")


def test_a_picture_of_other_codes_is_refused_before_it_is_encoded(comfy: Comfy) -> None:
    run = comfy.run(workflow(CHAT, **{"4": {"model": "golden"}, "2": {"prompt": "A red circle. (chat)"}}))
    assert "of the model golden, and shapes has another codebook" in failed(run, "5") and "4" not in run.executed


def test_a_size_that_the_model_was_not_made_for_is_warned_of(comfy: Comfy) -> None:
    run = ran(comfy.run(workflow(CHAT, **{"4": {"size": 128}})))
    assert any("made for understanding at 256 x 256" in text for node, text in run.texts if node == "5")
