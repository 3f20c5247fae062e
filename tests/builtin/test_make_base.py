"""The base's own training: it stops and goes on to the same weights, exports, and can be measured."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdlora.builtin.make_base import Place, Recipe, draw_concepts, draw_timesteps, make_base
from sdlora.builtin.state import learning_rate
from sdlora.errors import ModelError
from sdlora.reading import read_header
from tests.checks import HANG_SECONDS

RECIPE = Recipe(
    steps=2,
    batch_size=2,
    warmup=1,
    text_steps=2,
    text_batch_size=4,
    text_width=16,
    text_layers=1,
    widths=(16, 16),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_bank: Path, tiny_vae: Path) -> Place:
    """Where the straight run of two steps is."""
    return Place(tmp_path_factory.mktemp("straight"), tiny_bank, tiny_vae, log_every=1)


@pytest.fixture(scope="module")
def base(place: Place) -> Path:
    """A base trained without a stop."""
    folder = make_base(place, RECIPE)
    assert folder is not None
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a diffusers folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.parent.name}.{name}": value for file in files for name, value in load_file(file).items()}


def test_stopping_changes_nothing(base: Path, place: Place, tmp_path: Path) -> None:
    """A run that is stopped after every step ends in the weights of a run that is not."""
    stopped = replace(place, out=tmp_path)
    assert make_base(stopped, RECIPE, stop_after=1) is None
    for _ in range(3):
        folder = make_base(stopped, RECIPE, stop_after=1)
    assert folder is not None
    assert read_header(tmp_path / "joint.safetensors").metadata["step"] == "2"
    one, other = weights(base), weights(folder)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_moves_text_encoder_and_unet(base: Path, place: Place, tmp_path: Path) -> None:
    """Both parts learn; the VAE is only stored in fp16."""
    untrained = make_base(replace(place, out=tmp_path), replace(RECIPE, steps=0, text_steps=0))
    assert untrained is not None
    before, after = weights(untrained), weights(base)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"text_encoder", "unet"}
    assert {value.dtype for name, value in after.items() if not name.startswith("text")} == {torch.float16}


def test_another_recipe_is_refused(place: Place, base: Path) -> None:
    """A folder with a run of another recipe is not continued; only the learning rate's course may change."""
    assert base.is_dir()
    with pytest.raises(ModelError, match="another recipe"):
        make_base(place, replace(RECIPE, batch_size=3))
    assert RECIPE.may_continue(replace(RECIPE, steps=3, learning_rate=2e-3))


def test_a_missing_vae_is_named(place: Place, tmp_path: Path) -> None:
    """A VAE folder that holds none is one line that says how to make one."""
    with pytest.raises(ModelError, match="make_vae"):
        make_base(replace(place, out=tmp_path, vae=tmp_path), RECIPE)


def test_a_run_starts_from_another_base(base: Path, place: Place, tmp_path: Path) -> None:
    """Its weights and tokens are the other base's until they are trained."""
    started = replace(place, out=tmp_path, start=base)
    folder = make_base(started, RECIPE, stop_after=0)
    assert folder is not None
    before, after = weights(base), weights(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    vocabularies = [(part / "tokenizer" / "vocab.json").read_text() for part in (base, folder)]
    assert vocabularies[0] == vocabularies[1]
    make_base(started, RECIPE, stop_after=1)
    assert read_header(tmp_path / "joint.safetensors").metadata["step"] == "1"


def test_a_start_without_a_base_is_named(place: Place, tmp_path: Path) -> None:
    """A folder to start from that holds no base is one line."""
    with pytest.raises(ModelError, match=r"model_index\.json"):
        make_base(replace(place, out=tmp_path, start=tmp_path), RECIPE)


def test_a_sheet_is_drawn_on_the_way(place: Place, tmp_path: Path) -> None:
    """Every so many steps the average weights are sampled, and training goes on as without."""
    drawn = replace(place, out=tmp_path, sheet_every=2)
    folder = make_base(drawn, RECIPE)
    assert folder is not None
    assert [file.name for file in (tmp_path / "sheets").iterdir()] == ["000002.png"]
    one, other = weights(folder), weights(place.out / "base")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_concepts_are_seen_equally_often() -> None:
    """An epoch shows each concept once, whatever the batch size."""
    concepts = list("abcde")
    seen = [concept for step in range(5) for concept in draw_concepts(concepts, step, 3, seed=0)]
    assert {concept: seen.count(concept) for concept in concepts} == dict.fromkeys(concepts, 3)


def test_timesteps_lean_to_high_noise() -> None:
    """All timesteps lie in the schedule, and more of them in its noisier half."""
    timesteps = draw_timesteps(4000, torch.Generator().manual_seed(0))
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert 0.6 < (timesteps >= 500).float().mean() < 0.8


def test_the_learning_rate_ends_at_zero() -> None:
    """It rises, stays, and falls to almost nothing at the last step of any total."""
    assert learning_rate(0, 100, 1.0, 10, 0.5) == pytest.approx(0.1)
    assert learning_rate(30, 100, 1.0, 10, 0.5) == 1
    assert learning_rate(99, 100, 1.0, 10, 0.5) == pytest.approx(0.02)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(base: Path, place: Place, tmp_path: Path) -> None:
    """torchrun divides a batch; the weights are those of one process, up to the order of sums."""
    program = "import sys; from tests.builtin.test_make_base import *; "
    program += "make_base(Place(*map(Path, sys.argv[1:])), RECIPE)"
    arguments = [sys.executable, "-c", program, str(tmp_path), str(place.bank), str(place.vae)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(arguments, env={**os.environ, **group, "RANK": str(rank)}) for rank in range(2)
    ]
    assert [process.wait(HANG_SECONDS) for process in processes] == [0, 0]
    one, two = weights(base), weights(tmp_path / "base")
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(two[name].float(), value.float(), rtol=0, atol=2e-3, msg=name)
