"""The files for A1111, Forge and ComfyUI."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from sdlora.config import load_config
from sdlora.errors import ConfigError
from sdlora.export.webui import preferred_strength, webui_prompt, write_webui_files
from sdlora.runs import RunFolder
from tests.checks import raises


@pytest.fixture
def finished(tmp_path):
    """A run folder with the files that these are made of."""
    run = RunFolder(tmp_path / "ink")
    run.adapters.mkdir(parents=True)
    run.final_adapter("kohya").write_bytes(b"weights")
    run.sample_folder(7).mkdir(parents=True)
    (run.sample_folder(7) / "01.png").write_bytes(b"image")
    return run


def test_the_three_files(finished):
    """R-42: they have the run's name; the notes are those that A1111 reads."""
    file = write_webui_files(finished, "sd_v1_v", [0.8], "inkwash style")
    assert file == finished.path / "webui" / "ink.safetensors"
    assert file.read_bytes() == b"weights"
    assert file.with_suffix(".png").read_bytes() == b"image"
    notes = json.loads(file.with_suffix(".json").read_text())
    assert (notes["sd version"], notes["activation text"], notes["preferred weight"]) == (
        "SD1",
        "inkwash style",
        0.8,
    )
    assert webui_prompt("ink", 0.8, "inkwash style") == "<lora:ink:0.8> inkwash style"
    assert webui_prompt("ink", 1.0, "") == "<lora:ink:1>"


def test_the_thumbnail_of_a_large_grid(finished):
    """R-42: its images have more digits, and the newest step is taken."""
    for step, content in ((100, b"newest"), (99, b"older")):
        finished.sample_folder(step).mkdir(parents=True)
        (finished.sample_folder(step) / "001.png").write_bytes(content)
        (finished.sample_folder(step) / "grid.png").write_bytes(b"grid")
    file = write_webui_files(finished, "sd_v1_v", [0.8], "inkwash style")
    assert file.with_suffix(".png").read_bytes() == b"newest"


def test_they_are_written_again(finished):
    """A resumed run replaces them, and leaves no temporary file."""
    for _ in range(2):
        write_webui_files(finished, "sdxl_base_v1-0", [1.0], "")
    finished.final_adapter("kohya").unlink()
    finished.final_adapter("kohya").write_bytes(b"other weights")
    file = write_webui_files(finished, "sdxl_base_v1-0", [1.0], "")
    assert file.read_bytes() == b"other weights"
    assert sorted(path.name for path in file.parent.iterdir()) == ["ink.json", "ink.png", "ink.safetensors"]


def test_another_name(finished):
    """R-42: `--name` names the files; what no file can be called is refused."""
    file = write_webui_files(finished, "sd_v1_v", [0.8], None, name="my ink v2")
    assert file.name == "my ink v2.safetensors"
    for name in ("../ink", ".ink", "a/b", "a:b", " "):
        with raises(ConfigError, "export.name"):
            load_config(None, {"export.name": name})
    assert load_config(None, {"export.name": "my ink v2"}).export.name == "my ink v2"


def test_without_hard_links(finished, monkeypatch):
    """Where the disk has no links, the adapter is copied."""

    def refuse(*_):
        raise OSError

    monkeypatch.setattr("os.link", refuse)
    assert write_webui_files(finished, "sd_v2_768_v", [1.0], "").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("strengths", "expected"),
    [([1.0], 1.0), ([0.6, 1.0, 1.4], 1.0), ([0.0, 0.5, 1.0], 0.5), ([1.0, 0.6, 0.8], 0.8), ([0.0], 1.0)],
    ids=str,
)
def test_the_middle_strength_is_preferred(finished, strengths, expected):
    """R-42: the weight of the notes is that of the thumbnail."""
    assert preferred_strength(strengths) == expected
    shown = [one for one in strengths if one]
    for number, one in enumerate([0, *shown]):
        file = finished.sample_folder(7) / f"{number:02}.png"
        Image.new("RGB", (8, 8), (int(100 * one), 0, 0)).save(file)
    file = write_webui_files(finished, "sd_v1", strengths, None)
    assert json.loads(file.with_suffix(".json").read_text("utf-8"))["preferred weight"] == expected
    with Image.open(file.with_suffix(".png")) as thumbnail:
        assert thumbnail.getpixel((0, 0))[0] == (int(100 * expected) if shown else 0)
