"""`sdlora settings`, and what is said to those who come from another trainer (R-35)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from sdlora.aliases import ELSEWHERE, MEANINGS
from sdlora.config import RunConfig, Section

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
SECTIONS = {name: section for name, section in RunConfig() if isinstance(section, Section)}
KEYS = [f"{name}.{key}" for name, section in SECTIONS.items() for key in type(section).model_fields]


def choices(annotation: Any) -> list[str]:
    """The words that a setting may be."""
    if isinstance(annotation, str):
        return [annotation]
    return [word for part in get_args(annotation) for word in choices(part)]


def test_each_setting_is_explained():
    """R-35: no more and no fewer, in the order of the sections, and each choice by its name."""
    assert list(MEANINGS) == KEYS
    for key in KEYS:
        section, name = key.split(".")
        for word in choices(type(SECTIONS[section]).model_fields[name].annotation):
            assert re.search(rf"\b{word}\b", MEANINGS[key]), f"{key} does not explain {word}"


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
    assert (code, error) == (2, ["sdlora: no setting has quux in it; `sdlora settings` lists all"])


def test_other_trainers_names():
    """What is said of an option names settings that are there; no option of the README's table is unknown."""
    own = {key.split(".")[1] for key in KEYS}
    assert not own & ELSEWHERE.keys()
    sections = "|".join(SECTIONS)
    for answer in ELSEWHERE.values():
        assert set(re.findall(rf"\b(?:{sections})\.[a-z0-9_]+", answer)) <= set(KEYS)
    table = README[README.index("| sd-scripts |") :].split("\n\n")[0]
    for row in table.splitlines():
        for option in re.findall(r"`--([a-z0-9_]+)", " ".join(row.split("|")[1:3])):
            assert option in ELSEWHERE or option in own or option == "base", option


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (("train", "x", "--network_dim", "8"), "--network_dim is no option; in sdlora: lora.rank"),
        (("train", "x", "--rank=8"), "--rank is no option; did you mean lora.rank?"),
        (("train",), "Missing argument 'IMAGES'; see `sdlora train --help`"),
        (("trian", "x"), "No such command 'trian'. Did you mean 'train'?; see `sdlora --help`"),
        (("sample", "--steps", "many"), "Invalid value for '--steps': "),
    ],
)
def test_a_mistake_in_the_command_is_one_line(sdlora, command, line):
    """R-35: in the same form as all others, without a frame and without the usage."""
    code, printed, error = sdlora(*command)
    assert (code, printed) == (2, "")
    [told] = error
    assert told.startswith(f"sdlora: {line}")


def test_without_a_command(sdlora):
    """The help, and nothing else."""
    code, printed, error = sdlora()
    assert (code, error) == (2, [])
    assert "Usage: sdlora" in printed
