"""Spectra: energy, effective rank, blocks."""

from __future__ import annotations

import math

import pytest
import torch

from sdlora.rank.spectrum import Spectrum, block_of, spectrum


def test_spectrum_has_every_module(uneven, deltas):
    """Scale included; its energy is the squared norm of the whole change."""
    found = spectrum(uneven)
    assert list(found.values) == list(uneven.modules)
    whole = sum(float(change.square().sum()) for change in deltas(uneven).values())
    assert sum(float(values.square().sum()) for values in found.values.values()) == pytest.approx(whole)


def test_energy_and_effective_rank_by_hand():
    """Energy 16, 4, 4, 1 of 25; equal values have the effective rank of their number."""
    found = Spectrum({"m": torch.tensor([4.0, 2.0, 2.0, 1.0]).double()})
    assert [found.rank_for_energy("m", share) for share in (0.5, 0.64, 0.8, 0.81, 1.0)] == [1, 1, 2, 3, 4]
    assert found.error({"m": 1}) == pytest.approx(3 / 5)
    assert found.error({"m": 4}) == 0
    entropy = sum(-p * math.log(p) for p in (4 / 9, 2 / 9, 2 / 9, 1 / 9))
    assert found.effective_rank("m") == pytest.approx(math.exp(entropy))


def test_a_change_of_nothing_has_no_rank():
    """Zeros are no numbers that fail."""
    found = Spectrum({"flat": torch.ones(5).double(), "zero": torch.zeros(5).double()})
    assert found.effective_rank("flat") == pytest.approx(5)
    assert found.effective_rank("zero") == 0
    assert found.rank_for_energy("zero", 0.5) == 0
    assert found.error({"zero": 0}) == 0
    assert found.blocks()[0].block == "flat"


def test_blocks_in_the_order_of_the_network(uneven, make_pair):
    """One row for each block; their shares of the energy are all of it."""
    uneven.modules["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"] = make_pair([1.0, 1.0])
    rows = spectrum(uneven).blocks()
    assert [row.block for row in rows] == [
        "text_encoder", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1",
    ]  # fmt: skip
    assert sum(row.energy for row in rows) == pytest.approx(1)
    assert sum(row.num_modules for row in rows) == len(uneven.modules)
    assert rows[0].effective_rank == pytest.approx(2)
    assert rows[0].ranks_for_energy == (1, 2, 2)
    assert block_of("conv_in") == "conv_in"
