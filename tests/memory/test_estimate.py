"""The memory that a plan promises, against what is measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sdlora.builtin import card_table
from sdlora.builtin.card_table import plan_preset
from sdlora.config import BaseSection, load_config
from sdlora.data.cache import COSTS, clear_cache
from sdlora.data.records import Size
from sdlora.dtypes import Precision
from sdlora.lora.attach import match_modules, match_targets, mount
from sdlora.memory import activations
from sdlora.memory.activations import META, DenoiserPass, denoiser_cost, measure_cost, vae_costs
from sdlora.memory.cards import find_card
from sdlora.memory.estimate import (
    DeviceInfo,
    MemoryInputs,
    as_size,
    device_of_card,
    estimate_memory,
    plan_memory,
)
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
from sdlora.models.weights import empty_components
from tests.lora_fixtures import create_adapter

FP32 = Precision("fp32", "fp32")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_peak_of_a_chain_by_hand():
    """R-18: two results of a kilobyte and one of four are never alive at once; views are not counted."""

    def chain():
        first = torch.zeros(256, device=META)
        second = first + 1
        del first
        third = torch.cat([second, second, second, second])
        del second
        return third.view(2, 512).t()[0].sum()

    assert measure_cost(chain).num_bytes == 1024 + 4096
    weight = torch.zeros(256, device=META)
    assert measure_cost(lambda: weight.view(16, 16).t(), [weight]).num_bytes == 0


def test_what_a_backward_pass_waits_for_is_counted():
    """R-09: a layer's input until its weight has its gradient, and that gradient."""
    layers = nn.Sequential(*[nn.Linear(64, 64, bias=False, device=META) for _ in range(3)])
    x = torch.zeros(1024, 64, device=META)
    one, weight = 1024 * 64 * 4, 64 * 64 * 4

    def learn():
        layers(x).sum().backward()

    peak, flop = measure_cost(learn, [x, *layers.parameters()])
    assert flop == (3 + 3 + 2) * 2 * 1024 * 64 * 64
    assert 3 * one < peak < 4 * one + 3 * weight + 64


def make_pass(quantize="none", ranks=(), **changes):
    info = inspect_base(BaseSection(quantize=quantize))
    task = DenoiserPass(info, ranks, Size(16, 16), torch.float32, batch_size=2, learns=True)
    return replace(task, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"checkpointing": True},
        {"quantize": "int8"},
        {"learns": False, "batch_size": 4},
        {"dtype": torch.bfloat16},
        {"latents": Size(24, 12)},
    ],
    ids=str,
)
def test_a_pass_without_numbers_is_as_large_as_a_real_one(changes):
    """R-18: the same tensors live on the meta device as on the CPU, within 5 %."""
    task = make_pass(**changes)
    base = load_base(task.info, dtype=task.dtype, device="cpu")
    names = match_targets(base.denoiser, ["attention"])
    adapter = create_adapter(base.denoiser, names, 8, 8.0, seed=0, family="sd1")
    for tensor in adapter.parameters():
        tensor.requires_grad_(task.learns)
    mount(base.denoiser, [(adapter, 1.0)])
    if task.checkpointing:
        base.enable_gradient_checkpointing(text=False)
    planned = denoiser_cost(replace(task, ranks=tuple((name, 8) for name in names))).num_bytes
    inputs = base.example_inputs((task.latents.height, task.latents.width), task.batch_size)

    def compute():
        with torch.set_grad_enabled(task.learns):
            prediction = base.denoise(*inputs)
            if task.learns:
                prediction.square().mean().backward()

    known = [*base.denoiser.parameters(), *base.denoiser.buffers(), *adapter.parameters()]
    assert planned == pytest.approx(measure_cost(compute, known).num_bytes, rel=0.05)


def work(side=64, **settings):
    keys = {"train.batch_size": 2, "sample.guidance": 3.0, "train.sample_every": 1}
    keys |= {name.replace("__", "."): value for name, value in settings.items()}
    config = load_config(None, keys)
    info = inspect_base(config.base)
    parts = empty_components(info, text=config.lora.text_encoder)
    ranks = dict.fromkeys(match_modules(parts, config.lora.targets), 4)
    return MemoryInputs(config, info, parts, ranks, 0, Size(side, 64))


