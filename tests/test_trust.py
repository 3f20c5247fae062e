"""What the package never does with a file, and what it never asks the network for (R-39, R-44)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sdlora"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# What runs code that a file brings, or reads formats that can.
FORBIDDEN_MODULES = {
    *("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "ruamel", "runpy"),
    *(
        "requests",
        "urllib",
        "urllib3",
        "http",
        "httpx",
        "aiohttp",
        "ftplib",
        "smtplib",
        "telnetlib",
        "xmlrpc",
    ),
}
# Of these, what only splits and joins texts.
HARMLESS_MODULES = {"urllib.parse", "http.cookies"}
# YAML is read by `safe_load` alone, from configs of other trainers.
YAML_READERS = {"translate/translate.py"}
FORBIDDEN_CALLS = {
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.startfile", "torch.load"),
    *("torch.save", "torch.hub.load", "torch.jit.load", "np.load", "numpy.load", "np.save", "torch.compile"),
}
FORBIDDEN_KEYWORDS = {"trust_remote_code", "allow_pickle", "weights_only", "custom_pipeline", "shell"}
# Written out as False they forbid what others may allow.
MAY_BE_FALSE = {"trust_remote_code", "allow_pickle"}
# Who may use what else could harm, and what for.
ALLOWED = {
    # npm, to fetch drawings when the base is made anew; the page starts sdlora itself
    "subprocess": {"builtin/icons.py", "studio/launch.py", "studio/sample_pages.py"},
    # the host's own name; the page listens before its address is printed
    "socket": {"training/distributed.py", "cli/studio.py"},
    # models/info.py only asks whether bitsandbytes is there, and data/images.py where matplotlib's fonts are
    "importlib": {
        "__init__.py",
        "cli/__init__.py",
        "memory/activations.py",  # versions of packages
        "data/images.py",
        "models/info.py",
        "training/optimizer.py",
        "training/device.py",
        "training/logger.py",
        "evaluation/page.py",  # the template's file
    },
    # models/weights.py only knows the error of its checked data classes
    # export/model_card.py only formats the card
    "huggingface_hub": {
        "models/folder.py",
        "models/weights.py",
        "export/export.py",
        "export/model_card.py",
        "data/sources.py",
        "formats/hub.py",
    },
    "multiprocessing": set(),
    "ctypes": {"models/base.py"},  # glibc's malloc_trim and mallopt
}
# Scripts that made the built-in base, not in the wheel: arrays of their own, and a compiled network.
# data/image_checks.py reads its own cache, without pickles.
SCRIPTS = {
    "builtin/bank.py": {"np.load", "np.save"},
    "builtin/make_base.py": {"np.load", "torch.compile"},
    "data/image_checks.py": {"np.load"},
    # train.compile: the machine's own compiler, on the network's operations, and nothing of a file
    "models/stable_diffusion.py": {"torch.compile"},
}
# What a user may name by a hub id is loaded from there; a folder stays on the disk.
FROM_THE_HUB = {"models/captioner.py", "evaluation/features.py"}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Top-level names of what is imported."""
    for node in ast.walk(tree):
        names = [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.partition(".")[0] for name in names if name not in HARMLESS_MODULES)


def is_true(node: ast.expr) -> bool:
    """Whether something is written as True."""
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node: ast.expr) -> bool:
    """Whether something is written as False."""
    return isinstance(node, ast.Constant) and node.value is False


