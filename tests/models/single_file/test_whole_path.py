"""The main job from a single file: trained, resumed, sampled, evaluated, exported, without a socket."""

from __future__ import annotations

import hashlib
import math
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import sdlora
from sdlora.errors import AdapterError, ConfigError
from sdlora.formats.files import inspect_adapter, load_adapter
from sdlora.runs import RunFolder
from tests.checks import assert_same_image, raises

FAMILIES = ("sd1", "sd2", "sdxl")
SETTINGS: dict[str, Any] = {
    "data.resolution": 32,
    "data.heldout": 0.3,
    "lora.rank": 2,
    "train.learning_rate": 0.01,
    "train.steps": 2,
    "train.save_every": 1,
    "train.sample_every": 0,
    "train.evaluate_every": 0,
    "sample.steps": 2,
    "sample.seeds": [0],
    "sample.strengths": [1.0],
    "sample.prompts": ["a circle"],
}


@dataclass(frozen=True)
class Pair:
    """The same run twice: on a single file, and on the folder with the same weights."""

    file: RunFolder
    folder: RunFolder


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a socket was opened")


@pytest.fixture(scope="module")
def runs(
    tiny_bases: Mapping[str, Any], draw_images: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Pair]]:
    """Trained with every door to the network shut (R-39); tests only look at them."""
    root = tmp_path_factory.mktemp("single-files")
    images = draw_images(root / "pictures", ((48, 32),) * 3 + ((32, 32),) * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE")
        for name in ("socket", "create_connection", "getaddrinfo"):
            patch.setattr(socket, name, refuse)
        patch.setenv("SDLORA_CACHE", str(root / "cache"))
        patch.chdir(tiny_bases["sd1"].file.parent)
        found = {}
        for family in FAMILIES:
            settings = {**SETTINGS, "train.sample_every": 2} if family == "sd1" else SETTINGS
            sources = {"file": tiny_bases[family].file.name, "folder": str(tiny_bases[family].folder)}
            found[family] = Pair(
                **{
                    kind: sdlora.train(
                        images, base=source, out=root / f"{family}-{kind}", overrides=settings, quiet=True
                    )
                    for kind, source in sources.items()
                }
            )
        yield found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_trains_as_its_folder(runs: Mapping[str, Pair], family: str) -> None:
    """R-01, R-40, R-43: the same LoRA; each file was loaded back into a stock pipeline.

    Not to the bit: two loaders place the weights differently in memory, kernels round by that, and AdamW
    makes whole steps of gradients next to nothing.
    """
    pair = runs[family]
    for dialect in ("diffusers", "kohya"):
        ours, theirs = (load_file(run.final_adapter(dialect)) for run in (pair.file, pair.folder))
        assert ours.keys() == theirs.keys()
        difference = math.hypot(*(float((ours[name] - theirs[name]).float().norm()) for name in ours))
        assert difference < 0.01 * math.hypot(*(float(theirs[name].float().norm()) for name in ours))
    kinds = [event["event"] for event in pair.file.events()]
    assert kinds[-1] == "done"
    adapter = load_adapter(pair.file.adapter)
    assert adapter.family == family
    assert adapter.notes["sdlora.base_name"] == f"tiny-{family}"


def test_the_base_s_hashes_are_the_file_s(runs: Mapping[str, Pair], tiny_bases: Mapping[str, Any]) -> None:
    """R-42: as web UIs compute them, so that they find the base; a folder has none."""
    raw = tiny_bases["sdxl"].file.read_bytes()
    metadata = inspect_adapter(runs["sdxl"].file.adapter).metadata
    assert metadata["ss_new_sd_model_hash"] == hashlib.sha256(raw).hexdigest()
    assert metadata["ss_sd_model_hash"] == hashlib.sha256(raw[2**20 : 2**20 + 2**16]).hexdigest()[:8]
    assert not any(
        "model_hash" in key for key in inspect_adapter(runs["sdxl"].folder.adapter).metadata if "sd_" in key
    )


def test_a_run_finds_its_file_from_anywhere(
    runs: Mapping[str, Pair], tiny_bases: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-03, R-10, R-40: the path is kept whole; sampling, evaluating and resuming work in another folder."""
    monkeypatch.chdir(tmp_path)
    run = runs["sd1"].file
    pictures = [np.asarray(Image.open(one.sample_folder(2) / "01.png")) for one in (run, runs["sd1"].folder)]
    assert_same_image(*pictures)
    assert run.read_config().base.source == str(tiny_bases["sd1"].file)
    grid = sdlora.sample(run, step=2, out=tmp_path / "again")
    again, before = (np.asarray(Image.open(f / "01.png")) for f in (grid.parent, run.sample_folder(2)))
    assert np.array_equal(again, before)
    assert sdlora.evaluate(run).images == 2
    longer = sdlora.resume(run.path, {"train.steps": 3}, quiet=True)
    assert longer.read_config().train.steps == 3


def test_a_notice_is_printed(
    tiny_bases: Mapping[str, Any], make_images: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """R-32: an assumption about a file is printed before anything is loaded."""
    base = str(tiny_bases["sdxl"].file)
    sdlora.train(
        make_images(sizes=((32, 32),) * 2),
        base=base,
        out=tmp_path / "run",
        dry_run=True,
        overrides={"data.resolution": 32},
    )
    assert "epsilon is assumed" in capsys.readouterr().out


@pytest.mark.parametrize("trained_on", FAMILIES)
def test_another_family_is_refused(
    runs: Mapping[str, Pair], tiny_bases: Mapping[str, Any], make_images: Any, tmp_path: Path, trained_on: str
) -> None:
    """R-41: in every direction and dialect, sampling or starting from it; before weights are loaded."""
    for other in set(FAMILIES) - {trained_on}:
        base = str(tiny_bases[other].file)
        for dialect in ("diffusers", "kohya"):
            file = runs[trained_on].file.final_adapter(dialect)
            with pytest.raises(AdapterError) as caught:
                sdlora.sample(file, base=base, prompts=["a cat"], out=tmp_path / "grid")
            assert f"is for family {trained_on}" in str(caught.value)
            assert f"base tiny-{other} is {other}; pass a base of family {trained_on}" in str(caught.value)
        with pytest.raises(AdapterError, match=rf"^lora\.init_from = .* is for family {trained_on}"):
            sdlora.train(
                make_images(f"for-{other}", sizes=((32, 32),) * 2),
                base=base,
                out=tmp_path / "run",
                quiet=True,
                overrides={"data.resolution": 32, "lora.init_from": str(file)},
            )


def test_a_lora_file_asks_for_its_base(runs: Mapping[str, Pair], tmp_path: Path) -> None:
    """R-40: the name of a file is no path."""
    with raises(ConfigError, "option--base", shows="tiny-sd1"):
        sdlora.sample(runs["sd1"].file.adapter, prompts=["a cat"], out=tmp_path / "grid")


def test_a_base_is_no_lora_and_a_lora_no_base(
    runs: Mapping[str, Pair], tiny_bases: Mapping[str, Any], make_images: Any, tmp_path: Path
) -> None:
    """R-25, R-40: each is named for what it is, wherever it was given."""
    base, lora = tiny_bases["sdxl"].file, runs["sdxl"].file.adapter
    for read in (inspect_adapter, load_adapter):
        with pytest.raises(AdapterError, match="is a base model, not a LoRA"):
            read(base)
    with raises(AdapterError, "lora.is-a-base"):
        load_adapter(tiny_bases["sdxl"].folder)
    with raises(AdapterError, "lora.is-a-base", shows="--base"):
        sdlora.sample(tiny_bases["sdxl"].folder, prompts=["a cat"], out=tmp_path / "grid")
    images = make_images(sizes=((32, 32),) * 2)
    with raises(sdlora.errors.ModelError, "base.is-lora"):
        sdlora.train(images, base=str(lora), out=tmp_path / "run", quiet=True)
    with pytest.raises(AdapterError, match=r"^lora\.init_from: .* is a base model, not a LoRA"):
        sdlora.train(
            images,
            base=str(base),
            out=tmp_path / "run",
            quiet=True,
            overrides={"data.resolution": 32, "lora.init_from": str(base)},
        )
