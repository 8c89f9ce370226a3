"""Sets of pictures inside a real ComfyUI: joining, asking about and editing several."""

from __future__ import annotations

import pytest
from client import Comfy, Run, workflow
from layouts import DRAWN, seen_in
from PIL import Image

from llada2_mlx.shapes.world import Background, Colour, Kind, Pattern, Place, Tone

ASK, REFER = "ask_about_two_pictures", "edit_with_a_reference"


def ran(run: Run) -> Run:
    assert run.error is None, run.error
    return run


def failed(run: Run, node: str) -> str:
    assert run.error and run.error["node_id"] == node, run.error
    return run.error["exception_message"]


def set_of(count: int, *, side: int = 256, images: int = 1, purpose: str = "understand with others") -> dict:
    """A graph with a set of plain pictures: node 2, from the encoders 10, 11 ... 29."""
    prompt = {"1": {"class_type": "LoadLLaDA2Backbone", "inputs": {"model": "Shapes (built in)", "precision": "auto"}}}
    picture = {"width": side, "height": side, "batch_size": images}
    encoder = {"model": "the backbone's own", "purpose": purpose, "size": side, "backbone": ["1", 0]}
    joined = {}
    for number in range(count):
        one, two = str(10 + number), str(50 + number)
        prompt[two] = {"class_type": "EmptyImage", "inputs": picture | {"color": 1000 * number}}
        prompt[one] = {"class_type": "SigLIPVQEncode", "inputs": encoder | {"image": [two, 0]}}
        joined[f"pictures.picture{number + 1}"] = [one, 0]
    return prompt | {"2": {"class_type": "LLaDA2JoinVQ", "inputs": joined}}


def asked(prompt: dict, max_new_tokens: int = 8, **inputs: object) -> dict:
    """The graph with a question about its set: nodes 3 and 4."""
    asking = workflow(ASK)["9"]["inputs"] | {"backbone": ["1", 0], "vq": ["2", 0], "steps": 2} | inputs
    asking["max_new_tokens"] = max_new_tokens
    return prompt | {
        "3": {"class_type": "LLaDA2Understand", "inputs": asking},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
    }


def edited(prompt: dict, **inputs: object) -> dict:
    """The graph with an edit of its set, as a picture: nodes 3, 4 and 5."""
    edit = workflow("edit_a_picture")["5"]["inputs"] | {"backbone": ["1", 0], "vq": ["2", 0], "steps": 1} | inputs
    decode = workflow("text_to_image")["3"]["inputs"] | {"vq": ["3", 0], "decoder.steps": 2}
    return prompt | {
        "3": {"class_type": "LLaDA2Edit", "inputs": edit},
        "4": {"class_type": "ZImageDecode", "inputs": decode},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "llada2/set"}},
    }


def told(run: Run, node: str) -> str:
    return "\n".join(text for name, text in run.texts if name == node)


def test_a_set_is_one_question_and_a_batch_is_many(comfy: Comfy) -> None:
    run = ran(comfy.run(asked(set_of(3, side=128))))
    assert len(run.outputs["4"]["text"]) == 1
    prompt = asked(set_of(1, side=128, images=2))
    run = ran(comfy.run(prompt))  # a batch that was joined is a set too
    assert len(run.outputs["4"]["text"]) == 1
    prompt["3"]["inputs"]["vq"] = ["10", 0]
    run = ran(comfy.run(prompt))
    assert len(run.outputs["4"]["text"]) == 2


def test_the_shipped_question_is_about_both_pictures(comfy: Comfy) -> None:
    run = ran(comfy.run(workflow(ASK)))
    assert run.outputs["10"]["text"] == ["the first"]
    # every position of both pictures is read: another order is another question
    joined = workflow(ASK)["8"]["inputs"]
    swapped = {"pictures.picture1": joined["pictures.picture2"], "pictures.picture2": joined["pictures.picture1"]}
    again = ran(comfy.run(workflow(ASK, **{"8": swapped})))
    assert {"8", "9"} <= set(again.executed) and "4" in again.cached
    assert again.outputs["10"]["text"] == ["the second"]


