"""Config files and overrides: settings that can be kept, or lines that say what is wrong (R-35)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from sdlora.config import RunConfig, load_config, read_config
from sdlora.runs import RunFolder
from sdlora.writing import write_json

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KEYS = [
    f"{section}.{key}"
    for section, info in RunConfig.model_fields.items()
    if section != "images"
    for key in info.annotation.model_fields
]
VALUES = st.one_of(
    st.sampled_from(
        [
            "1",
            "0",
            "-1",
            "1e-4",
            "1e400",
            "nan",
            "-inf",
            "true",
            "'auto'",
            "'cosine'",
            "[1, 2]",
            "[]",
            "{}",
            "{a=1}",
        ]
    ),
    st.sampled_from(
        ["2026-01-02", "07:32:00", "0x10", "9" * 5000, '"\\u0000"', "'''a\nb'''", "[[[[1]]]]", "''", "="]
    ),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=12).map(json.dumps),
    st.text(max_size=12),
)
NAMES = st.sampled_from(KEYS) | st.sampled_from(
    ["lora", "lora.", ".", "a.b.c", "images", "train.optimizer_args.x", ""]
)


@st.composite
def toml_files(draw: st.DrawFn) -> bytes:
    """Lines of a config file, in sections or dotted, in any order."""
    lines = []
    for name in draw(st.lists(NAMES | st.text(max_size=5), max_size=6)):
        section, _, key = name.rpartition(".")
        value = draw(VALUES)
        lines.append(
            f"[{section}]\n{key} = {value}" if section and draw(st.booleans()) else f"{name} = {value}"
        )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def keep(config: RunConfig, folder: Path) -> None:
    """Settings that are accepted survive the run folder."""
    assert read_config(write_json(folder / "config.json", config.model_dump(mode="json"))) == config


def test_config_files(fuzz, damaged, tmp_path: Path) -> None:
    """R-35: presets, generated files, and both damaged."""
    presets = st.sampled_from([preset.read_bytes() for preset in sorted(CONFIGS.glob("*.toml"))])
    path = tmp_path / "x.toml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        keep(load_config(path), tmp_path)

    fuzz(damaged(toml_files() | presets), read)


def test_overrides(fuzz, tmp_path: Path) -> None:
    """R-35: `section.key=value` of any kind, as texts and as a mapping."""
    texts = st.lists(st.builds("{}={}".format, NAMES, VALUES) | st.text(max_size=10), max_size=4)
    mappings = st.dictionaries(
        NAMES, st.integers() | st.floats() | st.text(max_size=5) | st.none(), max_size=4
    )
    fuzz(texts | mappings, lambda overrides: keep(load_config(None, overrides), tmp_path))


def test_run_configurations(fuzz, damaged, json_values, tmp_path: Path) -> None:
    """R-44: the config.json of somebody's run folder."""
    sound: Any = RunConfig().model_dump(mode="json")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()

    def change(key: str, value: Any) -> bytes:
        section, _, name = key.partition(".")
        return json.dumps({**sound, section: {**sound[section], name: value}}).encode()

    contents = st.builds(change, st.sampled_from(KEYS), json_values) | json_values.map(
        lambda v: json.dumps(v).encode()
    )

    def read(content: bytes) -> None:
        run.config_file.write_bytes(content)
        keep(run.read_config(), tmp_path)

    fuzz(damaged(contents), read)
