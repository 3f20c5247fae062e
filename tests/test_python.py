"""The Python API: what takes an adapter takes a file or a run too; runs as data; what notebooks show."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

import sdlora
from sdlora.lora.kinds import LowRank

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def adapter() -> sdlora.Adapter:
    torch.manual_seed(0)
    return sdlora.Adapter({MODULE: LowRank(torch.randn(2, 4), torch.randn(4, 2))}, 2, 2.0, "sd1")


@pytest.fixture
def run(tmp_path, adapter) -> sdlora.RunFolder:
    """A run as it is on the disk: an adapter, some events, a grid."""
    folder = sdlora.RunFolder.create(tmp_path / "run", sdlora.RunConfig(), {"base_dtype": "fp32"})
    sdlora.save_adapter(folder.final_adapter(), adapter)
    for step, loss in ((1, 0.5), (2, 0.25)):
        folder.append("step", step, loss=loss)
    folder.append("heldout", 2, split="heldout", loss=0.3, images=4)
    folder.sample_folder(2).mkdir(parents=True)
    Image.new("RGB", (3000, 40), "red").save(folder.sample_folder(2) / "grid.png")
    folder.append("done", 2)
    return folder


def test_adapters_by_any_name(run, adapter, tmp_path):
    """R-44: an adapter, its file, its run and the run's path give the same."""
    spectra = [sdlora.spectrum(one) for one in (run.adapter, str(run.adapter), run, run.path)]
    assert all(torch.equal(one.values[MODULE], spectra[0].values[MODULE]) for one in spectra)
    assert torch.allclose(spectra[0].values[MODULE], sdlora.spectrum(adapter).values[MODULE], rtol=1e-5)
    assert sdlora.resize(run, rank=1)[0].rank == 1
    merged, _ = sdlora.merge([run, (run.path, 0.5), adapter])
    assert merged.rank == 6
    assert sdlora.inspect_adapter(run).rank == 2
    report = sdlora.export_adapter(run, tmp_path / "out.safetensors", dialect="kohya", precision="fp32")
    assert sdlora.inspect_adapter(report.path).dialect == "kohya"


def test_a_run_is_data(run):
    """R-42: losses as pairs; events as they are written, also those that come while one looks."""
    assert run.losses == [(1, 0.5), (2, 0.25)]
    assert [event["event"] for event in run.follow("step", "done")] == ["step", "step", "done"]
    with run.occupied():
        seen = []
        for event in run.follow(seconds=0.01):
            seen.append(event["event"])
            if event["event"] == "done":
                run.append("warning", 3)
            if event["event"] == "warning":
                run.process_file.unlink()
        assert seen[-2:] == ["done", "warning"]


def test_what_a_notebook_shows(run, adapter):
    """R-42: one block without scripts, small, texts escaped, images inside."""
    shown = run._repr_html_()
    assert "step 2" in shown
    assert shown.count("data:image/png;base64,") == 1
    assert len(shown) < 100_000
    adapter.notes["sdlora.name"] = "<script>alert(1)</script>"
    assert "<script>" not in adapter._repr_html_()
    tree = sdlora.AdapterTree.from_folder(run.path.parent)
    for html in (shown, adapter._repr_html_(), tree._repr_html_()):
        assert html.startswith("<div><b>")
        assert not re.search(r"<script|https?://", html)


def test_a_plan_in_a_notebook(make_images):
    """R-42: the plan as an object, with a preset by its name; no weights are loaded, nothing is written."""
    overrides = {"data.trigger": "x style", "train.steps": 7}
    plan = sdlora.plan_run(sdlora.load_config(images=make_images(), preset="openmoji", overrides=overrides))
    assert plan.config.train.evaluate_every == 200
    shown = plan._repr_html_()
    assert shown.startswith("<div><b>plan")
    assert "7; batch size 4" in shown
