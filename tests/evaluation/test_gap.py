"""The gap between the base of few bits and the full one."""

from __future__ import annotations

import pytest
import torch

from sdlora.config import BaseSection
from sdlora.diffusion.schedule import schedule_from_config
from sdlora.evaluation.gap import Gap, full_base, measure_gap
from sdlora.evaluation.heldout import HeldoutItem, heldout_loss
from sdlora.lora.adapter import create_adapter
from sdlora.lora.attach import match_targets, mount, mounted
from sdlora.lora.modules import lora_layers
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base


@pytest.fixture(scope="module")
def small():
    return load_base(inspect_base(BaseSection(quantize="nf4")), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def adapter(small):
    made = create_adapter(small.unet, match_targets(small.unet, ["attention"]), 4, 4.0, seed=1, family="sd1")
    generator = torch.Generator().manual_seed(2)
    for pair in made.modules.values():
        pair.down.requires_grad_(False)
        pair.up.requires_grad_(False).normal_(0, 0.02, generator=generator)
    return made


def test_the_loss_is_measured_on_both_bases(small, adapter):
    """R-48: as if each base had been loaded by itself; what was mounted stays mounted."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(3, small.info.latent_channels, 8, 8, generator=generator)
    conditions = small.encode_captions(["a cat", "a dog", ""])
    items = [HeldoutItem(str(n), latents[n], conditions[n]) for n in range(3)]
    schedule = schedule_from_config(small.info.scheduler_config)
    mount(small.unet, [(adapter, 0.5)])
    before = {name: layer.stack for name, layer in lora_layers(small.unet).items()}
    gap = measure_gap(small, ((adapter, 1.0),), items, schedule)
    assert {name: layer.stack for name, layer in lora_layers(small.unet).items()} == before

    def alone(quantize):
        base = load_base(inspect_base(BaseSection(quantize=quantize)), dtype=torch.float32, device="cpu")
        with mounted(base.unet, [(adapter, 1.0)]):
            return heldout_loss(base.denoise, schedule, items, batch_size=4, device=base.device).loss

    assert gap.trained == alone("nf4")
    assert gap.used == alone("none")
    assert gap.trained != gap.used
    assert gap.images == 3


def test_the_full_base_comes_and_goes(small):
    """R-18: the same encoders, another UNet, and everything as it was afterwards, after an error too."""
    unet = small.unet

    def fail():
        with full_base(small) as full:
            assert full.unet is not unet
            assert full.vae is small.vae
            assert full.info.quantize == "none"
            assert full.dtypes["unet"] == "float32"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert small.unet is unet
    assert small.info.quantize == "nf4"


def test_a_gap_in_words():
    """R-48: both losses, and by how much the second is larger."""
    assert str(Gap("nf4", 0.25, 0.26, 8)) == (
        "loss 0.2500 on the nf4 base it was trained on, 0.2600 on the full base (+4.00%), over 8 pictures"
    )
