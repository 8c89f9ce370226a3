"""The house: who may import whom, and that the pack and its parts stay light to import."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from PIL import Image
from templates import TEMPLATES, TITLE, WORKFLOWS

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "llada2_mlx"
MODULES = sorted(path for folder in (LIBRARY, ROOT / "nodes") for path in folder.rglob("*.py"))


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports; relative ones begin with a dot."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_knows_nothing_of_comfyui_and_the_pack_imports_itself_relatively(path: Path) -> None:
    names = {name.partition(".")[0] for name in imports(path)}
    assert "llada2_mlx" not in names and "nodes" not in names  # the pack has another name inside ComfyUI
    comfy = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "server"} & names
    if path.is_relative_to(LIBRARY):
        assert not comfy
    elif path.parent.name != "host":
        assert comfy <= {"comfy_api"}  # schemas; everything else of ComfyUI is behind host


# the floors of the library, from the ground up; the rooms of one floor do not know each other, the ground's may
FLOORS = (
    {"errors", "files", "grids", "progress", "vq", "worker"},
    {"checkpoint"},
    {"tokens"},
    {"backbone", "imaging"},
    {"prompts"},
    {"tasks"},
    {"chat", "story"},
    {"checkup", "shapes", "terminal"},
    {"commands"},
    {"cli"},
)


def library_imports() -> dict[str, set[str]]:
    """Of each module of the library the modules of the library that it imports, by their paths within it."""
    found: dict[str, set[str]] = {}
    for path in LIBRARY.rglob("*.py"):
        name = path.relative_to(LIBRARY).with_suffix("").parts
        package, targets = name[:-1], found.setdefault(".".join(name), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1] + tuple((node.module or "").split("."))
                for each in (base, *((*base, alias.name) for alias in node.names)):
                    target = ".".join(part for part in each if part)
                    if (LIBRARY / target.replace(".", "/")).with_suffix(".py").exists():
                        targets.add(target)
    return found


def test_arrows_point_one_way() -> None:
    """No module imports one of a floor above its own, nor of another wing of the same floor."""
    level = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    graph = library_imports()
    assert {name.partition(".")[0] for name in graph} - {"__init__"} == set(level)
    for name, targets in graph.items():
        room = name.partition(".")[0]
        for other in {target.partition(".")[0] for target in targets} - {room}:
            assert level[other] < level[room] or (level[room] == 0 == level[other]), f"{name} imports {other}"


def test_no_arrow_runs_in_a_circle() -> None:
    graph = {name: targets for name, targets in library_imports().items() if not name.endswith("__init__")}
    TopologicalSorter(graph).prepare()


def test_the_network_never_sees_a_string_and_prompts_never_see_an_array() -> None:
    assert not {"mlx.core", "torch", "numpy"} & imports(LIBRARY / "prompts.py")
    assert library_imports()["backbone.network"] == {"checkpoint.config"}


def test_the_pack_imports_without_comfyui_and_in_under_a_second() -> None:
    code = (
        "import importlib.util, sys, time; began = time.perf_counter();"
        f"spec = importlib.util.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r}, submodule_search_locations=[{str(ROOT)!r}]);"
        "module = importlib.util.module_from_spec(spec); sys.modules['pack'] = module; spec.loader.exec_module(module);"
        "assert module.comfy_entrypoint; seconds = time.perf_counter() - began;"
        "heavy = {'torch', 'mlx', 'transformers', 'diffusers', 'numpy'} & set(sys.modules); print(seconds, heavy); assert seconds < 1 and not heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_slow_libraries_wait_until_they_are_needed(path: Path) -> None:
    if "training" in path.parts:
        return  # a program of its own
    assert not {"transformers", "diffusers", "torchdiffeq"} & {
        name.partition(".")[0] for name in imports(path, top_level=True)
    }


def test_versions_and_requirements_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = re.search(r'__version__ = "(.*)"', (LIBRARY / "__init__.py").read_text())[1]
    assert project["version"] == version
    norm = lambda line: line.replace('"', "'").strip()
    wanted = {
        norm(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")
    }
    ours = {norm(line) for line in project["dependencies"]}
    assert wanted < ours
    # ComfyUI brings these itself; naming them could move its own
    assert {re.split(r"[<>=;\[ ]", line)[0] for line in ours - wanted} == {"torch", "numpy", "Pillow", "tqdm"}
    assert not [line for line in ours if "==" in line.partition(";")[0]]


def test_every_workflow_comes_in_both_forms_with_a_thumbnail() -> None:
    names = {path.stem for path in (WORKFLOWS / "api").glob("*.json")}
    assert len(names) >= 5
    assert set(TEMPLATES.values()) == names
    for name in names:
        # what the canvas knows as an API graph: nothing but nodes
        graph = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
        assert all(node["class_type"] and isinstance(node["inputs"], dict) for node in graph.values())
    assert {path.stem for path in WORKFLOWS.glob("*.jpg")} == set(TEMPLATES)
    for title in TEMPLATES:
        with Image.open(WORKFLOWS / f"{title}.jpg") as thumbnail:
            assert thumbnail.width == thumbnail.height >= 480, (
                title
            )  # a card of the browser is square, 240 pixels and more


def test_templates_are_found_by_name_and_numbered_in_the_order_of_learning() -> None:
    """The browser of templates shows a title on one line, and searches in words that begin like the one given."""
    numbers = [TITLE.fullmatch(title)["number"] for title in TEMPLATES]
    assert numbers == sorted(set(numbers))
    assert all(title.lower().startswith("llada") and len(title) <= 34 for title in TEMPLATES)
    words = [len(set(title.removesuffix(".app").lower().split())) for title in TEMPLATES]
    assert min(words) == words[0]  # what has fewer different words would be found before the first
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"^\| (\d\d [^|]+?) \| `([^`|]+)` \|", readme, re.MULTILINE) == [
        (title.removeprefix("LLaDA2 ").removesuffix(".app"), name) for title, name in TEMPLATES.items()
    ]


@cache
def sentences(path: Path) -> list[str]:
    """The texts in a file of code, with "…" for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


