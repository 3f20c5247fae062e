"""The house: who may import whom, and which library stays in which folder (DESIGN 3)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "sdlora"
GROUND = {"dtypes", "errors", "reading", "writing", "config", "notebook", "objectives", "runs", "seeds"}
COLUMNS = {"data", "lora", "models", "diffusion", "report"}
# The stair: a unit may import what stands above it here, and columns never import each other.
ABOVE_COLUMNS = (
    *("translate", "formats", "rank", "tree", "memory", "sampling", "export", "evaluation", "training"),
    *("studio", "cli"),
)
ALLOWED = {
    "dtypes": set(),
    "errors": set(),
    "reading": set(),
    "writing": {"errors"},
    "notebook": {"errors"},
    "aliases": set(),
    "objectives": set(),
    "problems": {"errors", "aliases"},
    "presets": {"errors"},
    "config": {"errors", "reading", "aliases", "objectives", "presets", "problems"},
    "runs": {"errors", "reading", "writing", "config", "notebook"},
    "seeds": set(),
    **dict.fromkeys(COLUMNS, GROUND),
    **{unit: GROUND | COLUMNS | set(ABOVE_COLUMNS[:number]) for number, unit in enumerate(ABOVE_COLUMNS)},
}
ALLOWED["cli"] |= {"problems", "presets", "aliases"}
ALLOWED["translate"] |= {"aliases"}
ALLOWED["studio"] |= {"presets"}
LIBRARIES = {
    "diffusers": {"models", "sampling"},
    "transformers": {"models", "evaluation"},
    "accelerate": {"training"},
    "peft": set(),
    "bitsandbytes": {"models"},
    "onnxruntime": {"models"},
    "starlette": {"studio"},
    "uvicorn": {"cli"},
}
# A feature that needs more lines raises this in the commit that adds it.
MAX_MODULES, MAX_LINES = 148, 29_980
WITHOUT_TORCH = {
    "errors",
    "reading",
    "writing",
    "notebook",
    "aliases",
    "objectives",
    "problems",
    "presets",
    "config",
    "runs",
    "seeds",
    "report",
}


def unit_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def source_files() -> list[Path]:
    outside = {"builtin", "__init__", "__main__"}
    return [path for path in sorted(PACKAGE.rglob("*.py")) if unit_of(path) not in outside]


def imports_of(tree: ast.AST) -> list[tuple[str, ast.stmt]]:
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            inner = [f"sdlora.{alias.name}" for alias in node.names] if node.module == "sdlora" else []
            found += [(name, node) for name in inner or [str(node.module)]]
    return found


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    """The layer table holds, libraries stay in their folders, and only cli/ imports lazily."""
    unit = unit_of(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for name, node in imports_of(tree):
        parts = name.split(".")
        if parts[0] == "sdlora" and len(parts) > 1:
            target = parts[1]
            assert target == unit or target in ALLOWED[unit], f"{unit} imports {name}"
        assert unit in LIBRARIES.get(parts[0], {unit}), f"{parts[0]} in {unit}"
        is_guarded = _is_guarded(tree, node)
        assert parts[0] != "torch" or unit not in WITHOUT_TORCH or is_guarded, f"torch in {unit}"
        is_lazy = id(node) not in top and not is_guarded
        assert unit == "cli" or not is_lazy, f"lazy import of {name}"


def _is_guarded(tree: ast.Module, node: ast.stmt) -> bool:
    """A top-level `try`, `with` or `if TYPE_CHECKING` around an import is no lazy import."""
    return any(
        node in ast.walk(block) for block in tree.body if isinstance(block, ast.If | ast.Try | ast.With)
    )


def test_no_python_outside():
    """A Python file in datasets/ would shadow the package of that name."""
    for folder in ("datasets", "configs"):
        assert not list((REPOSITORY / folder).rglob("*.py"))


def test_public_names_are_there():
    """What `sdlora.__all__` lists can be imported, and nothing else is promised or completed."""
    import sdlora

    assert dir(sdlora) == sdlora.__all__
    assert sorted(sdlora.__all__) == sdlora.__all__
    for name in sdlora.__all__:
        assert getattr(sdlora, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        sdlora.trian  # noqa: B018


def test_light_modules_import_no_torch():
    """R-35: settings are checked, help is printed and events are read without torch."""
    code = (
        "import sys, sdlora, sdlora.config, sdlora.runs, sdlora.errors, sdlora.cli\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@cache
def functions() -> list[tuple[str, ast.FunctionDef]]:
    """Every function by `folder/file.py:name`."""
    return [
        (f"{path.relative_to(PACKAGE)}:{node.name}", node)
        for path in source_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]


def test_no_room_is_crowded():
    """At most 115 modules, 12 in a folder; 19 in those that hold more."""
    modules = [path for path in source_files() if path.stem != "__init__"]
    assert len(modules) <= MAX_MODULES
    for folder, count in Counter(unit_of(path) for path in modules if path.parent != PACKAGE).items():
        assert count <= (19 if folder in ("data", "training", "models", "cli", "evaluation") else 12), folder


def test_the_package_is_small():
    """Lines of code, docstrings and blanks together."""
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()) <= MAX_LINES


def test_functions_fit_a_screen():
    """No function has more than 60 lines."""
    long = [name for name, node in functions() if (node.end_lineno or 0) - node.lineno >= 60]
    assert not long


def test_few_functions_take_many_parameters():
    """At most six outside cli/ take more than six; the public verbs are among them."""
    many = []
    for name, node in functions():
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if len([one for one in given if one.arg not in ("self", "cls")]) > 6 and not name.startswith("cli/"):
            many.append(name)
    assert len(many) <= 6, many


def test_the_denoiser_has_one_home():
    """UNet and CLIP are words of models/ and the file dialects; everything else speaks to `Base`.

    evaluation/ and cli/ name the CLIP that a user may pass to score images.
    """
    named = [path for path in source_files() if re.search("UNet|unet|CLIP", path.read_text(encoding="utf-8"))]
    assert len(named) <= 25
    assert {unit_of(path) for path in named} <= {
        "models",
        "formats",
        "translate",
        "aliases",
        "lora",
        "export",
        "tree",
        "evaluation",
        "cli",
    }


def test_the_map_names_every_file():
    """A newcomer finds each file in the map of the package, in its folder's rows, and none that is gone."""
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \|$", text.partition("Every file")[2].partition("Borders")[0], re.MULTILINE
    )
    folder, named = "", []
    for title, files in rows:
        folder = next(iter(re.findall(r"^`(\w+)/`", title)), folder)
        named += [f"{folder}/{name}" for name in re.findall(r"`(\w+)`", files)]
    existing = [path.relative_to(REPOSITORY) for path in source_files() if path.stem != "__init__"]
    assert sorted(named) == sorted(f"{path.parent.name}/{path.stem}" for path in existing)
