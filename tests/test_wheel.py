"""The package as it is installed: a wheel that works in an empty environment, away from the clone (R-27)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from sdlora.config import load_config
from sdlora.errors import ConfigError
from sdlora.presets import find_preset, list_presets
from tests.checks import raises

MAX_WHEEL_BYTES = 70e6


def test_the_wheel_has_every_package(repository):
    """R-27: each folder of the package, and the presets."""
    listed = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = (file.parent for file in (repository / "sdlora").rglob("__init__.py"))
    found = {".".join(folder.relative_to(repository).parts) for folder in folders}
    assert set(listed["packages"]) == found | {"sdlora.presets"}
    assert listed["package-dir"] == {"sdlora.presets": "configs"}


def test_presets_by_name(sdlora, tmp_path, repository):
    """R-35: a preset by name, or by some of its words; the settings of a file win over it."""
    assert list_presets() == {file.stem: file for file in (repository / "configs").glob("*.toml")}
    assert find_preset("sd15").stem == "sd15"
    assert find_preset("sdxl-12gb").stem == "sdxl-qlora-12gb"
    own = tmp_path / "own.toml"
    own.write_text("[train]\nschedule = 'linear'\n", encoding="utf-8")
    merged, preset = load_config(own, preset="sd15-8gb"), load_config(find_preset("sd15-8gb"))
    assert merged == preset.replace(train={"schedule": "linear"})
    for name, shown in (("sd5", "sd15"), ("8gb", "sdxl-qlora-8gb")):
        with raises(ConfigError, "option--preset", shows=(name, shown)):
            find_preset(name)
    code, printed, _ = sdlora("settings", "--presets")
    assert code == 0
    assert all(f"  {name} " in printed for name in list_presets())


@pytest.mark.slow
def test_a_wheel_trains_away_from_the_clone(repository, make_images, tmp_path):
    """R-27: installed in an environment of its own, from another folder: preset, built-in base, training."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "configs", "sdlora"):
        (source / name).symlink_to(repository / name)
    wheels = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(wheels, check=True)
    [wheel] = tmp_path.glob("sdlora-*.whl")
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    # What it depends on is that of the environment of the tests; the wheel comes first.
    [packages] = (tmp_path / "venv").glob("lib/python*/site-packages")
    libraries = next(path for path in sys.path if (Path(path) / "torch").is_dir())
    (packages / "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")
    place = tmp_path / "elsewhere"
    place.mkdir()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*arguments: object) -> str:
        command = [tmp_path / "venv" / "bin" / "sdlora", *arguments]
        done = subprocess.run(command, cwd=place, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(packages) in call("settings", "--presets")
    images = make_images("style")
    planned = call("train", images, "--preset", "openmoji", "--json", "train.steps=2", "lora.rank=2")
    assert json.loads(planned)["steps"] == 2
    printed = call(
        "train", images, "--preset", "openmoji", "train.steps=2", "lora.rank=2", "train.sample_every=0"
    )
    assert "runs/style/adapters/final.safetensors" in printed
    assert (place / "runs/style/adapters/final.safetensors").is_file()


@pytest.mark.slow
def test_what_is_published(repository, tmp_path):
    """R-27: `python -m build` makes a source archive and a wheel that twine accepts, without a network."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(repository)]
    subprocess.run(build, check=True, capture_output=True)
    files = sorted(str(file) for file in tmp_path.iterdir())
    assert [Path(file).suffix for file in files] == [".whl", ".gz"]
    checked = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(checked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
