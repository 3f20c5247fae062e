"""Comparisons: axes of one grid, sums of LoRAs, what is kept, and the losses."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sdlora
from sdlora.config import load_config
from sdlora.data.cache import cache_folder, measure_cache, trim_cache
from sdlora.errors import AdapterError, ConfigError, RunError
from sdlora.evaluation.compare import plan_comparison, score_columns, with_bases
from sdlora.export.export import export_adapter
from sdlora.formats.files import load_adapter, split_sum
from sdlora.lora.adapter import Adapter
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.runs import RunFolder
from sdlora.sampling import store
from sdlora.sampling.generate import Cell, Column, make_sample
from sdlora.sampling.grid import make_grid, make_pages
from sdlora.sampling.images import SampledImage, SampleSettings
from sdlora.sampling.session import SampleRequest
from sdlora.sampling.store import ImageStore
from tests.checks import raises
from tests.lora_fixtures import create_adapter

QUICK: dict[str, Any] = {"base": "builtin", "seeds": [0], "steps": 1, "size": (64, 64)}
LORA = {"sdlora.base_name": "builtin", "sdlora.family": "sd1"}


@pytest.fixture(scope="module")
def files(base: StableDiffusion, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRA files, ink and comic."""
    folder, other = tmp_path_factory.mktemp("loras"), create_adapter(
        base.denoiser, list(adapter.modules)[:4], 2, 2, seed=1, family="sd1"
    )  # fmt: skip
    for pair in other.modules.values():
        pair.up = torch.full(pair.up.shape, 0.4)
        pair.down = pair.down.detach()
    named = {"ink": adapter, "comic": other}
    return [
        export_adapter(one, folder / f"{name}.safetensors", metadata=LORA).path for name, one in named.items()
    ]


def make_run(folder: Path, early: Path, final: Path, trigger: str, loss: float) -> RunFolder:
    """A finished run as its files say: adapters at 10 and 20 steps, losses at 0, 10 and 20."""
    keys = {"data.trigger": trigger, "sample.prompts": [f"{trigger}, a cat"], "sample.strengths": [1.0]}
    run = RunFolder.create(folder, load_config(None, keys, images=folder), {"base_dtype": "fp32"})
    run.adapters.mkdir()
    for place, file in ((run.step_adapter(10), early), (run.final_adapter(), final)):
        place.write_bytes(file.read_bytes())
    run.append("plan", 0, dataset_digest=trigger)
    for step in (0, 10, 20):
        run.append("step", step, loss=1.0, loss_ema=1.0)
        run.append("heldout", step, split="heldout", loss=1.0 - loss * step, images=2)
    run.append("done", 20)
    return run


@pytest.fixture
def runs(files: list[Path], tmp_path: Path) -> list[RunFolder]:
    one, two = files
    return [
        make_run(tmp_path / "one", one, two, "onestyle", 0.01),
        make_run(tmp_path / "two", two, one, "twostyle", 0.02),
    ]


def texts(folder: Path) -> list[dict[str, Any]]:
    """What the images of a comparison say of themselves."""
    return [json.loads(Image.open(file).text["sdlora"]) for file in (folder / "images").glob("*.png")]  # type: ignore[attr-defined]


def test_axes_of_one_grid(files: list[Path], tmp_path: Path) -> None:
    """R-13: LoRAs × strengths × guidance; one more strength draws only that, the base never again."""
    out, counts = tmp_path / "out", []
    ask = {**QUICK, "prompts": ["a cat"], "guidance": [2, 7.5], "out": out}
    first = sdlora.compare(files, strengths=[0.5], **ask)
    assert {(one["adapter"], one["strength"], one["guidance"]) for one in texts(out)} == {
        (name, 0.5, guidance) for name in ("ink", "comic") for guidance in (2, 7.5)
    }
    assert {kind: count for kind, count, _ in measure_cache(cache_folder())}["images"] == 2
    before = {file: file.stat().st_mtime_ns for file in (out / "images").iterdir()}
    more = sdlora.compare(files, strengths=[0.5, 1], progress=lambda done, total: counts.append(done), **ask)
    assert counts == [8, 10], "six were there; the others are two batches, for two guidance scales"
    assert len(texts(out)) == 8
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert first.grids == more.grids == [out / "grid.png"]
    assert more.losses == []
    assert more._repr_png_() == (out / "grid.png").read_bytes()


