"""One adapter from several: exact sums, nearest sums, TIES and DARE."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties

from sdlora.errors import AdapterError, ConfigError
from sdlora.formats.files import load_adapter, save_adapter
from sdlora.lora.adapter import Adapter
from sdlora.rank.merge import concatenate, delta, drop, elect_signs, merge, trim
from tests.checks import raises


@pytest.fixture
def two(unet, make_adapter):
    """Ranks 4 and 6, other scales, other targets that overlap."""
    first = make_adapter(unet, rank=4, alpha=2).to()
    second = make_adapter(
        unet, rank=6, alpha=6, targets=["*attn2.to_[qv]", "feed_forward", "convolutions"], seed=1
    )
    first.notes = {"sdlora.base_name": "builtin", "sdlora.heldout_loss": "0.1", "sshs_model_hash": "aa"}
    return first, second.to()


def weighted_sum(deltas, adapters):
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in adapters:
        for name, change in deltas(adapter).items():
            total[name] = total.get(name, 0) + weight * change
    return total


def test_concatenation_is_the_exact_sum(two, deltas):
    """R-02: every module's change is the fp64 sum, ranks add where modules meet."""
    adapters = [(two[0], 0.7), (two[1], -0.3)]
    joined, report = merge(adapters)
    assert report is None
    expected = weighted_sum(deltas, adapters)
    found = deltas(joined)
    assert set(found) == set(expected)
    for name, change in expected.items():
        assert float((found[name] - change).abs().max()) < 1e-8
    assert {pair.rank for pair in joined.modules.values()} == {4, 6, 10}
    assert joined.alpha == joined.rank == 10


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_sum_loads_in_diffusers(two, dialect, unet, tmp_path, make_pipeline, peft_deltas, deltas):
    """R-01: the file does in a stock pipeline what the two adapters do together."""
    adapters = [(two[0], 1.0), (two[1], 0.5)]
    file = save_adapter(tmp_path / "sum.safetensors", merge(adapters)[0], dialect=dialect)
    pipeline = make_pipeline(unet)
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="sum_7f")
    loaded, expected = peft_deltas(pipeline.unet, "sum_7f"), weighted_sum(deltas, adapters)
    assert set(loaded) == set(expected)
    for name, change in expected.items():
        assert float((loaded[name] - change).abs().max()) < 1e-6


def test_svd_is_the_nearest_of_its_rank(two, deltas):
    """As the dense SVD of the sum."""
    adapters = [(two[0], 1.0), (two[1], 1.0)]
    joined, _ = merge(adapters, "svd", rank=3)
    for name, change in weighted_sum(deltas, adapters).items():
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        nearest = (left[:, :3] * values[:3]) @ right[:3]
        assert float((deltas(joined)[name] - nearest).abs().max()) < 1e-5 * float(values[0])


@pytest.mark.parametrize("method", ["svd", "ties", "dare"])
def test_what_a_limited_rank_costs_is_said(two, method, deltas):
    """The error relative to the full rank is printed as by resize, and written into the file."""
    adapters = [(two[0], 1.0), (two[1], 0.5)]
    whole, nothing = merge(adapters, method, rank=64)
    joined, report = merge(adapters, method, rank=2)
    full, kept = deltas(whole), deltas(joined)
    lost = {name: float((full[name] - kept[name]).norm()) for name in full}
    norms = {name: float(change.norm()) for name, change in full.items()}
    errors = {name: lost[name] / norms[name] for name in full}
    assert report.error == pytest.approx(math.hypot(*lost.values()) / math.hypot(*norms.values()), rel=1e-3)
    assert report.worst == (max(errors, key=errors.get), pytest.approx(max(errors.values()), rel=1e-3))
    assert f"{report.error:.2%}" in report.lines()[0]
    assert report.worst[0] in report.lines()[0]
    assert json.loads(joined.notes["sdlora.merged"])["error"] == pytest.approx(report.error, rel=1e-2)
    assert nothing.error < 1e-5


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_ties_is_that_of_peft(two, weight, deltas):
    """arXiv 2306.01708: trimmed, elected, mean of those that agree; full rank keeps all of it."""
    adapters = [(two[0], weight), (two[1], weight)]
    joined, _ = merge(adapters, "ties", rank=64, density=0.25)
    name = next(name for name in two[0].modules if name in two[1].modules)
    changes = [deltas(adapter)[name].float() for adapter in two]
    expected = peft_ties(changes, torch.tensor([weight, weight]), 0.25)
    assert float((deltas(joined)[name] - expected).abs().max()) < 1e-6
    alone = next(name for name in two[0].modules if name not in two[1].modules)
    assert float((deltas(joined)[alone] - weight * trim(deltas(two[0])[alone], 0.25)).abs().max()) < 1e-6


