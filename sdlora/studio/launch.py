"""Starts, stops and continues runs, each a process of its own that outlives the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sdlora.config import MAX_JSON_BYTES, json_schema, read_toml
from sdlora.errors import ConfigError, RunError
from sdlora.presets import describe_preset, find_preset, list_presets
from sdlora.reading import parse_json
from sdlora.runs import RunFolder
from sdlora.studio.library import Library, list_grids, name_folder, read_object
from sdlora.translate.translate import to_toml
from sdlora.writing import next_free_folder

PLAN_SECONDS = 600
MAX_DIGITS = 9
# fmt: off
MAIN = (
    "base.source", "data.trigger", "train.steps", "train.learning_rate", "train.batch_size", "lora.rank",
    "lora.kind", "data.resolution", "data.crop", "data.flip", "data.caption_dropout", "base.quantize",
    "train.sample_every", "train.seed", "sample.strengths", "sample.prompts",
)
# fmt: on
# Their defaults are the base's own.
OF_BASE = (
    *("train.learning_rate", "train.batch_size", "train.schedule", "sample.strengths", "sample.guidance"),
    *("objective.timestep_range", "objective.layout_range", "data.trigger_position"),
)
SECTIONS = ("base", "data", "lora", "objective", "train", "sample", "export")


@dataclass(frozen=True, slots=True)
class Setting:
    """A field of the form, made from the schema of the settings; `items` is the kind of a list's elements."""

    key: str
    description: str
    default: str
    choices: tuple[str, ...]
    is_text: bool
    section: str
    items: str = ""

    def argument(self, value: str) -> str:
        """`section.key=value` for the command line."""
        if self.key == "sample.prompts":
            return f"{self.key}={json.dumps(value.splitlines(), ensure_ascii=False)}"
        if self.items and not value.startswith("["):
            parts = [part.strip() for part in value.split(",") if part.strip()]
            texts = (
                [json.dumps(part, ensure_ascii=False) for part in parts] if self.items == "string" else parts
            )
            return f"{self.key}=[{', '.join(texts)}]"
        return f"{self.key}={json.dumps(value, ensure_ascii=False) if self.is_text else value}"

    def text(self, value: Any) -> str:
        """A value of a run as it is typed into the field; empty for the default."""
        if value in (None, [], {}):
            return ""
        if self.key == "sample.prompts":
            return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
        shown = value if isinstance(value, str) else to_toml(_without_none(value))
        return "" if shown == self.default else shown


