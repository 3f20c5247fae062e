"""Paired times, peak memory, and the floor that a machine's matrix products set."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# Rows, inputs and outputs of products that a UNet has, and channels, side and kernels of convolutions.
PRODUCTS = ((4096, 320, 1280), (4096, 1280, 1280), (1024, 640, 5120), (2048, 2048, 2048))
CONVOLUTIONS = ((320, 64), (640, 32))
# Torch counts attention on GPUs only. A backward pass needs twice the products of the forward pass; that a
# kernel computes the softmax again is not counted.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *rest, **more: (
        sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *rest, **more: 2 * sdpa_flop_count(query, key, value)
    ),
}


def clock() -> float:
    """Seconds: with one thread of the process's CPU, which others do not disturb, else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(call: Callable[[], object]) -> float:
    started = clock()
    call()
    return clock() - started


def interleave(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case in each round; every second round runs them backwards, to be fair to all."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            times[name].append(timed(cases[name]))
    return times


def paired_ratio(times: Mapping[Any, Sequence[float]], case: object, other: object) -> float:
    """The median over the rounds of a case's time divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(times[case], times[other], strict=True))


def measure_peaks(dtype: torch.dtype = torch.bfloat16, repeats: int = 5) -> dict[str, float]:
    """The best rates here in FLOP/s: of a matrix product, and of a convolution in channels_last."""
    rates = {"product": 0.0, "convolution": 0.0}
    for rows, inputs, outputs in PRODUCTS:
        x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
        rate = 2 * rows * inputs * outputs / _fastest(lambda x=x, w=weight: F.linear(x, w), repeats)
        rates["product"] = max(rates["product"], rate)
    for channels, side in CONVOLUTIONS:
        image = torch.randn(1, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)
        kernels = torch.randn(channels, channels, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        flops = 2 * 9 * channels**2 * side**2
        rate = flops / _fastest(lambda x=image, w=kernels: F.conv2d(x, w, padding=1), repeats)
        rates["convolution"] = max(rates["convolution"], rate)
    return rates


@torch.no_grad()
def _fastest(call: Callable[[], object], repeats: int) -> float:
    call()
    return min(timed(call) for _ in range(repeats))


def count_flops(call: Callable[[], object]) -> int:
    """The operations of matrix products, convolutions and attention, by torch's own counter."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        call()
    return counter.get_total_flops()


def reset_peak() -> None:
    """Starts `peak_mb` anew from what is resident, where the kernel lets a process do so (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """The largest resident memory of this process since it started, or since `reset_peak`."""
    with suppress(OSError):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_fresh_process(module: str, *arguments: object) -> dict[str, Any]:
    """Runs a module that prints a JSON object as its last line, and returns that."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def describe_machine(threads: int = 0) -> str:
    """What the figures depend on: processor, threads, clock, library versions."""
    kind = next(
        (line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), "unknown CPU"
    )
    flags = " ".join(_cpu_lines())
    has = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    threads = threads or torch.get_num_threads()
    kept = "CPU time" if threads == 1 else "wall time: the machine must be idle"
    units = ", ".join(has) or "no bf16 units"
    return f"{kind} ({units}), {threads} thread(s), {kept}, torch {torch.__version__}"


def _cpu_lines() -> list[str]:
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text().splitlines()
    return []
