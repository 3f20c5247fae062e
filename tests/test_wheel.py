"""The package as it is installed: a wheel that works in an empty environment, away from the clone (R-27)."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdlora.config import load_config
from sdlora.errors import ConfigError
from sdlora.presets import find_preset, list_presets
from tests.checks import raises

MAX_WHEEL_BYTES = 70e6
# What the package is built from.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "configs", "sdlora")


def test_the_wheel_has_every_package(repository):
    """R-27: each folder of the package, and the presets."""
    listed = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = (file.parent for file in (repository / "sdlora").rglob("__init__.py"))
    found = {".".join(folder.relative_to(repository).parts) for folder in folders}
    assert set(listed["packages"]) == found | {"sdlora.presets"}
    assert listed["package-dir"] == {"sdlora.presets": "configs"}


def test_the_dockerfile(repository):
    """R-27: the image has what the package is built from, and the tested versions."""
    lines = (repository / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert sorted(copied) == sorted([*SOURCES, "constraints.txt"])
    assert all((repository / name).exists() for name in copied)
    [install] = [line for line in lines if line.startswith("RUN ")]
    assert install.endswith("-c constraints.txt .")


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


@dataclass(frozen=True)
class Installed:
    """An environment of its own with the wheel, and an empty folder to work in."""

    programs: Path
    place: Path

    def call(self, *arguments: object, **changes: str) -> str:
        """What a program of the environment prints."""
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.programs / str(arguments[0])), *map(str, arguments[1:])]
        done = subprocess.run(
            command, cwd=self.place, env=clean | changes, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout


@pytest.fixture(scope="module")
def environment(repository, tmp_path_factory) -> Path:
    """The programs of an environment with the wheel; the libraries are those of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        (source / name).symlink_to(repository / name)
    wheels = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(wheels, check=True)
    [wheel] = folder.glob("sdlora-*.whl")
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    # The wheel comes before the libraries.
    [packages] = (folder / "venv").glob("lib/python*/site-packages")
    libraries = next(path for path in sys.path if (Path(path) / "torch").is_dir())
    (packages / "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")
    return python.parent


@pytest.fixture
def installed(environment, tmp_path, shared_cache) -> Installed:
    place = tmp_path / "elsewhere"
    place.mkdir()
    return Installed(environment, place)


# A run of seconds; the README's commands have no settings.
QUICK = ("train.steps=4", "train.save_every=2", "lora.rank=2", "sample.steps=2")