def test_the_shipped_edit_takes_the_background_of_the_first_picture_and_keeps_the_shapes_of_the_second(
    comfy: Comfy,
) -> None:
    run = ran(comfy.run(workflow(REFER)))
    first, second, result = (seen_in(comfy.image(run, node)) for node in ("12", "13", "11"))
    assert first and second and result
    assert first.layout() == {(Kind.RING, Colour.GREEN, Place.TOP_RIGHT)} and second.layout() == DRAWN
    assert first.background == Background(Pattern.STRIPED, Tone.SKY) != second.background
    assert (result.layout(), result.background) == (DRAWN, first.background)


def test_an_edit_has_the_size_of_its_source(comfy: Comfy) -> None:
    prompt = set_of(3, side=128, purpose="edit")
    prompt["11"]["inputs"]["size"] = 256
    sizes = []
    for source in (0, 2):
        (path,) = comfy.images(ran(comfy.run(edited(prompt, source=source))))
        with Image.open(path) as image:
            sizes.append(image.size)
    assert sizes == [(256, 256), (512, 512)]
    assert "Picture 4 is asked for, and the set has 3. Choose 1 to 3" in failed(
        comfy.run(edited(prompt, source=4)), "3"
    )
    prompt["2"] = prompt["10"]  # no set
    assert "source is 1: it chooses a picture of a set" in failed(comfy.run(edited(prompt, source=1)), "3")


def test_a_set_of_nothing(comfy: Comfy) -> None:
    assert "Required input is missing" in comfy.refused(asked(set_of(0)))


def test_a_set_is_no_picture_to_decode(comfy: Comfy) -> None:
    decode = {"class_type": "ZImageDecode", "inputs": workflow("text_to_image")["3"]["inputs"] | {"vq": ["2", 0]}}
    preview = {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}
    assert "LLADA2_VQ_SET" in comfy.refused(set_of(2) | {"3": decode, "4": preview})


def test_a_set_of_twenty(comfy: Comfy) -> None:
    """The limit is the context: 20 pictures of 256 codes fit, and 20 of 1,024 do not."""
    ran(comfy.run(asked(set_of(20, side=256))))
    run = comfy.run(asked(set_of(20, side=512)))
    said = failed(run, "3")
    assert "The request is too long" in said and "The 20 pictures alone have 20480 codes: take fewer" in said
    assert not [event for event in run.progress if event["node"] == "3"]


@pytest.mark.parametrize("stranger", [10, 11])
def test_a_set_of_two_models_is_refused_before_anything_is_encoded(comfy: Comfy, stranger: int) -> None:
    prompt = asked(set_of(2))
    prompt[str(stranger)]["inputs"]["model"] = "golden"
    run = comfy.run(prompt)
    assert "The codes are of the model golden, and shapes has another codebook" in failed(run, "3")
    assert not {"10", "11"} & set(run.executed)


def test_a_set_of_two_models_is_refused_where_it_is_joined(comfy: Comfy) -> None:
    prompt = set_of(2)
    prompt["11"]["inputs"]["model"] = "golden"
    prompt["3"] = {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}
    said = failed(comfy.run(prompt), "2")
    assert "picture 1 is of Shapes (built in), picture 2 of golden. Encode all of them with the same model." in said


def test_a_size_or_a_purpose_that_does_not_fit_is_warned_of_in_a_set_too(comfy: Comfy) -> None:
    prompt = asked(set_of(2))
    prompt["11"]["inputs"]["size"] = 128
    assert "Picture 2 of 2: This model was made for understanding at 256 x 256" in told(ran(comfy.run(prompt)), "3")
    prompt["11"]["inputs"] |= {"size": 256, "purpose": "edit"}
    assert "Picture 2 of 2: These codes were made for editing" in told(ran(comfy.run(prompt)), "3")
    assert "Picture" not in told(ran(comfy.run(asked(set_of(2), max_new_tokens=9))), "3")


def test_the_purpose_of_a_picture_among_others(comfy: Comfy) -> None:
    """Without a size of the model's own, at most 448 x 448 of area."""
    prompt = set_of(1, side=900)
    prompt["10"]["inputs"] |= {"model": "golden", "size": 0}
    prompt["3"] = {"class_type": "PreviewAny", "inputs": {"source": ["10", 0]}}
    assert "28 x 28 codes" in str(ran(comfy.run(prompt)).outputs["3"]["text"])
    prompt["10"]["inputs"]["purpose"] = "understand"
    assert "50 x 50 codes" in str(ran(comfy.run(prompt)).outputs["3"]["text"])