def _without_none(value: Any) -> Any:
    """A value without the settings that are not given, which TOML has no word for."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def list_settings() -> list[Setting]:
    """All settings, those of `MAIN` first."""
    schema = json_schema()
    found = {}
    for section in SECTIONS:
        part = schema["$defs"][schema["properties"][section]["$ref"].rsplit("/", 1)[-1]]
        for name, rules in part["properties"].items():
            found[f"{section}.{name}"] = _setting(f"{section}.{name}", rules)
    return [*(found.pop(key) for key in MAIN), *found.values()]


def _setting(key: str, rules: Mapping[str, Any]) -> Setting:
    options = [option for option in rules.get("anyOf", [rules]) if option.get("type") != "null"]
    kinds, value = {option.get("type") for option in options}, rules.get("default")
    choices = tuple(map(str, options[0].get("enum", ()))) if len(options) == 1 else ()
    shown = "" if value in (None, [], {}) else value if isinstance(value, str) else to_toml(value)
    if key in OF_BASE:
        shown = "the base's own"
    return Setting(
        key=key,
        description=rules.get("description", ""),
        default=shown,
        choices=("true", "false") if kinds == {"boolean"} else choices,
        is_text=kinds == {"string"},
        section=key.partition(".")[0],
        items=next((_items(option) for option in options if option.get("type") == "array"), ""),
    )


def _items(option: Mapping[str, Any]) -> str:
    rules = option.get("items") or option.get("prefixItems", [{}])[0]
    return str(rules.get("type", ""))


def presets() -> dict[str, dict[str, Any]]:
    """Descriptions and values of the presets, by name."""
    return {
        name: {"about": describe_preset(file), "values": _flatten(read_toml(file))}
        for name, file in list_presets().items()
    }


def _flatten(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{section}.{key}": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for section, keys in values.items()
        for key, value in keys.items()
    }


class Launcher:
    """Commands of sdlora for the runs of a library."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.settings = {setting.key: setting for setting in list_settings()}
        self._children: list[subprocess.Popen[bytes]] = []
        # One plan at a time: each loads torch. And no run is started twice.
        self._planning, self._starting = threading.Lock(), threading.Lock()
        self._stopping: dict[Path, int] = {}
        self._forms: dict[Path, dict[str, str]] = {}
        # What was asked for, and how many grids and adapters there were then.
        self._asked: dict[tuple[Path, str], int] = {}

    def arguments(self, form: Mapping[str, str]) -> list[str]:
        """The arguments of `sdlora train` for a form; raises a ConfigError for images that are not listed."""
        folders = self.library.image_folders()
        if (folder := folders.get(form.get("images", ""))) is None:
            problem = "choose an image folder; `sdlora studio --images FOLDER` adds one to the list"
            raise ConfigError(problem, key="images")
        arguments = [str(folder)]
        if preset := form.get("preset"):
            arguments += ["--preset", find_preset(preset).stem]
        for key, setting in self.settings.items():
            if value := form.get(key, "").strip():
                arguments.append(setting.argument(value))
        return arguments

    def plan(self, form: Mapping[str, str]) -> dict[str, Any]:
        """The plan of a run; raises a ConfigError with what the command says is wrong."""
        command = [sys.executable, "-m", "sdlora", "train", *self.arguments(form), "--json"]
        with self._planning:
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PLAN_SECONDS, check=False
                )
            except subprocess.TimeoutExpired:
                raise ConfigError(f"no plan within {PLAN_SECONDS} s; try a smaller folder") from None
        if done.returncode:
            printed = done.stderr.decode("utf-8", "replace").splitlines()
            lines = printed or ["planning failed, and printed nothing"]
            raise ConfigError(*(line.removeprefix("sdlora: ") for line in lines[-40:]))
        plan: dict[str, Any] = parse_json(done.stdout[-MAX_JSON_BYTES:])
        return plan

    def start(self, form: Mapping[str, str]) -> RunFolder:
        """Starts a run under the form's name, or that of its image folder."""
        arguments = self.arguments(form)
        name = re.sub(r"[^\w.-]+", "-", form.get("name") or Path(arguments[0]).name).strip(".-")[:80]
        with self._starting:
            run = RunFolder(next_free_folder(self.library.folder / (name or "run")))
            run.path.mkdir(parents=True)
            self._forms[run.path] = dict(form)
            return self._launch(run, ["train", *arguments, "--out", str(run.path)])

    def form_of(self, run: RunFolder) -> dict[str, str]:
        """The form that starts a run again: as it was filled in, else from the settings of the run."""
        if run.path in self._forms:
            return self._forms[run.path]
        config = read_object(run.config_file)
        sections = {name: value for name, value in config.items() if isinstance(value, dict)}
        values = {
            key: setting.text(sections.get(setting.section, {}).get(key.partition(".")[2]))
            for key, setting in self.settings.items()
        }
        images = config.get("images")
        named = {"images": address_of(images) if isinstance(images, str) else "", "name": run.name}
        return {key: value for key, value in {**named, **values}.items() if value}

    def resume(self, run: RunFolder, steps: str = "") -> RunFolder:
        """Continues a run, up to another step if one is given."""
        done = self.library.overview(run).step
        if steps and (not steps.isdecimal() or len(steps) > MAX_DIGITS or int(steps) <= done):
            raise RunError(
                f"{run.name} is already at step {done}; {steps!r:.20} is not a later step", key="run.steps"
            )
        more = [self.settings["train.steps"].argument(steps)] if steps else []
        with self._starting:
            self._check_idle(run)
            return self._launch(run, ["resume", str(run.path), *more])

    def stop(self, run: RunFolder) -> None:
        """Asks the process of a run to save and end; the second time, to end at once."""
        process = run.process
        if process is None:
            raise RunError(f"no process of this machine trains {run.name}", key="run.not-running")
        with suppress(psutil.Error):
            process.terminate()
            self._stopping[run.path] = process.pid
            if not run.exists:
                # Before it has begun, it ends without a message.
                with suppress(OSError), run.output_file.open("ab") as output:
                    output.write(b"sdlora: stopped\n")

    def ask(self, run: RunFolder, request: str) -> None:
        """Asks the process of a run to "save" or "sample" now."""
        if run.process is None:
            raise RunError(f"no process of this machine trains {run.name}", key="run.not-running")
        run.ask(request)
        self._asked[run.path, request] = _count(run, request)

    def asked(self, run: RunFolder) -> list[str]:
        """What was asked of a run and is not there yet: "save" or "sample"."""
        return [
            what
            for (path, what), count in list(self._asked.items())
            if path == run.path and _count(run, what) == count
        ]

    def is_stopping(self, run: RunFolder) -> bool:
        process = run.process
        return process is not None and self._stopping.get(run.path) == process.pid

    def prune(self, run: RunFolder, keep: int = 1) -> None:
        """Deletes all checkpoints but the newest."""
        with self._starting:
            self._check_idle(run)
            run.remove_checkpoints(keep)

    def reap(self) -> None:
        """Lets ended processes go."""
        self._children = [child for child in self._children if child.poll() is None]

    def _check_idle(self, run: RunFolder) -> None:
        self.reap()
        if run.process:
            raise RunError(f"{run.name} is running; stop it first", key="run.running")

    def _launch(self, run: RunFolder, arguments: Sequence[str]) -> RunFolder:
        command = [sys.executable, "-m", "sdlora", *arguments]
        self._asked = {key: count for key, count in self._asked.items() if key[0] != run.path}
        with run.output_file.open("ab") as output:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self._children.append(child)
        run.name_process(child.pid)
        return run


def _count(run: RunFolder, request: str) -> int:
    return len(list_grids(run)) if request == "sample" else len(run.saved_steps())


def address_of(images: str) -> str:
    """Name of an image folder in addresses; empty if it is gone."""
    path = Path(images)
    return name_folder(path.resolve()) if images and path.is_dir() else ""
