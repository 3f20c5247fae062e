"""Files of samples, and the settings in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sdlora.sampling.images import SampledImage, SampleSettings, save_images

SETTINGS = SampleSettings(
    steps=20,
    guidance=3.5,
    scheduler="EulerAncestralDiscreteScheduler",
    negative_prompt="blurry, grey",
    width=32,
    height=24,
)


def make(
    prompt: str = "a cat, 猫", strength: float = 0.5, settings: SampleSettings = SETTINGS
) -> SampledImage:
    return SampledImage(Image.new("RGB", (32, 24), (1, 2, 3)), prompt, 7, strength, settings=settings)


def texts(file: Path) -> dict[str, str]:
    with Image.open(file) as image:
        image.load()
        return {str(key): str(value) for key, value in image.text.items()}  # type: ignore[attr-defined]


def test_settings_are_written_as_a1111_reads_them(tmp_path: Path) -> None:
    """R-42: prompt, negative prompt, then one line of settings in A1111's order and words."""
    grid = Image.new("RGB", (64, 64))
    saved = save_images(tmp_path, [make(strength=0), make()], grid, {"base": "builtin", "adapter": "style"})
    assert saved == tmp_path / "grid.png"
    line = "Steps: 20, Sampler: Euler a, CFG scale: 3.5, Seed: 7, Size: 32x24, Model: builtin"
    assert texts(tmp_path / "00.png")["parameters"] == f"a cat, 猫\nNegative prompt: blurry, grey\n{line}"
    assert texts(tmp_path / "01.png")["parameters"].splitlines()[0] == "a cat, 猫 <lora:style:0.5>"


def test_no_negative_prompt_no_line(tmp_path: Path) -> None:
    """R-42: and an unknown scheduler keeps its diffusers name."""
    settings = SampleSettings(steps=2, guidance=1.0, scheduler="TCDScheduler")
    save_images(tmp_path, [make("a cat", settings=settings)], Image.new("RGB", (8, 8)))
    assert texts(tmp_path / "00.png")["parameters"] == (
        "a cat\nSteps: 2, Sampler: TCDScheduler, CFG scale: 1, Seed: 7, Size: 32x24"
    )


def test_everything_is_there_as_json(tmp_path: Path) -> None:
    """R-10: enough to make the image again."""
    save_images(tmp_path, [make()], Image.new("RGB", (8, 8)), {"base": "builtin", "digest": "abc"})
    values = json.loads(texts(tmp_path / "00.png")["sdlora"])
    assert values["prompt"] == "a cat, 猫"
    assert (values["seed"], values["strength"], values["withheld"]) == (7, 0.5, False)
    assert (values["scheduler"], values["guidance"], values["steps"]) == (SETTINGS.scheduler, 3.5, 20)
    assert (values["base"], values["digest"]) == ("builtin", "abc")
    assert json.loads(texts(tmp_path / "grid.png")["sdlora"]) == {"base": "builtin", "digest": "abc"}


def test_files_are_named_in_order_and_reproducible(tmp_path: Path) -> None:
    """R-10, R-23: two digits or as many as needed, the same bytes each time, nothing temporary left."""
    images = [make() for _ in range(101)]
    for folder in ("a", "b"):
        save_images(tmp_path / folder, images, Image.new("RGB", (8, 8)))
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names[:2] == ["000.png", "001.png"]
    assert names[-2:] == ["100.png", "grid.png"]
    assert len(names) == 102
    for name in ("000.png", "grid.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_unwritable_folder_raises(tmp_path: Path) -> None:
    """R-23: nothing is written if the folder is a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_images(tmp_path / "file", [make()], Image.new("RGB", (8, 8)))
