"""A training step of ours beside one of a plain PEFT loop: the same UNet, latents, text states and targets.

    python -m tests.benchmarks.step                     # SD 1.5, 512 px, rank 16, bf16, one thread, CPU time
    python -m tests.benchmarks.step --base quarter      # a minute instead of ten; --side 256 also helps
    python -m tests.benchmarks.step --threads 2         # wall time, on an idle machine

Both sides are in this process and take turns; `README.md` says how to read the figures.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora.training.loop import Trainer
from tests.benchmarks import measure
from tests.benchmarks.bases import BASES, argument_parser, bench_folder, write_base
from tests.benchmarks.trainers import (
    PeftLoop,
    cached_example,
    fill_up,
    keep_cache_in,
    make_trainer,
    record_gradients,
    write_images,
)

SIDES_PX = {"sd15": 512, "quarter": 256}
# The goals: ours / PEFT, and the share of the floor on a CPU with AMX.
MUST, AIM, SHARE = 0.80, 0.71, 0.16


def gradient_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The relative difference of two whole gradients."""
    assert ours.keys() == theirs.keys(), "the two sides adapt different modules"
    difference = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours)
    return (difference / sum(float(one.square().sum()) for one in theirs.values())) ** 0.5


@torch.no_grad()
def same_start(trainer: Trainer, loop: PeftLoop) -> None:
    """Gives both adapters the same values, with an `up` that is not zero, so that all gradients count."""
    theirs = loop.named_parameters()
    fill_up(trainer)
    for name, tensor in trainer.runner.adapter.named_tensors().items():
        theirs[name].copy_(tensor)


def measure_step(base: Path, images: Path, side_px: int, rounds: int) -> dict[str, Any]:
    """Times both sides in turns; returns times, ratio, share of the floor and the gradients' difference."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(base, images, Path(folder) / "run", **{"data.resolution": side_px})
    loop = PeftLoop(base)
    latents, hidden = cached_example(trainer)
    same_start(trainer, loop)
    inputs, ours = record_gradients(trainer)
    trainer.runner.update(skip=True)
    difference = gradient_difference(ours, loop.gradients(inputs))
    flops = measure.count_flops(lambda: loop.train_step(latents, hidden))
    cases: dict[str, Callable[[], object]] = {
        "ours": trainer.train_step,
        "peft": lambda: loop.train_step(latents, hidden),
    }
    trainer.train_step()
    times = measure.interleave(cases, rounds)
    peaks = measure.measure_peaks()
    floor = flops / max(peaks.values())
    medians = {name: statistics.median(own) for name, own in times.items()}
    return {
        "times": times,
        "medians": medians,
        "ratio": measure.paired_ratio(times, "ours", "peft"),
        "gradient_difference": difference,
        "flops": flops,
        "peaks": peaks,
        "floor": floor,
        "share": {name: floor / median for name, median in medians.items()},
        "modules": {"ours": len(trainer.runner.adapter.modules), "peft": loop.num_modules},
    }


def measure_memory(side: str, base: Path, images: Path, side_px: int) -> dict[str, float]:
    """Peak memory in MB of one side alone, of the whole process and of its steps; the cache is full."""
    if side == "ours":
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(base, images, Path(folder) / "run", **{"data.resolution": side_px})
        step: Callable[[], object] = trainer.train_step
    else:
        loop = PeftLoop(base)
        width = loop.unet.config.cross_attention_dim
        latents, hidden = torch.randn(1, 4, side_px // 8, side_px // 8), torch.randn(1, 77, width)
        step = lambda: loop.train_step(latents, hidden)
    before = measure.peak_mb()
    measure.reset_peak()
    for _ in range(2):
        step()
    steps = measure.peak_mb()
    return {"whole": max(before, steps), "steps": steps}


def report(result: dict[str, Any], memory: dict[str, dict[str, float]]) -> None:
    """Prints the figures and, beside them, what the project aims at."""
    print(f"\n{'':8}{'s/step':>9}{'of the floor':>14}{'modules':>9}{'peak MB':>9}{'in steps':>10}")
    for name in ("ours", "peft"):
        own = memory.get(name, {})
        shown = [f"{own[key]:.0f}" if own else "-" for key in ("whole", "steps")]
        print(
            f"{name:8}{result['medians'][name]:>9.3f}{result['share'][name]:>14.1%}"
            f"{result['modules'][name]:>9}{shown[0]:>9}{shown[1]:>10}"
        )
    print(f"\nours / PEFT, median of paired ratios: {result['ratio']:.3f} (must {MUST}, aim {AIM})")
    peaks = {name: f"{rate / 1e12:.2f}" for name, rate in result["peaks"].items()}
    print(
        f"floor: {result['flops'] / 1e9:.0f} GFLOP / {max(peaks.values())} TFLOP/s = {result['floor']:.2f} s "
        f"(products {peaks['product']}, convolutions {peaks['convolution']}; must {SHARE:.0%} with AMX)"
    )
    print(f"gradient, relative difference to PEFT's in bf16: {result['gradient_difference']:.1e} (must 5e-3)")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--base", default="sd15", choices=SIDES_PX)
    parser.add_argument("--side", type=int, help="of the images, in px; default: the base's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", choices=("ours", "peft"), help="measure one side alone, and print JSON")
    parser.add_argument("--no-memory", action="store_true", help="skip the two extra processes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    folder = bench_folder()
    base = write_base(given.base, folder / given.base)
    side = given.side or SIDES_PX[given.base]
    images = write_images(folder / f"images-2-{side}", 2, side)
    keep_cache_in(folder / "cache")
    if given.memory:
        print(json.dumps(measure_memory(given.memory, base, images, side)))
        return
    print(measure.describe_machine())
    print(f"{given.base} ({BASES[given.base][0]}), {side} px, batch 1, rank 16, bf16, {given.rounds} rounds")
    result = measure_step(base, images, side, given.rounds)
    memory = {}
    if not given.no_memory:
        arguments = ("--base", given.base, "--side", side, "--threads", given.threads)
        memory = {
            name: measure.in_a_fresh_process("tests.benchmarks.step", *arguments, "--memory", name)
            for name in ("ours", "peft")
        }
    report(result, memory)


if __name__ == "__main__":
    main()