def test_ties_by_hand():
    """The sign of the sum wins; who disagrees, or was trimmed, has no part in the mean."""
    first, second, third = (
        torch.tensor(row) for row in ([3.0, -1.0, 4.0, 0], [1.0, -2.0, -3.0, 0], [-3.5, 0, 1.0, 0])
    )
    assert torch.equal(trim(first, 0.5), torch.tensor([3.0, 0, 4.0, 0]))
    assert torch.equal(elect_signs([first, second, third]), torch.tensor([2.0, -1.5, 2.5, 0]))


def test_dare_keeps_the_sum_on_average(two, deltas):
    """arXiv 2311.03099: a share is kept, the others scaled up, so that the mean over seeds is the sum."""
    change = delta(concatenate([next(iter(two[0].modules.values()))]))
    drawn = torch.stack([drop(change, 0.3, str(seed)) for seed in range(400)])
    assert float((drawn[0] != 0).float().mean()) == pytest.approx(0.3, abs=0.05)
    assert float((drawn.mean(0) - change).norm() / change.norm()) < 0.12
    kept = drawn[0] != 0
    assert torch.allclose(drawn[0][kept], change[kept] / 0.3)
    whole, _ = merge([(two[0], 1.0), (two[1], 0.5)], "dare", density=1.0, rank=64)
    for name, expected in weighted_sum(deltas, [(two[0], 1.0), (two[1], 0.5)]).items():
        assert float((deltas(whole)[name] - expected).abs().max()) < 1e-6


def test_dare_depends_on_seed_place_and_name_alone(two):
    """R-04: the same draw whatever the ambient generator and the order of modules."""
    reversed_modules = dict(reversed(two[0].modules.items()))
    other_order = Adapter(reversed_modules, two[0].rank, two[0].alpha, two[0].family)
    torch.manual_seed(1)
    first, _ = merge([(two[0], 1.0)], "dare", seed=3)
    torch.manual_seed(2)
    again, _ = merge([(other_order, 1.0)], "dare", seed=3)
    other, _ = merge([(two[0], 1.0)], "dare", seed=4)
    for name, pair in first.modules.items():
        assert torch.equal(pair.up, again.modules[name].up)
        assert not torch.equal(pair.up, other.modules[name].up)


def test_file_says_what_it_was_made_of(two, tmp_path):
    """R-42: base and family go along; what was true of one training does not."""
    notes = load_adapter(
        save_adapter(tmp_path / "sum.safetensors", merge([(two[0], 0.7), (two[1], 1)])[0])
    ).notes
    assert notes["sdlora.base_name"] == "builtin"
    assert "sdlora.heldout_loss" not in notes
    assert json.loads(notes["sdlora.merged"]) == {
        "method": "concatenate",
        "parts": [{"name": "", "hash": "aa", "weight": 0.7}, {"name": "", "hash": "", "weight": 1}],
    }


@pytest.mark.parametrize(
    ("changes", "key", "values"),
    [
        ({"method": "sum"}, "merge.method", ("method = 'sum'", "concatenate, svd, ties, dare")),
        ({"rank": 4}, "merge.no-effect", ("rank = 4", "concatenate", "svd or ties or dare")),
        ({"method": "svd", "density": 0.2}, "merge.no-effect", ("density = 0.2", "svd", "ties or dare")),
        ({"method": "ties", "seed": 1}, "merge.no-effect", ("seed = 1", "ties", "dare")),
        ({"method": "svd", "rank": 0}, "merge.rank", "rank = 0"),
        ({"method": "ties", "density": 0}, "merge.density", ("density = 0", "0.5")),
    ],
)
def test_mistakes(two, changes, key, values):
    """One line names the setting, the value seen and the remedy."""
    with raises(ConfigError, key, shows=values):
        merge([(two[0], 1.0)], **changes)


def test_what_does_not_fit_is_refused(two, make_pair):
    """R-41: another family, or the same name with other sizes."""
    two[1].family = "sd2"
    with raises(AdapterError, "merge.families", shows=("sd1", "sd2")):
        merge([(two[0], 1.0), (two[1], 1.0)])
    small, large = (
        Adapter({"a": make_pair([1.0])}, 1, 1.0),
        Adapter({"a": make_pair([1.0], size=(8, 9))}, 1, 1.0),
    )
    with raises(AdapterError, "merge.sizes", shows=" a "):
        merge([(small, 1.0), (large, 1.0)])
    with raises(ConfigError, "merge.no-files"):
        merge([])