def test_stages_add_up():
    """R-20: encoders are gone before the UNet comes, unless they are needed."""
    gpu = estimate_memory(work(), DeviceInfo(FP32, CUDA), checkpointing=False)
    kept = estimate_memory(work(data__cache=False), DeviceInfo(FP32, CUDA), checkpointing=False)
    encoders = gpu.vae + gpu.text_encoders
    assert gpu.stages["encoding"] == max(gpu.text_encoders, gpu.vae + gpu.encode)
    cpu = estimate_memory(work(), DeviceInfo(FP32, CPU), checkpointing=False)
    assert cpu.stages["encoding"] == max(cpu.text_encoders + cpu.read, cpu.vae + cpu.encode)
    assert gpu.stages["training"] == gpu.denoiser_bytes + gpu.adapter + gpu.learn
    assert kept.stages["training"] == gpu.stages["training"] + encoders
    assert gpu.stages["sampling"] == gpu.denoiser_bytes + gpu.adapter + max(gpu.sample, gpu.vae + gpu.decode)
    assert gpu.stages["postflight"] == gpu.denoiser_bytes + gpu.adapter + gpu.prove
    assert (
        "sampling"
        not in estimate_memory(
            work(train__sample_every=0), DeviceInfo(FP32, CUDA), checkpointing=False
        ).stages
    )


def test_what_changes_the_numbers():
    """R-18: moments, bits, batch, size, text encoders; each shows where it should."""
    plain = estimate_memory(work(), DeviceInfo(FP32, CUDA), checkpointing=False)
    trained = plain.adapter // 12
    eight = estimate_memory(
        work(train__optimizer="bitsandbytes.optim.AdamW8bit"), DeviceInfo(FP32, CUDA), checkpointing=False
    )
    assert eight.adapter == 6 * trained
    half = estimate_memory(work(), DeviceInfo(Precision("bf16", "bf16"), CUDA), checkpointing=False)
    assert half.denoiser_bytes * 2 == plain.denoiser_bytes
    small = estimate_memory(work(base__quantize="nf4"), DeviceInfo(FP32, CUDA), checkpointing=False)
    assert small.denoiser_bytes < 0.25 * plain.denoiser_bytes
    assert small.learn < plain.learn
    wide = estimate_memory(work(128), DeviceInfo(FP32, CUDA), checkpointing=False)
    assert 1.5 * plain.learn < wide.learn < 2.5 * plain.learn
    text = estimate_memory(work(lora__text_encoder=True), DeviceInfo(FP32, CUDA), checkpointing=False)
    assert text.learn > plain.learn
    assert text.stages["training"] > text.denoiser_bytes + text.adapter + text.learn
    mixed = estimate_memory(work(), DeviceInfo(Precision("bf16", "fp32"), CUDA), checkpointing=False)
    assert mixed.learn - plain.learn == plain.denoiser_bytes // 2


def test_checkpointing_comes_when_memory_asks():
    """R-09: auto is off where the run fits, on where it does not; what was asked for stays."""
    without = estimate_memory(work(), DeviceInfo(FP32, CUDA), checkpointing=False)
    with_it = estimate_memory(work(), DeviceInfo(FP32, CUDA), checkpointing=True)
    assert with_it.stages["training"] < without.stages["training"]
    tight = int(without.stages["training"] / 0.95)

    def plan(free, **settings):
        asked = work(train__sample_every=0, **settings)
        return plan_memory(asked, DeviceInfo(FP32, CUDA, free))

    assert plan(None).checkpointing is False
    assert plan(None).fits
    assert plan(10**10).peak == plan(None).peak
    assert plan(tight).checkpointing is True
    assert plan(tight, train__gradient_checkpointing=False).checkpointing is False
    assert plan(10**10, train__gradient_checkpointing=True).checkpointing is True