def test_only_the_trigger_differs(files: list[Path], tmp_path: Path) -> None:
    """R-30: words that contain a trigger, or are in another case, stay as they were written."""
    one, two = (make_run(tmp_path / name, *files, name, 0.01) for name in ("one", "two"))
    request = SampleRequest(out=tmp_path / "out", settings={"prompts": ["bones and stone, ONE"]})
    plan = plan_comparison([one.path, two.path], request).checked(request)
    assert plan.prompts == ["bones and stone, {trigger}"]


@pytest.mark.parametrize(("written", "trigger"), [(" ink ", "ink"), ("x" * 5000, None), ("  ", None)])
def test_the_trigger_of_a_file(files: list[Path], tmp_path: Path, written: str, trigger: str | None) -> None:
    """R-25, R-30: it fills `{trigger}`; what a stranger wrote there refuses no file."""
    file = tmp_path / "stranger.safetensors"
    metadata = {**LORA, "modelspec.trigger_phrase": written}
    export_adapter(load_adapter(files[0]), file, metadata=metadata)
    request = SampleRequest(out=tmp_path / "out", settings={"prompts": ["a cat"]})
    assert plan_comparison([file], request).config.data.trigger == trigger


class Pixels:
    """Features that need no model."""

    name, content_scale = "pixels", (0.0, 1.0)

    def style(self, images: Sequence[Image.Image]) -> Any:
        return np.stack([np.asarray(image, dtype=float).ravel() for image in images])

    content = style


def test_a_score_does_not_depend_on_its_neighbours(runs: list[RunFolder], tmp_path: Path) -> None:
    """R-13: each adapter is measured against what the base draws for its own trigger."""
    prompts = [f"{{trigger}}, a {thing}" for thing in ("cat", "dog", "house", "tree")]
    settings = {"prompts": prompts, "strengths": [1.0], "seeds": [0], "steps": 1}
    request = SampleRequest(out=tmp_path / "out", size=(64, 64), settings=settings)
    plan = plan_comparison(runs, request)
    bases = [column for column in with_bases(plan).columns if not column.stack]
    assert [column.trigger for column in bases] == [None, "twostyle"]
    assert plan.trigger == "onestyle"
    same = replace(plan, prompts=["a cat"])
    assert with_bases(same) is same
    scores = []
    for order in (runs, runs[::-1]):
        both = with_bases(plan_comparison(order, replace(request, out=tmp_path / f"out-{order[0].name}")))
        rows, _ = score_columns(both, both.draw(ImageStore(tmp_path / "images")), Pixels())
        scores.append({row.name: row.content for row in rows})
    assert scores[0] == scores[1]
    assert len({one.value for one in scores[0].values()}) == 2


def test_a_damaged_image_is_drawn_again(files: list[Path], tmp_path: Path) -> None:
    """R-25: as is one of another size; the grid is the same."""
    ask = {**QUICK, "prompts": ["a cat"], "strengths": [1], "out": tmp_path / "out"}
    whole = sdlora.compare(files[0], **ask)._repr_png_()
    [style] = (tmp_path / "out" / "images").iterdir()
    [base] = cache_folder().rglob("*.png")
    style.write_bytes(style.read_bytes()[:200])
    Image.new("RGB", (8, 8)).save(base)
    assert sdlora.compare(files[0], **ask)._repr_png_() == whole


