"""The bank of latents: what it holds, what it gives out, and that a stopped one is completed."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from sdlora.builtin.bank import Bank, is_held_out, make_bank
from sdlora.builtin.captions import read_concepts
from sdlora.builtin.icons import BASE_SETS
from sdlora.builtin.variants import Variant
from sdlora.errors import ModelError


def test_every_set_draws_every_concept_plain_and_varied(tiny_bank: Path) -> None:
    """Shard 0 holds the plain drawings, the next one a variant of each."""
    bank = Bank(tiny_bank)
    drawn = len(BASE_SETS) * 4
    assert len(bank.variants) == 2 * drawn
    assert all(variant.is_plain for variant in bank.variants[:drawn])
    assert bank.latent_shape == (4, 16, 16)
    assert bank.latents([0, drawn]).shape == (2, 4, 16, 16)
    assert bank.plain_std() > 0


def test_plain_images_are_drawn_and_variants(tiny_bank: Path) -> None:
    """What is drawn shows the concept; held-out drawings are not drawn."""
    bank, rng = Bank(tiny_bank), random.Random(0)
    drawn = [bank.variants[bank.draw(rng, "owl")] for _ in range(300)]
    assert {variant.concept for variant in drawn} == {"owl"}
    assert 0.25 < sum(variant.is_plain for variant in drawn) / 300 < 0.45
    assert not any(is_held_out(variant.icon_set, "owl") for variant in drawn)


def test_most_images_of_a_concept_share_their_shape(tmp_path: Path) -> None:
    """Few are shifted, scaled, turned or mirrored: many of them blur what a name means."""
    plain = Variant(BASE_SETS[0], "owl")
    variants = [plain, replace(plain, style="outlined"), replace(plain, mirrored=True)]
    np.save(tmp_path / "000.npy", np.zeros((3, 4, 2, 2), np.float16))
    lines = [json.dumps(asdict(variant)) for variant in variants]
    (tmp_path / "000.jsonl").write_text("\n".join(lines))
    bank, rng = Bank(tmp_path), random.Random(0)
    drawn = Counter(bank.draw(rng, "owl") for _ in range(1000))
    assert 270 < drawn[0] < 430
    assert drawn[2] < 120 < 450 < drawn[1]


def test_few_drawings_are_held_out() -> None:
    """About three in a hundred, none of the first set's."""
    concepts = read_concepts()
    assert not any(is_held_out(BASE_SETS[0], concept) for concept in concepts)
    held = [is_held_out(name, concept) for name in BASE_SETS[1:] for concept in concepts]
    assert 0.02 < sum(held) / len(held) < 0.05


def test_a_stopped_bank_is_completed(
    tiny_bank: Path, tiny_icons: Path, tiny_concepts: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    """A shard that is missing is made again, the same."""
    copy = tmp_path / "bank"
    shutil.copytree(tiny_bank, copy)
    (copy / "001.npy").unlink()
    make_bank(copy, tiny_icons, tiny_vae, read_concepts(tiny_concepts), shards=2)
    assert np.array_equal(np.load(copy / "001.npy"), np.load(tiny_bank / "001.npy"))


def test_a_bank_of_another_vae_is_refused(
    tiny_bank: Path, tiny_icons: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    """Latents of two VAEs are not mixed, and an empty bank says how to fill it."""
    other = tmp_path / "vae"
    shutil.copytree(tiny_vae, other)
    weights = other / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(ModelError, match="another VAE"):
        make_bank(tiny_bank, tiny_icons, other, ["owl"], shards=1)
    with pytest.raises(ModelError, match=r"sdlora\.builtin\.bank"):
        Bank(tmp_path)
