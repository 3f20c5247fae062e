"""The VAE's own training: it stops and goes on to the same weights, and writes a diffusers folder."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from sdlora.builtin.icons import load_icons
from sdlora.builtin.make_vae import Recipe, render_all, save_vae, train
from sdlora.builtin.measure import redraw_psnr

TINY = {"batch_size": 2, "warmup": 1, "widths": (8, 8, 8, 8), "channels": 4}


def test_stopping_changes_nothing(tiny_icons: Path, tmp_path: Path) -> None:
    """Three steps in one run, and the last of three after a state of two, give the same weights."""
    icons = load_icons("openmoji", tiny_icons)
    drawings = render_all([icons], ["owl", "moon"])
    recipe = Recipe(steps=3, **TINY)
    straight = train(recipe, tmp_path / "straight", drawings, "cpu")
    for _ in range(2):
        stopped = train(recipe, tmp_path / "stopped", drawings, "cpu", stop_after=2)
    for one, other in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_vae_is_saved_and_loaded(tiny_icons: Path, tmp_path: Path) -> None:
    """The folder is diffusers' own, in fp16, without a trace of where it was made."""
    icons = load_icons("openmoji", tiny_icons)
    vae = train(Recipe(steps=1, **TINY), tmp_path, render_all([icons], ["owl"]), "cpu")
    save_vae(vae, tmp_path / "vae")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert loaded.config.latent_channels == 4
    assert "_name_or_path" not in (tmp_path / "vae" / "config.json").read_text()
    assert 0 < redraw_psnr(loaded, icons, ["owl", "moon"]) < 60