HELP = [*sorted((ROOT / "web" / "docs").glob("*.md")), ROOT / "README.md"]


@pytest.mark.parametrize("path", HELP, ids=lambda path: path.stem)
def test_a_page_for_users_shows_pictures_that_are_there_and_quotes_what_the_code_says(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"^!\[[^]]+\]\(([^)]+)\)", text, re.MULTILINE):
        assert (path.parent / link).exists(), link
    said = [sentence for module in MODULES for sentence in sentences(module)]
    quotes = re.findall(r'^(?:\| |- )"(.+?)"(?: \||: )', text, re.MULTILINE)
    for quote in quotes:
        pattern = re.compile(".+?".join(map(re.escape, quote.strip("… ").split("…"))))
        assert any(pattern.search(sentence) for sentence in said), quote
    assert len(quotes) >= 1 or path.stem in ("LLaDA2FlipVQ", "LLaDA2Sprint")  # which refuse nothing


def travels() -> set[str]:
    """The files that the registry gets: those in git, less what .comfyignore names in git's own patterns."""
    listed = lambda *more: subprocess.run(
        ["git", "ls-files", "--cached", *more], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return set(listed()) - set(listed("--ignored", "--exclude-from=.comfyignore"))


def test_what_the_registry_gets_is_all_that_runs_and_no_more() -> None:
    files = travels()
    developers = {path for path in files if path.startswith(("tests/", "docs/", ".")) or "training" in path}
    assert not developers
    for needed in ("__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        assert needed in files
    for folder in (
        "nodes",
        "web/docs",
        "locales/ja",
        "workflows/api",
        "subgraphs",
        "web/js",
        "llada2_mlx/builtin/shapes/vae",
    ):
        assert any(path.startswith(f"{folder}/") for path in files), folder
    assert sum((ROOT / path).stat().st_size for path in files) < 25e6
    staying = lambda name: name.startswith("shapes.training")
    graph = library_imports()
    assert not [name for name, targets in graph.items() if not staying(name) and any(map(staying, targets))]


def test_the_registrys_name_and_versions_are_what_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    name = project["project"]["name"]
    assert re.fullmatch(r"[a-z]+(?:[-_.]?[a-z0-9]+)*", name) and "comfy" not in name and len(name) < 100
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert re.fullmatch(r">=\d+\.\d+\.\d+", project["tool"]["comfy"]["requires-comfyui"])
    for address in (
        *project["project"].get("urls", {}).values(),
        *map(project["tool"]["comfy"].get, ("Icon", "Banner")),
    ):
        assert address is None or address.startswith("https://")


def test_the_continuous_integration_calls_make_and_nothing_else() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [path.stem for path in files] == ["publish", "test"]
    for path in files:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            commands = [step["run"] for step in job["steps"] if "run" in step]
            assert commands and all(command.startswith("make ") for command in commands), path
            called = {command.split()[1] for command in commands if "matrix" not in command}
            assert called | set(job.get("strategy", {}).get("matrix", {}).get("target", ())) <= targets, path


def test_the_workflows_say_which_pack_of_the_registry_their_nodes_are_of() -> None:
    """By this a manager finds the pack, and the version that the graph fits, for someone who does not have it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    for path in WORKFLOWS.glob("*.json"):
        nodes = [node["properties"] for node in json.loads(path.read_text())["nodes"] if node["type"] in ours]
        said = {(properties.get("cnr_id"), properties.get("ver")) for properties in nodes}
        assert said == {(project["name"], project["version"])}, path.name


LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda path: path.stem,
)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in LINK.findall(path.read_text()):
        if target.startswith("https://"):
            continue
        page = path.parent / target if target else path
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor
