"""Smaller ranks, and what they cost."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from sdlora.errors import AdapterError, ConfigError
from sdlora.formats.files import inspect_adapter, load_adapter, save_adapter
from sdlora.formats.write import round_adapter
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import match_targets
from sdlora.lora.kinds import LowRank
from sdlora.lora.layers import carrier_layers
from sdlora.rank.merge import merge
from sdlora.rank.resize import resize
from tests.checks import raises


def test_rules_keep_what_they_say(make_pair):
    """Fixed rank, share of energy, ratio to the largest value, score against the base."""
    adapter = Adapter({"a": make_pair([8, 4, 2, 1]), "b": make_pair([1, 0.1, 0.1, 0.1])}, 4, 4.0)

    def ranks(**rule):
        small, report = resize(adapter, **rule)
        assert {name: pair.rank for name, pair in small.modules.items()} == {
            name: rank for name, rank in report.ranks.items() if rank
        }
        assert small.alpha == small.rank == max(report.ranks.values())
        return report.ranks

    assert ranks(rank=3) == {"a": 3, "b": 3}
    assert ranks(rank=99) == {"a": 4, "b": 4}
    assert ranks(energy=0.9) == {"a": 2, "b": 1}
    assert ranks(energy=0.99) == {"a": 4, "b": 3}
    assert ranks(ratio=0.24) == {"a": 3, "b": 1}
    assert ranks(score=0.3, base_norms={"a": 10, "b": 3}) == {"a": 2, "b": 1}
    assert ranks(score=0.3, base_norms={"a": 10, "b": 4}) == {"a": 2, "b": 0}


def test_error_is_what_was_lost(uneven, deltas):
    """The error reported is measured on the dense changes."""
    small, report = resize(uneven, ratio=0.3)
    before, after = deltas(uneven), deltas(small)
    assert len(set(report.ranks.values())) > 2
    difference = sum(float((before[name] - after[name]).square().sum()) for name in before)
    whole = sum(float(change.square().sum()) for change in before.values())
    assert report.error == pytest.approx(math.sqrt(difference / whole), rel=1e-5)
    name, error = report.worst
    lost = float((before[name] - after[name]).norm() / before[name].norm())
    assert error == pytest.approx(lost, rel=1e-5)
    assert report.after == small.num_parameters < report.before == uneven.num_parameters
    assert f"{report.error:.2%}" in report.lines()[-1]
    assert name in report.lines()[-1]


def test_full_energy_changes_nothing(uneven, deltas):
    """R-02: alpha == rank, and the same change to 1e-6, a module with a scale of its own included."""
    uneven.scales[next(iter(uneven.modules))] = 0.25
    small, report = resize(uneven, energy=1.0)
    assert small.alpha == small.rank
    assert not small.scales
    before = deltas(uneven)
    for name, change in deltas(small).items():
        assert float((change - before[name]).abs().max()) < 1e-6
    assert report.error < 1e-3


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_size_is_kept(uneven, tmp_path, dialect):
    """The file is at most as large as asked, and not much smaller."""
    uneven.notes["ss_tag_frequency"] = "x" * 5000
    small, _ = resize(uneven, size_mb=0.25, dialect=dialect, precision="fp32")
    size = save_adapter(tmp_path / "small.safetensors", small, dialect=dialect).stat().st_size
    assert 0.21e6 < size <= 0.25e6


def test_size_is_spent_where_the_energy_is(uneven):
    """Within the same number of parameters, one rank for all modules keeps less."""
    small, report = resize(uneven, size_mb=0.165, precision="fp32")
    uniform, other = resize(uneven, rank=2)
    assert small.num_parameters < uniform.num_parameters
    assert report.error < other.error


@pytest.mark.parametrize("rule", [{"rank": 12}, {"size_mb": 9.0}, {"size_mb": 9.0, "dialect": "kohya"}])
def test_directions_of_rounding_are_no_directions(rule, uneven):
    """R-36: a sum of twice the same has the rank of one; what only rounds away would keep a file in fp32."""
    names = list(uneven.modules)
    uneven.modules[names[0]].up.zero_()
    twice, _ = merge([(uneven, 0.5), (uneven, 0.5)])
    small, report = resize(twice, **rule)
    assert small.rank == uneven.rank
    assert report.ranks[names[0]] == 0
    assert report.error < 1e-6
    assert round_adapter(small, "fp16")[1].used == "fp16"


def test_mixed_ranks_load_in_diffusers(uneven, unet, tmp_path, make_pipeline, peft_deltas, deltas):
    """R-01: modules of different ranks, and some left out, are what stock diffusers makes of the file."""
    small, report = resize(uneven, score=0.2, base_norms=dict.fromkeys(uneven.modules, 3.0))
    assert 0 in report.ranks.values()
    file = save_adapter(tmp_path / "small.safetensors", small)
    pipeline = make_pipeline(unet)
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="small_3f")
    loaded, expected = peft_deltas(pipeline.unet, "small_3f"), deltas(small)
    assert set(loaded) == set(expected)
    assert len({pair.rank for pair in small.modules.values()}) > 1
    for name, change in expected.items():
        assert float((loaded[name] - change).abs().max()) < 1e-6
    assert "from rank 6 by score 0.2" in load_adapter(file).notes["sdlora.resized"]


def test_what_was_measured_of_the_old_one_is_not_said_of_the_new_one(uneven):
    """The held-out loss is of the adapter as it was."""
    uneven.notes["sdlora.heldout_loss"] = "0.1"
    small, _ = resize(uneven, rank=2)
    assert "sdlora.heldout_loss" not in small.notes
    assert uneven.notes["sdlora.heldout_loss"] == "0.1"


@pytest.mark.parametrize(
    ("rule", "key", "values"),
    [
        ({}, "resize.one-rule", ("rank, energy, ratio, score, size_mb", "none")),
        ({"rank": 2, "energy": 0.5}, "resize.one-rule", "rank = 2 and energy = 0.5"),
        ({"rank": 0}, "resize.range", ("rank = 0", "1 or more")),
        ({"energy": 99}, "resize.range", ("energy = 99", "0.99")),
        ({"ratio": math.nan}, "resize.range", "ratio = nan"),
        ({"score": 0.1}, "resize.score-without-base", ("2 modules", "--base")),
    ],
)
def test_mistakes(rule, key, values, make_pair):
    """One line names the rule, the value seen and the remedy."""
    adapter = Adapter({"a": make_pair([1.0, 1.0]), "b": make_pair([1.0, 1.0])}, 2, 2.0)
    with raises(ConfigError, key, shows=values):
        resize(adapter, **rule)


def test_nothing_left_is_refused(make_pair):
    """An adapter without modules is never made."""
    adapter = Adapter({"a": make_pair([1.0, 1.0])}, 2, 2.0)
    with raises(AdapterError, "resize.nothing-left", shows=("size_mb = 1e-05", "use a larger value")):
        resize(adapter, size_mb=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's count of memory")
def test_an_sdxl_file_of_rank_256(sdxl, tmp_path):
    """R-33: all 560 attention projections of SDXL, in less than 2 GB, and no SVD of more than 256 x 256."""
    layers, generator = carrier_layers(sdxl), torch.Generator().manual_seed(0)
    modules = {}
    for name in match_targets(sdxl, ["attention"]):
        down, up = (
            torch.randn(s, generator=generator) / 256 for s in LowRank.shapes(layers[name], 256).values()
        )
        modules[name] = LowRank(down.half(), up.half())
    assert len(modules) == 560
    file = save_adapter(tmp_path / "large.safetensors", Adapter(modules, 256, 256.0, "sdxl"))
    out = tmp_path / "small.safetensors"
    # A child's peak in getrusage is at least that of its parent; the kernel's own count starts anew.
    code = (
        "import sys, torch; from pathlib import Path; from sdlora.cli import main\n"
        "sizes = []\n"
        "def watch(decompose):\n"
        "    return lambda matrix, **options: (sizes.extend(matrix.shape), decompose(matrix, **options))[1]\n"
        "torch.linalg.svd, torch.linalg.svdvals = map(watch, (torch.linalg.svd, torch.linalg.svdvals))\n"
        f"sys.argv = ['sdlora', 'resize', {str(file)!r}, '--energy', '0.5', '--out', {str(out)!r}]\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "lines = Path('/proc/self/status').read_text().splitlines()\n"
        "print(next(l for l in lines if l.startswith('VmHWM')).split()[1], max(sizes))"
    )
    process = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    kilobytes, largest = map(int, process.stdout.split()[-2:])
    # Dense decompositions would take an hour.
    assert largest == 256
    assert kilobytes * 1024 < 2e9
    assert 1 < inspect_adapter(out).rank < 256
    file.unlink()
