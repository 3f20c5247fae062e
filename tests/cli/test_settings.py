"""`sdlora settings`, and the options of other trainers (R-35)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from sdlora.aliases import ELSEWHERE
from sdlora.config import RunConfig, Section, json_schema

OPTIONS = (Path(__file__).resolve().parents[2] / "docs/pages/options.md").read_text(encoding="utf-8")
SECTIONS = {name: section for name, section in RunConfig() if isinstance(section, Section)}
KEYS = [f"{name}.{key}" for name, section in SECTIONS.items() for key in type(section).model_fields]


def choices(annotation: Any) -> list[str]:
    """The words that a setting may be."""
    if isinstance(annotation, str):
        return [annotation]
    return [word for part in get_args(annotation) for word in choices(part)]


def test_each_setting_is_explained():
    """R-35: in one line, with each of its choices."""
    for key in KEYS:
        section, name = key.split(".")
        field = type(SECTIONS[section]).model_fields[name]
        assert field.description, key
        for word in choices(field.annotation):
            assert re.search(rf"\b{word}\b", field.description), f"{key} does not explain {word}"


def test_the_schema(sdlora):
    """Editors complete and check a TOML file by the schema: every key, its choices, lists of one element."""
    code, printed, _ = sdlora("settings", "--schema")
    schema = json.loads(printed)
    assert code == 0
    assert schema == json_schema()
    found = {name: schema["$defs"][f"{name.title()}Section"]["properties"] for name in SECTIONS}
    assert [f"{name}.{key}" for name in found for key in found[name]] == KEYS
    assert found["data"]["crop"]["enum"] == ["center", "random"]
    assert {"type": "number"} in found["sample"]["strengths"]["anyOf"]
    assert all(rules["description"] for section in found.values() for rules in section.values())


def test_the_list(sdlora, monkeypatch):
    """Each key with its default, within the terminal's width."""
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = sdlora("settings")
    assert code == 0
    assert re.findall(r"^  ([a-z]+\.[a-z_]+)", printed, re.MULTILINE) == KEYS
    assert "  lora.rank=16  " in printed
    assert "  data.trigger  " in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_some_of_them(sdlora):
    """By words of the key or the meaning, and by what another trainer calls it."""
    code, printed, _ = sdlora("settings", "HELD-OUT", "heldout")
    assert code == 0
    assert re.findall(r"^  ([a-z]+\.[a-z_]+)", printed, re.MULTILINE) == [
        "data.heldout",
        "train.evaluate_every",
        "sample.prompts",
    ]
    code, printed, _ = sdlora("settings", "Min SNR gamma", "network-dim")
    assert code == 0
    assert printed.startswith("network_dim in sdlora: lora.rank\n")
    assert "  lora.rank=16" in printed
    assert "  objective.min_snr_gamma=0.0" in printed
    code, _, error = sdlora("settings", "quux")
    assert code == 2
    assert "quux" in error[0]


def test_other_trainers_names():
    """Answers name settings that exist; every option in the guide's table has one."""
    own = {key.split(".")[1] for key in KEYS}
    assert not own & ELSEWHERE.keys()
    sections = "|".join(SECTIONS)
    for answer in ELSEWHERE.values():
        assert set(re.findall(rf"\b(?:{sections})\.[a-z0-9_]+", answer)) <= set(KEYS)
    table = OPTIONS[OPTIONS.index("| sd-scripts |") :].split("\n\n")[0]
    for row in table.splitlines():
        for option in re.findall(r"`--([a-z0-9_]+)", " ".join(row.split("|")[1:3])):
            assert option in ELSEWHERE or option in own or option == "base", option


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (("train", "x", "--network_dim", "8"), "--network_dim is not an option; write lora.rank=8"),
        (("train", "x", "--rank=8"), "--rank is not an option; write lora.rank=8"),
        (("train",), "IMAGES is missing (a folder of images"),
        (("trian", "x"), "trian is not a command; did you mean `sdlora train`?"),
        (("sample", "--steps", "many"), "--steps many must be an integer"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(sdlora, command, line):
    """R-35: in the same form as all others, without a frame and without the usage."""
    code, printed, error = sdlora(*command)
    assert (code, printed) == (2, "")
    [shown] = error
    assert shown.startswith(f"sdlora: {line}")


def test_without_a_command(sdlora):
    """The help, and nothing else."""
    code, printed, error = sdlora()
    assert (code, error) == (2, [])
    assert "Usage: sdlora" in printed
