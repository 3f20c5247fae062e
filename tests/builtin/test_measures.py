"""The scripts behind the README's tables of ranks and of bits."""

from __future__ import annotations

import json

import pytest

from sdlora.builtin.measure_bits import measure
from sdlora.builtin.sweep_ranks import RANKS, rates_of, sweep


@pytest.mark.slow
def test_a_base_of_few_bits(make_images, tmp_path):
    """R-48: a row has the bytes that are kept, and the loss where it learnt and where it is used."""
    images = make_images(sizes=((128, 128),) * 12)
    full, nf4 = (measure(images, base, 0, 2, tmp_path / base) for base in ("full", "nf4"))
    assert full["trained"] == full["used"]
    assert nf4["trained"] != nf4["used"]
    assert nf4["unet_bytes"] < full["unet_bytes"] / 3
    assert nf4["step_seconds"] > 0


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_stopped(make_images, tmp_path):
    """What the table holds is not run again."""
    images, out = make_images(sizes=((128, 128),) * 12), tmp_path / "ranks.json"
    sweep(images, out, [2], [1e-3], [0], steps=1)
    first = json.loads(out.read_text(encoding="utf-8"))
    sweep(images, out, [2], [1e-3, 2e-3], [0], steps=1)
    assert [row["learning_rate"] for row in json.loads(out.read_text(encoding="utf-8"))] == [1e-3, 2e-3]
    assert json.loads(out.read_text(encoding="utf-8"))[:1] == first


def test_every_rank_has_rates_on_both_sides():
    """The larger the rank, the lower the lowest."""
    lowest = [rates_of(rank)[0] for rank in RANKS]
    assert lowest == sorted(lowest, reverse=True)
    assert all(len(rates_of(rank)) >= 3 for rank in RANKS)