def test_what_to_change_makes_the_run_fit():
    """R-18: the cheapest single setting if one is enough, else several that really do."""

    def plan(free, **settings):
        asked = work(train__sample_every=0, train__gradient_checkpointing=False, **settings)
        return plan_memory(asked, DeviceInfo(FP32, CUDA, free, baseline_bytes=10**7))

    whole = plan(None).peak
    memory = plan(int(whole / 0.95))
    assert memory.changes == ("train.batch_size=1", "train.accumulate=2")
    assert "set train.batch_size=1 train.accumulate=2" in memory.verdict
    assert f"needs {as_size(whole + 10**7)} of {as_size(memory.free + 10**7)}" in memory.verdict
    assert plan(10**10).verdict.endswith(": fits")
    # One change is not enough, so that each is named, and the run with all of them does fit.
    memory = plan(30 * 10**6, train__batch_size=16)
    settings = dict(text.split("=") for text in memory.changes)
    assert {"train.batch_size", "base.quantize"} < settings.keys()
    changed = {name.replace(".", "__"): value for name, value in settings.items()}
    changed["train__gradient_checkpointing"] = "train.gradient_checkpointing" in settings
    asked = work(**{"train__sample_every": 0, **changed})
    assert plan_memory(asked, DeviceInfo(FP32, CUDA, memory.free)).fits
    assert plan(10**6).verdict.endswith("data.resolution")
    # Its norms are of whole weights.
    memory = plan(10**6, lora__kind="dora", train__batch_size=16)
    assert not any("quantize" in change for change in memory.changes)


def test_the_plan_says_what_is_really_saved():
    """R-48: by kind of layer: NF4 is for linear layers alone, convolutions get eight bits."""
    memory = estimate_memory(work(base__quantize="nf4"), DeviceInfo(FP32, CUDA), checkpointing=False)
    verdict, stages, training, third = memory.lines("nf4")
    assert verdict == f"memory    needs {as_size(memory.peak)}"
    assert stages.split()[0] == "encoding"
    assert training.endswith("without gradient checkpointing")
    assert third.startswith("nf4       linear 17 MB to 2 MB, convolution 23 MB to 6 MB, rest 0 MB")
    assert "80%" in third
    assert json.loads(json.dumps(memory.as_event()))["peak"] == memory.peak


LARGE = ("sdxl", "sdxl-qlora-8gb", "sdxl-qlora-12gb", "sdxl-24gb")