def test_images_of_the_base_are_kept_for_what_made_them(
    base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-10, R-21: not for another dtype, kernel, processor or setting; those used last stay."""
    monkeypatch.setattr(store, "MAX_CACHED", 0)
    cell = Cell(Column(), "a cat", 0, SampleSettings(steps=1, guidance=1.0, scheduler="DDIMScheduler"))
    images = ImageStore()
    file = images.file(base, cell)
    assert images.file(base, replace(cell, settings=replace(cell.settings, batch_size=1))) == file
    others = {images.file(replace(base, dtype=torch.bfloat16), cell)}
    others |= {images.file(base, replace(cell, seed=1))}
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "attention_kernel", "another")
        others |= {images.file(base, cell)}
    monkeypatch.setattr(store, "describe_processor", lambda device: "another")
    assert len(others | {file, images.file(base, cell)}) == 5
    ImageStore().put(base, cell, make_sample(cell, Image.new("RGB", (8, 8))))
    assert not list(cache_folder().rglob("*.png"))
    folder = cache_folder() / "images" / "00"
    folder.mkdir(parents=True)
    for name, age in (("a", 1), ("b", 3), ("c", 2)):
        (folder / f"{name}.png").write_bytes(b"12345678")
        os.utime(folder / f"{name}.png", (age, age))
    trim_cache(cache_folder() / "images", 16)
    assert sorted(file.name for file in folder.iterdir()) == ["b.png", "c.png"]


def test_runs_and_steps(runs: list[RunFolder], tmp_path: Path) -> None:
    """R-13, R-30: each run with its own trigger; a table of losses that says what it cannot show; curves."""
    out = tmp_path / "out"
    ask = {**QUICK, "step": [10, "final"], "out": out}
    result = sdlora.compare([runs[0], str(runs[1].path)], **ask)
    assert sorted({(one["adapter"], one["prompt"]) for one in texts(out)}) == [
        (f"{run}, {step}", f"{run}style, a cat") for run in ("one", "two") for step in ("final", "step 10")
    ]
    assert [(row.name, row.step, row.losses) for row in result.losses] == [
        ("one, step 10", 10, {"heldout": pytest.approx(0.9)}),
        ("one, final", 20, {"heldout": pytest.approx(0.8)}),
        ("two, step 10", 10, {"heldout": pytest.approx(0.8)}),
        ("two, final", 20, {"heldout": pytest.approx(0.6)}),
    ]
    lines = result.lines()
    assert lines[1].split() == ["one,", "step", "10", "10", "0.9000", "(-10%)"]
    assert [line.split()[0] for line in lines[5:]] == ["note:", "note:", "curves", "grid"]
    assert result.curves
    assert result.curves.is_file()
    assert json.loads((out / "compare.json").read_text(encoding="utf-8"))["losses"][3]["step"] == 20
    with raises(RunError, "run.no-step", shows="saved steps: 10"):
        sdlora.compare(runs, **{**ask, "step": 15})


def test_a_sum_is_what_its_parts_are_together(files: list[Path], tmp_path: Path) -> None:
    """Each part at its factor; the grid's strength is that of the whole; the same as the merged file."""
    ink, comic = files
    merged, _ = sdlora.merge([(sdlora.load_adapter(ink), 0.6), (sdlora.load_adapter(comic), -0.4)])
    ask = {**QUICK, "prompts": ["a cat"]}
    sdlora.sample([f"{ink}:0.6+{comic}:-0.4", merged], strengths=[1], out=tmp_path / "out", **ask)
    _, one, other = (np.asarray(Image.open(tmp_path / "out" / f"0{n}.png"), dtype=int) for n in range(3))
    assert np.abs(one - other).max() <= 2
    sdlora.sample(f"{ink}:0.6+{comic}:-0.4", out=tmp_path / "own", **ask)
    assert len(list((tmp_path / "own").iterdir())) == 3, "a sum is shown as it is given"


def test_sums_are_split(tmp_path: Path, files: list[Path]) -> None:
    """A file may have such a name; what is no number belongs to the path."""
    odd = tmp_path / "a+b:2.safetensors"
    odd.write_bytes(files[0].read_bytes())
    assert split_sum(odd) == [(odd, 1.0)]
    assert split_sum(str(odd)[: -len(".safetensors")])[0][1] == 1.0
    assert split_sum("x:.5 + y") == [("x", 0.5), ("y", 1.0)]
    assert split_sum("c:/x.safetensors") == [("c:/x.safetensors", 1.0)]
    with raises(ConfigError, "lora.sum", shows="x:1+"):
        split_sum("x:1+")
    with raises(AdapterError, "lora.missing", shows="nowhere"):
        sdlora.sample(f"{files[0]}:1+nowhere:2", prompts=["a cat"], **QUICK)


def test_compare_command(sdlora: Any, runs: list[RunFolder], tmp_path: Path) -> None:
    """The options of the command; mistakes are one line."""
    quick = ("--seeds", 0, "--steps", 1, "--size", "64x64", "--prompt", "{trigger}, a cat")
    code, printed, errors = sdlora("compare", *(run.path for run in runs), *quick, "--json")
    assert code == 0, errors
    found = json.loads(printed)
    assert found["folder"] == "samples/compare-one-two"
    assert [row["name"] for row in found["losses"]] == ["one", "two"]
    for wrong, key in (
        (["--steps", "0"], "sample.steps"),
        (["--step", "soon"], "option--step"),
        (["--guidance", "a"], "option--guidance"),
        (["--scheduler", "Eulr"], "sample.scheduler"),
    ):
        code, _, errors = sdlora("compare", runs[0].path, *quick[:2], "--prompt", "x", *wrong)
        assert (code, len(errors)) == (2, 1)
        assert key in sdlora.keys
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "grid.png").write_bytes(b"mine")
    assert sdlora("compare", runs[0].path, *quick, "--out", mine)[0] == 2
    assert (mine / "grid.png").read_bytes() == b"mine"
    inside = Path(runs[0].read_config().images) / "new"
    for verb in ("sample", "compare"):
        assert sdlora(verb, runs[0].path, *quick, "--out", inside)[0] == 2
        assert sdlora.keys == ("option--out.images",)
        assert not inside.exists()


