"""Accelerate's processes and device, and the one source of truth for precision."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, LoggerType
from accelerate.utils.memory import should_reduce_batch_size

from sdlora.config import RunConfig
from sdlora.dtypes import DTYPES, Precision, has_bf16
from sdlora.errors import ConfigError, first_line
from sdlora.memory.cards import find_card
from sdlora.memory.estimate import DeviceInfo, baseline_bytes, device_of_card, free_bytes
from sdlora.training.distributed import (
    all_gather,
    check_launcher,
    distributed_errors,
    group_settings,
    needs_gloo,
    num_launched,
)

NOT_INSTALLED = "not installed"
# Packages that affect the result of a run.
PACKAGES = (
    "sdlora",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "safetensors",
    "pillow",
)


def choose_precision(
    config: RunConfig, device: torch.device, environment: Mapping[str, str], is_fast: bool | None = None
) -> Precision:
    """Resolves the precision from `train.precision`, `base.dtype`, the launcher and the device.

    `accelerate launch` exports its precision as an environment variable, `no` if unset. `is_fast` tells
    whether a device that is not here has bf16. Raises a ConfigError if the launcher disagrees, the device
    does not support it, or the base is stored in less than it.
    """
    asked, base = str(config.train.precision), config.base.dtype
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched != "no":
        if asked not in ("auto", launched):
            problem = f"train.precision = {asked} but the launcher has --mixed_precision {launched}"
            raise ConfigError(f"{problem} (ACCELERATE_MIXED_PRECISION); set only one, or both alike")
        asked = launched
    if asked == "auto":
        is_fast = has_bf16(device) if is_fast is None else is_fast
        asked = "bf16" if is_fast else "fp32" if base == "auto" else base
    if asked not in DTYPES:
        problem = f"train.precision = {asked} (from the launcher) is not supported"
        raise ConfigError(f"{problem}; use bf16, fp16 or fp32")
    if asked == "fp16" and device.type == "cpu":
        given = "base.dtype" if base == "fp16" and config.train.precision == "auto" else "train.precision"
        raise ConfigError(f"{given} = fp16 requires a GPU (the device is cpu); use bf16 or fp32")
    if asked == "fp32" and base not in ("auto", "fp32"):
        raise ConfigError(
            f"train.precision = fp32 conflicts with base.dtype = {base}: autocast lowers precision, never "
            f"raises it; remove base.dtype, or set train.precision={base}"
        )
    return Precision(asked, asked if base == "auto" else base)


def make_accelerator(config: RunConfig) -> tuple[Accelerator, Precision]:
    """Starts Accelerate: processes, device, trackers; raises a ConfigError if one is not available."""
    check_trackers(config.train.trackers)
    check_launcher(os.environ)
    # A second run in one Python process may use another precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    group, is_gloo = group_settings(config.train.timeout_seconds), needs_gloo(os.environ)
    with distributed_errors():
        first = Accelerator(mixed_precision="no", cpu=is_gloo, kwargs_handlers=[group])
    if first.num_processes != num_launched(os.environ):
        problem = f"the launcher started {num_launched(os.environ)} processes"
        raise ConfigError(f"{problem}, but {first.device} supports one only; start one", key="processes")
    precision = choose_precision(config, first.device, os.environ)
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision.compute, precision.compute),
        cpu=is_gloo,
        log_with=list(config.train.trackers) or None,
        # The loop divides losses by itself; a variable of the environment must not do it again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Trackers require a folder here; the run's is chosen later, by all processes together.
        project_dir=".",
    )
    return accelerator, precision


@contextmanager
def as_out_of_memory() -> Iterator[None]:
    """Raises the errors of other allocators (CPU, MPS, cuDNN) as torch's OutOfMemoryError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise torch.OutOfMemoryError(first_line(error)) from error
        raise


def check_trackers(trackers: list[str]) -> None:
    """Raises a ConfigError if a tracker is unknown or not installed."""
    known = sorted(str(kind.value) for kind in LoggerType if kind != LoggerType.ALL)
    for tracker in trackers:
        if tracker not in known:
            raise ConfigError(f"train.trackers has unknown {tracker!r}; choose from {', '.join(known)}")
        # A tracker's name is its package's.
        if _version(tracker) == NOT_INSTALLED:
            package = "'sdlora[tensorboard]'" if tracker == "tensorboard" else tracker
            problem = f"train.trackers has {tracker!r}, which is not installed"
            raise ConfigError(f"{problem}; pip install {package}")


def describe_environment(accelerator: Accelerator, precision: Precision, **values: Any) -> dict[str, Any]:
    """Versions, device and dtypes, for `environment.json`."""
    device = accelerator.device
    return {
        "device": str(device),
        "device_name": name_device(device),
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "compute_dtype": precision.compute,
        "base_dtype": precision.base,
        "adapter_dtype": "fp32",
        "autocast": precision.compute != precision.base,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": dict(package_versions()),
        **values,
    }


def name_device(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return platform.processor() or platform.machine()


@cache
def package_versions() -> Mapping[str, str]:
    return MappingProxyType({package: _version(package) for package in PACKAGES})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


def find_device(accelerator: Accelerator, precision: Precision) -> DeviceInfo:
    """The device with the least free memory of all processes; those of a host share the memory of a CPU."""
    own = free_bytes(accelerator.device)
    least = min(all_gather(accelerator, -1 if own is None else own))
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    share = on_host if accelerator.device.type == "cpu" else 1
    device = accelerator.device
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return DeviceInfo(
        precision,
        device,
        free_bytes=None if least < 0 else least // share,
        baseline_bytes=baseline_bytes(device),
        name=f"{name_device(device)}{threads}",
    )


def imagine_device(name: str, config: RunConfig) -> DeviceInfo:
    """A GPU that is not here, by the name of `--device`, with the precision that it would have."""
    card = find_card(name)
    return device_of_card(card, choose_precision(config, torch.device("cuda"), {}, card.has_bf16))