@pytest.mark.parametrize(
    "preset", ["sd15", "sd15-8gb", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
)
def test_presets_say_what_the_plan_estimates(repository, preset):
    """R-18: in their first line, for a GPU in bf16, as `--device` prints it, with a tenth to spare."""
    first = (repository / "configs" / f"{preset}.toml").read_text(encoding="utf-8").splitlines()[0]
    card, stated = re.search(r"(?:with (\d+) GB)?: about ([\d.]+ GB) by the plan's estimate", first).groups()
    device_info = device_of_card(find_card(f"cuda:{card or 80}GB"), Precision("bf16", "bf16"))
    inputs, memory = plan_preset(preset, device_info)
    assert as_size(memory.needs) == stated
    assert memory.fits
    assert memory.checkpointing == (inputs.config.train.gradient_checkpointing is True)


@pytest.mark.slow
def test_the_table_of_cards_is_what_is_planned(repository):
    """R-18: `make cards` prints the table of the README."""
    assert "\n".join(card_table.lines()) in (repository / "README.md").read_text(encoding="utf-8")


MEASURE = """
import json, sys, psutil, torch
from dataclasses import replace
from pathlib import Path
torch.set_num_threads(1)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from sdlora.builtin import card_table
from sdlora.builtin.card_table import plan_preset
from sdlora.config import BaseSection
from sdlora.data.records import Size
from tests.lora_fixtures import create_adapter
from sdlora.lora.attach import match_targets, mount
from sdlora.memory.activations import DenoiserPass, denoiser_cost
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
config = {"block_out_channels": (64, 128), "down_block_types": ("CrossAttnDownBlock2D",) * 2,
          "up_block_types": ("CrossAttnUpBlock2D",) * 2, "cross_attention_dim": 64, "norm_num_groups": 16,
          "attention_head_dim": 4, "in_channels": 8, "out_channels": 8}
unet = UNet2DConditionModel(**config).requires_grad_(False).eval()
info = inspect_base(BaseSection())
count = sum(p.numel() for p in unet.parameters())
part = replace(info.components["unet"], config=config, num_parameters=count)
base = replace(load_base(info, dtype=torch.float32, device="cpu"), denoiser=unet,
               info=replace(info, components={**info.components, "unet": part}))
def learn(size):
    base.denoise(*base.example_inputs((size, size))).mean().backward()
names = match_targets(unet, ["attention"])
mount(unet, [(create_adapter(unet, names, 4, 4.0, seed=0, family="sd1"), 1.0)])
learn(16)
before = psutil.Process().memory_info().rss
learn(64)
peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
ranks = tuple((name, 4) for name in names)
task = DenoiserPass(base.info, ranks, Size(64, 64), torch.float32, 1, True)
print(json.dumps([denoiser_cost(task).num_bytes, peak - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_resident_memory_is_what_was_planned():
    """R-18: the operating system's count of a step on the CPU, within a tenth.

    glibc keeps half as much again for itself unless it is told to give large blocks back.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    planned, measured = json.loads(done.stdout)
    assert planned > 200e6
    assert measured == pytest.approx(planned, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_device_memory_is_what_was_planned(checkpointing):
    """R-18: torch's own count of a step on a GPU, within a fifth."""
    task = make_pass(latents=Size(64, 64), checkpointing=checkpointing)
    base = load_base(task.info, dtype=torch.float32, device="cuda")
    names = match_targets(base.denoiser, ["attention"])
    adapter = create_adapter(base.denoiser, names, 8, 8.0, seed=0, family="sd1")
    for pair in adapter.modules.values():
        pair.down.data, pair.up.data = pair.down.data.cuda(), pair.up.data.cuda()
    mount(base.denoiser, [(adapter, 1.0)])
    if checkpointing:
        base.enable_gradient_checkpointing(text=False)
    inputs = base.example_inputs((64, 64), batch_size=2)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    base.denoise(*inputs).square().mean().backward()
    measured = torch.cuda.max_memory_allocated() - before
    planned = denoiser_cost(replace(task, ranks=tuple((name, 8) for name in names))).num_bytes
    assert measured == pytest.approx(planned, rel=0.2)


def test_decoding_a_picture_needs_more_than_encoding_it():
    """R-18: both grow with the picture's area."""
    info = inspect_base(BaseSection())
    small, large = (vae_costs(info, Size(side, side), torch.float32) for side in (64, 128))
    assert large[1].num_bytes > large[0].num_bytes
    assert large[0].num_bytes == pytest.approx(4 * small[0].num_bytes, rel=0.1)
    assert large[0].flop == pytest.approx(4 * small[0].flop, rel=0.1)


def test_costs_are_measured_once(monkeypatch, tmp_path):
    """R-46: the next plan with this base reads them; a damaged file, or other versions, measure again."""
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path))
    info, size = inspect_base(BaseSection()), Size(64, 64)
    task = DenoiserPass(info, (), Size(8, 8), torch.float32, 1, learns=False)
    measured = []
    monkeypatch.setattr(
        activations, "measure_cost", lambda *given: measured.append(1) or measure_cost(*given)
    )

    def costs():
        denoiser_cost.cache_clear()
        vae_costs.cache_clear()
        return denoiser_cost(task), *vae_costs(info, size, torch.float32)

    first = costs()
    assert len(measured) == 3
    assert costs() == first
    assert len(measured) == 3
    (tmp_path / COSTS).write_text("[")
    assert costs() == first
    assert len(measured) == 6
    clear_cache(tmp_path)
    assert not (tmp_path / COSTS).exists()
    assert costs() == first
    assert len(measured) == 9
    monkeypatch.setattr(activations, "version", lambda name: "0")
    assert costs() == first
    assert len(measured) == 12
    denoiser_cost.cache_clear()
    vae_costs.cache_clear()
