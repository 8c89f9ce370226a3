"""What the graph says of a node's links before anything behind them has run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, product
from typing import TYPE_CHECKING, Any

from comfy_execution.graph_utils import ExecutionBlocker, is_link
from comfy_execution.utils import get_executing_context

from ...llada2_mlx.checkpoint.codebook import origin, require_one_codebook
from ...llada2_mlx.checkpoint.layout import Checkpoint
from ...llada2_mlx.errors import LLaDA2Error
from ...llada2_mlx.prompts import require_text
from .folders import CODES, checkpoint, is_hub_model, model_names
from .grids import LOADER, model_of_file

if TYPE_CHECKING:
    from comfy_execution.graph import DynamicPrompt

    from .memory import ManagedBackbone

JOIN = "LLaDA2JoinVQ"  # the node whose every input is used


def is_linked(graph: DynamicPrompt | None, name: str) -> bool:
    """Whether the running node has a link to its input ``name``."""
    return is_link(given(graph, name))


def models_behind(graph: DynamicPrompt | None, name: str) -> list[list[str]]:
    """The models whose codes or backbone can come over the link ``name`` of the running node, a list for each picture.

    A list has several where a node of somebody else's chooses between links, and none where the graph does not say.
    """
    if graph is None:
        return [[]]
    names, links = model_names(), [given(graph, name)]
    if name == "vq":
        links = list(_joined(graph, links[0]))
    return [list(dict.fromkeys(_models(graph, link, names, set()))) for link in links]


def given(graph: DynamicPrompt | None, name: str) -> Any:
    """An input of the running node as the graph has it; None where it has none."""
    context = get_executing_context()
    return None if graph is None or context is None else graph.get_node(context.node_id)["inputs"].get(name)


def listed(values: list) -> list | ExecutionBlocker:
    """A list for an output; where it is empty, what lets ComfyUI leave out the nodes behind it, which it would fail in."""
    return values or ExecutionBlocker(None)


def check_codes(graph: DynamicPrompt | None, model: str, check: Callable[[Checkpoint], object] | None = None) -> None:
    """Say before the codes behind the link ``vq`` are made that they cannot be used with ``model``.

    A hub model is not looked at, because that could take long.

    Args:
        model: a name, or "the codes' own".
        check: called with the checkpoint that is to be used.

    Raises:
        LLaDA2Error: what ``check`` raises, or the model has another codebook than every one that the codes can be of.
    """
    for makers in models_behind(graph, "vq"):
        used = makers if model == CODES else [model]
        if any(map(is_hub_model, (*used, *makers))):
            continue
        if check is not None:
            _require_any(lambda own=own: check(checkpoint(own)) for own in used)
        if model != CODES:
            _require_any(partial(_check_pair, maker, model) for maker in makers)


def wanted_picture(graph: DynamicPrompt | None, backbone: ManagedBackbone, vq: Any, text: str, what: str) -> list[str]:
    """For ``check_lazy_status`` of a node that does with a picture what a text says: the picture, unless it is there.

    Raises:
        LLaDA2Error: the text, which is called ``what``, is blank, or the picture's codes cannot be the backbone's.
    """
    if vq is not None:
        return []
    require_text(text, what)
    check_codes(graph, backbone.source)
    return ["vq"]


def check_one_codebook(graph: DynamicPrompt | None, one: str, other: str) -> None:
    """Say before the codes behind two links are made that they are of two codebooks, as far as the graph says it.

    Raises:
        LLaDA2Error: no model that can be behind the one link has the codebook of one behind the other.
    """
    names = model_names()
    pairs = list(product(*(list(_models(graph, given(graph, name), names, set())) for name in (one, other))))
    if not any(map(is_hub_model, chain(*pairs))):
        _require_any(partial(_check_pair, *pair) for pair in pairs)


def _check_pair(maker: str, model: str) -> None:
    require_one_codebook(origin(checkpoint(maker), maker), checkpoint(model))


def _joined(graph: DynamicPrompt, link: Any) -> Iterator[Any]:
    """The links behind a link to a node that joins pictures, all of which come over it; any other link is itself."""
    if is_link(link) and graph.has_node(link[0]) and graph.get_node(link[0])["class_type"] == JOIN:
        for each in graph.get_node(link[0])["inputs"].values():
            yield from _joined(graph, each)
    else:
        yield link


def _models(graph: DynamicPrompt, link: Any, names: list[str], seen: set[str]) -> Iterator[str]:
    if not is_link(link) or link[0] in seen or not graph.has_node(link[0]):
        return
    seen.add(link[0])
    node = graph.get_node(link[0])
    inputs = node["inputs"]
    if (model := inputs.get("model")) in names:
        yield model
    elif node["class_type"] == LOADER:
        if (saved := model_of_file(inputs.get("file"))) is not None:
            yield saved
    else:  # of a node that draws, reads or encodes, the backbone says which model it is
        for each in [inputs["backbone"]] if "backbone" in inputs else inputs.values():
            yield from _models(graph, each, names, seen)


def _require_any(checks: Iterable[Callable[[], object]]) -> None:
    """Raise the first error if every check raises one."""
    errors = []
    for check in checks:
        try:
            check()
            return
        except LLaDA2Error as error:
            errors.append(error)
    if errors:
        raise errors[0]