def test_settings_are_rows_and_large_grids_have_pages() -> None:
    """R-13: a row for each setting; every page has the base, and a sample is on one page alone."""
    samples = [
        SampledImage(
            Image.new("RGB", (16, 16), (s, g, 9)), "a", 0, s, "", SampleSettings(guidance=g), f"n{s}"
        )
        for g in (3, 7)
        for s in range(30)
    ]
    pages = make_pages(samples, title="t")
    assert len(pages) == 3
    seen = [
        sum((np.asarray(page) == sample.image.getpixel((0, 0))).all(axis=2).sum() > 0 for page in pages)
        for sample in samples
    ]
    assert seen == [3 if sample.strength == 0 else 1 for sample in samples]
    two, one = make_grid(samples), make_grid(samples[:30])
    assert two.height > one.height + 16
    assert two.width == one.width


def test_an_image_to_start_from(sdlora: Any, files: list[Path], tmp_path: Path) -> None:
    """R-13: beside its samples, which say so; kept apart by image; mistakes are one line."""
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (60, 30), color).save(tmp_path / f"{name}.png")
    ask = ("sample", files[0], "--base", "builtin", "--prompt", "a cat", "--steps", 2, "--strengths", 1)
    for name in "ab":
        start = ("--image", tmp_path / f"{name}.png", "--denoise", 0.5)
        code, _, errors = sdlora(*ask, *start, "--out", tmp_path / name)
        assert code == 0, errors
    shown = [Image.open(tmp_path / name / "00.png") for name in "ab"]
    assert shown[0].size == (184, 88), "its aspect ratio, and the area of the base's images"
    assert shown[0].tobytes() != shown[1].tobytes()
    said = json.loads(shown[0].text["sdlora"])  # type: ignore[attr-defined]
    assert (said["image"], said["denoise"], "start" in said) == ("a.png", 0.5, False)
    assert "Denoising strength: 0.5" in shown[0].text["parameters"]  # type: ignore[attr-defined]
    for wrong, key in (
        (("--denoise", 0.5), "option--denoise"),
        (("--image", tmp_path / "a.png", "--denoise", 1.2), "option--denoise"),
        (("--image", tmp_path / "a.png", "--denoise", 0.1), "sample.steps"),
        (("--image", tmp_path / "none.png"), "option--image"),
    ):
        code, _, errors = sdlora(*ask, *wrong)
        assert (code, len(errors)) == (2, 1), wrong
        assert key in sdlora.keys
