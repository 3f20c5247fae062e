"""Accelerate's processes and device, and one source of truth for precision."""

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
from accelerate.utils import LoggerType
from accelerate.utils.memory import should_reduce_batch_size

from sdlora.config import RunConfig
from sdlora.errors import ConfigError, first_line
from sdlora.memory.estimate import Machine, free_bytes
from sdlora.models.dtypes import DTYPES, Precision, has_bf16
from sdlora.training.distributed import (
    all_gather,
    check_launcher,
    distributed_errors,
    group_settings,
    needs_gloo,
    num_launched,
)

NOT_INSTALLED = "not installed"
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


def choose_precision(config: RunConfig, device: torch.device, environment: Mapping[str, str]) -> Precision:
    """Settles precision from the settings, the launcher and the device.

    Args:
        config: `train.precision` and `base.dtype`.
        device: Where training runs.
        environment: Environment variables; `accelerate launch` exports its own precision there, and
            always exports `no` when it was not asked for one.

    Raises:
        ConfigError: If the launcher disagrees, the device cannot, or the base is stored in less than it
            shall compute in.
    """
    asked, base = str(config.train.precision), config.base.dtype
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched != "no":
        if asked not in ("auto", launched):
            raise ConfigError(
                f"train.precision = {asked} but the launcher says --mixed_precision {launched} "
                "(ACCELERATE_MIXED_PRECISION); give one of them, or the same to both"
            )
        asked = launched
    if asked == "auto":
        asked = "bf16" if has_bf16(device) else "fp32" if base == "auto" else base
    if asked not in DTYPES:
        raise ConfigError(
            f"--mixed_precision {asked} is not supported; use train.precision=bf16, fp16 or fp32"
        )
    if asked == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision = fp16 needs a GPU (this is the cpu); use bf16 or fp32")
    if asked == "fp32" and base not in ("auto", "fp32"):
        raise ConfigError(
            f"train.precision = fp32 and base.dtype = {base} cannot be together: autocast computes in less "
            f"than the base is stored in, never in more; leave base.dtype out, or set train.precision={base}"
        )
    return Precision(asked, asked if base == "auto" else base)


def make_accelerator(config: RunConfig) -> tuple[Accelerator, Precision]:
    """Starts Accelerate: processes, device, trackers.

    Raises:
        ConfigError: If precision, a tracker or the launcher's processes cannot be had.
    """
    check_trackers(config.train.trackers)
    check_launcher(os.environ)
    # A second run in one Python process may use another precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    group, is_gloo = group_settings(config.train.timeout_seconds), needs_gloo(os.environ)
    with distributed_errors():
        first = Accelerator(mixed_precision="no", cpu=is_gloo, kwargs_handlers=[group])
    if first.num_processes != num_launched(os.environ):
        raise ConfigError(
            f"the launcher started {num_launched(os.environ)} processes, which {first.device} cannot join "
            "into one run; start one"
        )
    precision = choose_precision(config, first.device, os.environ)
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision.compute, precision.compute),
        cpu=is_gloo,
        log_with=list(config.train.trackers) or None,
        # Trackers want a folder here; the run's is chosen when the processes have met.
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
    """Refuses unknown trackers and those whose package is missing.

    Raises:
        ConfigError: Naming it and what to install.
    """
    known = sorted(str(kind.value) for kind in LoggerType if kind != LoggerType.ALL)
    for tracker in trackers:
        if tracker not in known:
            raise ConfigError(f"train.trackers has {tracker!r}; known are {', '.join(known)}")
        # Each has the name of its package.
        if _version(tracker) == NOT_INSTALLED:
            package = "'sdlora[tensorboard]'" if tracker == "tensorboard" else tracker
            raise ConfigError(
                f"train.trackers has {tracker!r} but its package is not installed; pip install {package}"
            )


def describe_environment(accelerator: Accelerator, precision: Precision, **values: Any) -> dict[str, Any]:
    """Versions, device and dtypes, as `environment.json` keeps them."""
    device = accelerator.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "device": str(device),
        "device_name": name,
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


@cache
def package_versions() -> Mapping[str, str]:
    """What decides the bits of a run, and what its files say they were made with."""
    return MappingProxyType({package: _version(package) for package in PACKAGES})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


def find_machine(accelerator: Accelerator, precision: Precision) -> Machine:
    """What all processes can count on: the least that one of them has, and of one CPU's memory a share."""
    own = free_bytes(accelerator.device)
    least = min(all_gather(accelerator, -1 if own is None else own))
    share = accelerator.num_processes if accelerator.device.type == "cpu" else 1
    return Machine(precision, accelerator.device, None if least < 0 else least // share)
