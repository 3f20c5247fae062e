"""Translates a config of another trainer to TOML, with a comment for each key."""

from __future__ import annotations

import json
import math
import re
import shlex
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sdlora.aliases import ELSEWHERE
from sdlora.config import DataSection, RunConfig, SetSection, validate_config
from sdlora.data.folders import is_image, list_usable, read_repeats
from sdlora.errors import ConfigError, one_line, shorten
from sdlora.reading import UnfitFileError, parse_json, parse_toml, read_bytes
from sdlora.translate.trainers import KOHYA, ONETRAINER, SETS, TOOLKIT, Trainer, all_keys
from sdlora.translate.values import CONVERTERS, SWITCHES, Epochs

TABLES = tomllib.loads((Path(__file__).parent / "keys.toml").read_text(encoding="utf-8"))
IMAGES, OUT = "IMAGES", "--out"
MAX_BYTES = 2**20
MAX_KEYS = 2000
EMPTY: tuple[Any, ...] = (None, False, "", [], {}, "NONE", "OFF")


@dataclass
class _Translation:
    """Settings with the keys they come from, and notes on keys without a counterpart."""

    rules: Mapping[str, str]
    ignored: tuple[str, ...] = ()
    settings: dict[str, tuple[Any, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sets: list[dict[str, Any]] = field(default_factory=list)

    def add(self, key: str, value: Any, comment: str = "") -> None:
        """Translates one key of the config."""
        rule = self.rules.get(key)
        if not isinstance(rule, str):
            if value not in EMPTY and not key.startswith(self.ignored):
                reason = ELSEWHERE.get(key.rpartition(".")[2], "not known")
                reason = reason if reason.startswith("not ") else f"in sdlora: {reason}"
                self.notes.append(f"{_shown(key, value)}: {reason}")
            return
        setting, _, converter = rule.partition(" ")
        try:
            result = CONVERTERS[converter](value) if converter and value is not None else value
        except (ValueError, TypeError, KeyError, IndexError) as error:
            self.notes.append(f"{_shown(key, value)}: {error}")
            return
        if result not in (None, "", [], {}):
            comment = comment or (key if result == value else _shown(key, value))
            self.settings[setting] = (result, comment)

    def add_defaults(self, defaults: Mapping[str, Any]) -> None:
        for key, value in defaults.items():
            if self.rules[key].partition(" ")[0] not in self.settings:
                self.add(key, value, f"{key} is not given, which is {json.dumps(value)} there")

    def add_set(self, values: Mapping[str, Any], rules: Mapping[str, str], folder: Path) -> None:
        """Translates a further set of images: what differs from the first, whose settings it has here."""
        one = _Translation({**self.rules, **rules}, self.ignored)
        for key, value in values.items():
            one.add(key, value)
        name = str(one.settings.pop(IMAGES, ("", ""))[0])
        found: dict[str, Any] = {"folder": str(folder / name) if name and (folder / name).is_dir() else name}
        for setting, (value, _) in one.settings.items():
            key = setting.partition(".")[2]
            if key not in SetSection.model_fields:
                if self.settings.get(setting, (None, ""))[0] != value:
                    one.notes.append(f"{setting} = {to_toml(value)}: the same for all sets in sdlora")
            elif setting.startswith("sets.") or self.settings.get(setting, (None, ""))[0] != value:
                found[key] = value
        for key, default in ((key, about.default) for key, about in SetSection.model_fields.items()):
            first = self.settings.get(f"data.{key}", (default, ""))[0]
            if f"data.{key}" not in one.settings and first != default and key not in ("trigger", "repeats"):
                found[key] = default
        self.sets.append(found)
        self.notes += [f"{note} (the set {shorten(name)})" for note in one.notes]

    def note_repeats(self, folder: str) -> None:
        """Names the repeats in the name of a folder that a dataset file of sd-scripts gives its own for."""
        named, comment = read_repeats(Path(folder), ""), self.settings.get("data.repeats", (1, ""))[1]
        if self.rules.get("image_dir") and named > 1:
            rest = (
                f"the name {Path(folder).name} alone makes it {named} times as many here; rename the folder"
            )
            self.notes.append(f"{comment or 'num_repeats'}: {rest}")

    def count_steps(self, epoch: int | None) -> None:
        """Converts epochs to steps, if the length of an epoch is known."""
        for setting, (value, comment) in list(self.settings.items()):
            if not isinstance(value, Epochs):
                continue
            if epoch:
                steps = max(1, round(value.count * epoch))
                self.settings[setting] = (steps, f"{comment}, of {epoch} steps each")
            else:
                del self.settings[setting]
                sizes = f"{setting} = {value.count:g} x images x repeats / global batch"
                self.notes.append(f"{comment}: the images are not here to count; {sizes}")

    def validate(self) -> None:
        """Moves what is refused to the notes, until the rest is valid."""
        while True:
            nested: dict[str, dict[str, Any]] = defaultdict(dict)
            for setting, (value, _) in self.settings.items():
                section, _, name = setting.partition(".")
                nested[section][name] = value
            if self.sets:
                nested["data"]["sets"] = self.sets
            try:
                validate_config(nested)
                return
            except ConfigError as error:
                wrong = {key for key in error.keys if key in self.settings}
                if not wrong and self.sets and any(key.startswith("data.sets") for key in error.keys):
                    self.notes.append(f"sets {to_toml(self.sets)}: left out, since {error.problems[0]}")
                    self.sets = []
                    continue
                if not wrong:
                    raise
                for key in sorted(wrong):
                    reason = next(line for line in error.problems if key in line)
                    self.notes.append(f"{self.settings.pop(key)[1]}: left out, since {reason}")

    def write(self) -> list[str]:
        """The lines of the sections, and the notes."""
        lines: list[str] = []
        for section in RunConfig.model_fields:
            rows = [row for row in self.settings.items() if row[0].startswith(f"{section}.")]
            lines += ["", f"[{section}]"] if rows else []
            lines += [f"{key.partition('.')[2]} = {to_toml(value)}  # {why}" for key, (value, why) in rows]
            for one in self.sets if section == "data" else ():
                lines += ["", "[[data.sets]]", *(f"{key} = {to_toml(value)}" for key, value in one.items())]
        return [
            *lines,
            *(["", "# Not translated:"] if self.notes else []),
            *(f"# {text}" for text in self.notes),
        ]


def translate(file: Path) -> str:
    """A config of sd-scripts, kohya_ss, ai-toolkit or OneTrainer as TOML for `--config`.

    Each setting has its key there as a comment; comments at the end name the keys without a counterpart.

    Raises:
        ConfigError: If it cannot be read, or is of no known trainer.
    """
    try:
        values = _read(file)
        trainer = _recognise(values)
        values = _with_other_files(values, file.parent)
    except FileNotFoundError:
        raise ConfigError(f"--from {file} does not exist; check the path", key="option--from") from None
    except (OSError, UnicodeDecodeError, UnfitFileError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()) or "nested too deeply"
        raise ConfigError(f"--from {file} cannot be read: {shorten(reason)}", key="option--from") from None
    try:
        found = trainer.prepare(values)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError):
        problem = f"--from {file} does not have the structure of a config of {trainer.name}; check it there"
        raise ConfigError(problem, key="option--from.structure") from None
    if len(found) > MAX_KEYS:
        raise ConfigError(f"--from {file} has more than {MAX_KEYS} keys", key="option--from")
    translation = _Translation(TABLES[trainer.table], trainer.ignored)
    sets = found.pop(SETS, [])
    for key, value in found.items():
        translation.add(key, value)
    translation.add_defaults(TABLES[trainer.table]["defaults"])
    for one in sets:
        translation.add_set(one, TABLES[trainer.table]["sets"], file.parent)
    if "lora.rank_pattern" in translation.settings:
        translation.settings["lora.targets"] = (["all"], "convolutions have a rank")
    folder, out = (str(translation.settings.pop(key, ("", ""))[0]) for key in (IMAGES, OUT))
    translation.note_repeats(folder)
    epoch = _count_steps(file.parent / folder, translation) if folder else None
    translation.count_steps(epoch)
    translation.validate()
    folder = str(file.parent / folder) if (file.parent / folder).is_dir() and folder else folder
    command = ["sdlora", "train", folder or IMAGES, "--config", "my.toml"]
    command += ["--out", f"runs/{Path(out).stem}"] if out else []
    heading = f"# From {file.name} of {trainer.name}, by `sdlora settings --from`. Save it as my.toml, then:"
    return "\n".join(map(one_line, [heading, f"# {shlex.join(command)}", *translation.write()])) + "\n"


def translate_option(name: str, value: str) -> list[str]:
    """`section.key=value` for an option of sd-scripts or diffusers' scripts; empty if nothing is known of it.

    `value` is empty for a switch.
    """
    rule = {**TABLES["kohya"], **TABLES["options"]}.get(name, "")
    setting, _, converter = rule.partition(" ") if isinstance(rule, str) else ("", "", "")
    if not setting or name == "sample_prompts" or not (value or converter in SWITCHES):  # a file there
        return []
    try:
        result = CONVERTERS[converter](value or True) if converter else value
        section, _, key = setting.partition(".")
        validate_config({section: {key: result}})
    except (ValueError, TypeError, KeyError, IndexError, ConfigError):
        return []
    if result in EMPTY and result is not False:
        return []
    with suppress(ValueError):
        # 1e-4 stays as it was typed.
        if not isinstance(result, bool | str) and float(value) == result:
            result = value
    # A rank of convolutions needs them among the targets.
    first = ['lora.targets=["all"]'] if setting in ("lora.rank_pattern", "lora.alpha_pattern") else []
    return [*first, f"{setting}={result if isinstance(result, str) else to_toml(result)}"]


def _read(file: Path) -> dict[str, Any]:
    text = read_bytes(file, MAX_BYTES).decode("utf-8-sig")
    if file.suffix.lower() in (".yaml", ".yml"):
        values = yaml.safe_load(text)
    else:
        values = parse_toml(text) if file.suffix.lower() == ".toml" else parse_json(text)
    if not isinstance(values, dict):
        raise UnfitFileError("it is not a table of keys")
    return values


def _recognise(values: Mapping[str, Any]) -> Trainer:
    if "config" in values:
        return TOOLKIT
    if {"training_method", "base_model_name", "concept_file_name"} & values.keys():
        return ONETRAINER
    known = {*TABLES["kohya"], "datasets", "dataset_config"} & all_keys(values).keys()
    if known and not values.keys() <= RunConfig.model_fields.keys():
        return KOHYA
    raise UnfitFileError("it is not a config of sd-scripts, kohya_ss, ai-toolkit or OneTrainer")


def _with_other_files(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With the files that a config names, if they are there: sets of images, and prompts."""
    inner, values = all_keys(values), dict(values)
    with suppress(OSError, UnicodeDecodeError, UnfitFileError):
        if name := inner.get("dataset_config"):
            values |= _read(folder / str(name))
    if not values.get("concepts") and (name := inner.get("concept_file_name")):
        # OneTrainer keeps its presets in a folder beside that of the concepts.
        for above in (folder.parent, folder):
            with suppress(OSError, UnfitFileError):
                values["concepts"] = parse_json(read_bytes(above / str(name), MAX_BYTES))
    if isinstance(name := inner.get("sample_prompts"), str):
        with suppress(OSError, UnicodeDecodeError, UnfitFileError):
            lines = read_bytes(folder / name, MAX_BYTES).decode("utf-8-sig").splitlines()
            prompts = [re.split(r"\s--[a-z]{1,3}\s", line)[0].strip() for line in lines]
            values["sample_prompts"] = [prompt for prompt in prompts if prompt and not prompt.startswith("#")]
    return values


def _count_steps(folder: Path, translation: _Translation) -> int | None:
    """Steps per epoch; None if the images are not there."""
    folders = [(folder, translation.settings.get("data.repeats", (1, ""))[0])]
    folders += [(Path(one["folder"]), one.get("repeats", 1)) for one in translation.sets if "folder" in one]
    if not all(one.is_dir() for one, _ in folders):
        return None
    samples = 0
    for one, times in folders:
        names = filter(is_image, list_usable(one, defaultdict(dict), DataSection()))
        samples += times * sum(read_repeats(one, name) for name in names)
    settings, keys = translation.settings, ("train.batch_size", "train.accumulate")
    batch: int = math.prod(settings.get(key, (1, ""))[0] for key in keys)
    return math.ceil(samples / batch)


def to_toml(value: Any) -> str:
    """A value as TOML, whose escapes of text are those of JSON."""
    if isinstance(value, dict):
        keys = (
            key if re.fullmatch(r"[\w-]+", key, re.ASCII) else json.dumps(key, ensure_ascii=False)
            for key in map(str, value)
        )
        pairs = zip(keys, map(to_toml, value.values()), strict=True)
        return "{" + ", ".join(f"{key} = {item}" for key, item in pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return repr(value) if type(value) in (int, float) else json.dumps(value, ensure_ascii=False)


def _shown(key: str, value: Any) -> str:
    return f"{key} = {shorten(json.dumps(value, default=str, ensure_ascii=False))}"