def readme_commands(repository: Path, title: str) -> list[list[str]]:
    """The commands of the first block under a title, without comments."""
    text = (repository / "README.md").read_text(encoding="utf-8").split(f"\n{title}\n", 1)[1]
    block = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    assert block
    return [words for line in block[1].splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.slow
def test_a_wheel_trains_away_from_the_clone(installed, make_images):
    """R-27: installed in an environment of its own, from another folder: preset, built-in base, training."""
    assert str(installed.programs.parent) in installed.call("sdlora", "settings", "--presets")
    images, settings = make_images("style"), ("train.steps=2", "lora.rank=2")
    planned = installed.call("sdlora", "train", images, "--preset", "openmoji", "--json", *settings)
    assert json.loads(planned)["steps"] == 2
    trained = ("train", images, "--preset", "openmoji", *settings, "train.sample_every=0")
    assert "runs/style/adapters/final.safetensors" in installed.call("sdlora", *trained)
    assert (installed.place / "runs/style/adapters/final.safetensors").is_file()


@pytest.mark.slow
def test_the_first_hour_of_an_illustrator(installed, make_images, repository):
    """R-27: the README's commands in their order, on a folder without captions."""
    images = make_images("mine", sizes=((128, 128),) * 12).rename(installed.place / "my-images")
    shutil.copyfile(next(images.glob("*.png")), installed.place / "photo.png")
    for caption in images.glob("*.txt"):
        caption.unlink()
    known = {"BASE": ["builtin"], "100,200,final": ["2,final"], "--preset": [], "sd15": []}
    done = []
    for words in readme_commands(repository, "## Your own style"):
        if words[:2] in (["sdlora", "studio"], [".", ".venv/bin/activate"]):
            continue
        call = [new for word in words for new in known.get(word, [word])]
        if words[1] == "doctor":
            call += ["--trigger", "inkwash style"]
        call += {"caption": ["--model", "builtin"], "train": QUICK, "evaluate": ["--step", "final"]}.get(
            words[1], []
        )
        installed.call(*call)
        done.append(words[1])
    assert done == ["doctor", "caption", "train", "sample", "sample", "compare", "evaluate", "report"]
    run = installed.place / "runs" / "my-images"
    assert (run / "report.html").is_file()
    assert (run / "webui" / "my-images.safetensors").is_file()


@pytest.mark.slow
def test_the_first_hour_with_kohyas_files(installed, make_images):
    """R-35: a config and `N_name` folders of sd-scripts; the file that UIs read."""
    images = make_images("10_ink")
    folder = installed.place / "img"
    folder.mkdir()
    images.rename(folder / images.name)
    config = (
        'pretrained_model_name_or_path = "builtin"\nnetwork_dim = 2\nnetwork_alpha = 1\nmax_train_steps = 2\n'
    )
    (installed.place / "kohya.toml").write_text(config, encoding="utf-8")
    (installed.place / "my.toml").write_text(
        installed.call("sdlora", "settings", "--from", "kohya.toml"), encoding="utf-8"
    )
    assert "lora.rank" in installed.call("sdlora", "settings", "network_dim")
    plan = json.loads(installed.call("sdlora", "train", "img", "--config", "my.toml", "--json"))
    assert plan["settings"]["lora"]["rank"] == 2
    installed.call("sdlora", "train", "img", "--config", "my.toml", "train.sample_every=0")
    facts = installed.call("sdlora", "info", "runs/img/adapters/final.kohya.safetensors", "--json")
    assert list(json.loads(facts)["ranks"]) == ["2"]


@pytest.mark.slow
def test_the_first_hour_in_python(installed, make_images, repository):
    """R-42: the README's block from Python, and the one that loads the file without sdlora."""
    make_images("mine").rename(installed.place / "my-images")
    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text("utf-8"), re.DOTALL)
    load, use = (next(block for block in blocks if word in block) for word in ("pipe(", "sdlora.train("))
    quick = {key: json.loads(value) for key, value in (pair.split("=") for pair in QUICK)}
    use = use.replace('{"lora.rank": 8}', f"{quick | {'lora.rank': 8}}")
    load = load.replace("runs/openmoji", "runs/my-images").replace("=25", "=2")
    load = load.replace('"sdlora/builtin/base"', "f'{sdlora.__path__[0]}/builtin/base'")
    script = f"{use}\nfrom diffusers import StableDiffusionPipeline\n{load}\nprint(run.losses, image.size)"
    assert "(128, 128)" in installed.call("python", "-c", script)


@pytest.mark.slow
def test_the_first_hour_on_several_processes(installed, make_images, repository):
    """R-20: the README's `torchrun` line; what programs read of it; the log of the run."""
    make_images("mine").rename(installed.place / "my-images")
    words = readme_commands(repository, "## Multiple GPUs and hosts")[0]
    words = ["2" if word == "4" else "builtin" if word == "BASE" else word for word in words]
    call = ["python", "-m", "torch.distributed.run", *words[1:], "--trigger", "x style", *QUICK]
    installed.call(*call, "train.sample_every=0", OMP_NUM_THREADS="1")
    run = installed.place / "runs" / "my-images"
    assert "global batch 8" in (run / "train.log").read_text(encoding="utf-8")
    assert json.loads(installed.call("sdlora", "info", run, "--json"))


@pytest.mark.slow
def test_the_first_hour_of_a_researcher(installed, make_images):
    """R-42: two runs, compared; rank, sums and merges of files."""
    images = make_images("mine", sizes=((128, 128),) * 12)
    for name, rank in (("a", 2), ("b", 4)):
        out = f"runs/{name}"
        installed.call(
            "sdlora", "train", images, "--out", out, *QUICK, f"lora.rank={rank}", "train.sample_every=0"
        )
    prompt = ("--prompt", "a fox", "--steps", "2", "--seeds", "0")
    installed.call("sdlora", "compare", "runs/a", "runs/b", *prompt, "--strengths", "0.5,1")
    installed.call("sdlora", "spectrum", "runs/b")
    installed.call("sdlora", "advise-rank", "runs/b")
    installed.call("sdlora", "merge", "runs/a:0.6", "runs/b:0.4", "--out", "sum.safetensors")
    assert json.loads(installed.call("sdlora", "info", "sum.safetensors", "--json"))["ranks"].keys() == {"6"}


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