def calls_of(tree: ast.AST) -> Iterator[ast.Call]:
    """Every call."""
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_file_brings_code(path: Path) -> None:
    """R-44: no pickle, no YAML, no eval, no code from a hub, no program started."""
    name = path.relative_to(PACKAGE).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = set(imports_of(tree))
    allowed_modules = {"yaml"} if name in YAML_READERS else set()
    assert not modules & FORBIDDEN_MODULES - allowed_modules
    for module, places in ALLOWED.items():
        assert module not in modules or name in places, f"{module} in {name}"
    for call in calls_of(tree):
        allowed = SCRIPTS.get(name, set())
        assert ast.unparse(call.func) not in FORBIDDEN_CALLS - allowed, ast.unparse(call)
        given = {
            keyword.arg
            for keyword in call.keywords
            if not (keyword.arg in MAY_BE_FALSE and is_false(keyword.value))
        }
        assert not given & FORBIDDEN_KEYWORDS, ast.unparse(call)
        # Spelled in a table of settings it is the same.
        texts = {node.value for node in ast.walk(call) if isinstance(node, ast.Constant)}
        assert "trust_remote_code" not in texts


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in SOURCES
        if "builtin" not in path.parts and "from_pretrained(" in path.read_text("utf-8")
    ],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_what_is_loaded_is_here_and_no_pickle(path: Path) -> None:
    """R-39, R-44: each from_pretrained stays on the disk, and models ask for safetensors."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tables = {
        target.id: {
            ast.literal_eval(key)
            for key, value in zip(node.value.keys, node.value.values, strict=True)
            if is_true(value)
        }
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for call in calls_of(tree):
        if not (isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"):
            continue
        if isinstance(call.args[0], ast.Constant) and call.args[0].value is None:
            continue  # Tensors in memory.
        given = {keyword.arg for keyword in call.keywords if is_true(keyword.value)}
        for keyword in call.keywords:
            if keyword.arg is None and isinstance(keyword.value, ast.Name):
                given |= tables.get(keyword.value.id, set())
        owner = ast.unparse(call.func.value)
        wanted = {"local_files_only"}
        if path.relative_to(PACKAGE).as_posix() in FROM_THE_HUB:
            asked = {one.arg: ast.unparse(one.value) for one in call.keywords}
            assert asked["local_files_only"].endswith("is_local"), ast.unparse(call)
            wanted = set()
        if not owner.endswith(("Tokenizer", "Processor", "Config")):
            wanted.add("use_safetensors")
        assert wanted <= given, ast.unparse(call)


WATCHED = """
import json, sys
# urllib3 binds a socket when it is imported, to see whether there is IPv6; nothing is sent.
quiet = ("socket.__new__", "socket.bind", "socket.gethostname")
def watch(event, arguments):
    if event == "pickle.find_class" or event.startswith("socket.") and event not in quiet:
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(watch)
from sdlora.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["sdlora", *arguments]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
print("silent")
"""


@pytest.mark.slow
def test_no_command_opens_a_socket(make_images, tmp_path: Path) -> None:
    """R-39, R-44: with local paths no command touches the network or a pickle, online as users are."""
    images, run = make_images(sizes=((64, 64),) * 5), tmp_path / "run"
    small = ["data.resolution=64", "data.heldout=0.25", "lora.rank=2", "sample.steps=2", "sample.seeds=[0]"]
    cadence = [f"train.{what}_every=1" for what in ("save", "sample", "evaluate")]
    adapter, out = run / "adapters" / "final.safetensors", tmp_path / "other.safetensors"
    commands = [
        ["doctor", images, "--contact-sheet", tmp_path / "sheet.png"],
        ["train", images, "--out", run, "train.steps=1", "sample.prompts=['a circle']", *small, *cadence],
        ["resume", run, "train.steps=2"],
        ["sample", run, "--prompt", "a square", "--out", tmp_path / "one"],
        ["sample", adapter, "--base", "builtin", "--prompt", "a square", "--out", tmp_path / "two"],
        ["export", adapter, "--format", "kohya", "--out", out],
        ["info", out],
        ["evaluate", run],
        ["cache"],
    ]
    texts = json.dumps([[str(argument) for argument in command] for command in commands])
    online = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, texts], env=online, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for noise in ("FutureWarning", "Failed to load CPU", "falling back to"):
        assert noise not in done.stderr
    assert done.stdout.endswith("silent\n")
