"""The house: who may import whom, and that the pack and its parts stay light to import."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

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
    {"shapes", "terminal"},
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
    names = {path.stem for path in (ROOT / "workflows" / "api").glob("*.json")}
    assert len(names) >= 5
    for suffix in (".json", ".jpg"):
        assert {path.stem for path in (ROOT / "workflows").glob(f"*{suffix}")} == names
    for name in names:
        # what the canvas knows as an API graph: nothing but nodes
        graph = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())
        assert all(node["class_type"] and isinstance(node["inputs"], dict) for node in graph.values())
