"""The protocol of a base for training, sampling, evaluation and the memory plan.

`StableDiffusion` implements it; outside `models/` no other class of a base is known.
B batch, C channels, H W image size, h w latent size, L tokens, D width of the hidden states, P of the pooled.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from diffusers.utils import logging as diffusers_logging
from PIL.Image import Image
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from sdlora.models.info import BaseInfo

LIBRARIES = {"diffusers": diffusers_logging, "transformers": transformers_logging}
# Of glibc's malloc.h, with the sizes that glibc comes to by itself, and the largest it takes.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
USUAL, LARGEST = {TRIM_THRESHOLD: 2**26, MMAP_THRESHOLD: 2**25}, 2**31 - 1


@contextmanager
def quiet(*, warnings: bool = False) -> Iterator[None]:
    """Mutes progress bars and, if not `warnings`, warnings of diffusers and transformers, and restores them.

    Only for calls whose result is checked: to diffusers, for example, missing weights are only a warning.
    """
    levels = {logger: logger.level for logger in map(logging.getLogger, LIBRARIES)}
    bars = [module for module in LIBRARIES.values() if module.is_progress_bar_enabled()]
    try:
        for logger in () if warnings else levels:
            logger.setLevel(logging.ERROR)
        for module in bars:
            module.disable_progress_bar()
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for module in bars:
            module.enable_progress_bar()


@dataclass(frozen=True, eq=False)
class Condition:
    """The denoiser's inputs besides noisy latents and timesteps.

    Args:
        hidden: Text states, (B, L, D), or (L, D) for one caption.
        pooled: Pooled text, (B, P), if the denoiser reads it, else None.
        time_ids: (B, 6) for SDXL (2307.01952, section 2.2), else None: original height and width, top and
            left of the crop, target height and width, in pixels.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: int) -> Condition:
        """One caption of a batch."""
        return Condition(
            self.hidden[index],
            None if self.pooled is None else self.pooled[index],
            None if self.time_ids is None else self.time_ids[index],
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """A copy on a device; time ids are pixels and keep their dtype."""
        return Condition(
            self.hidden.to(device, dtype),
            None if self.pooled is None else self.pooled.to(device, dtype),
            None if self.time_ids is None else self.time_ids.to(device),
        )

    def with_time_ids(self, time_ids: Tensor) -> Condition:
        return replace(self, time_ids=time_ids)

    @staticmethod
    def stack(conditions: Sequence[Condition]) -> Condition:
        """A batch of single captions."""
        pooled = [one.pooled for one in conditions if one.pooled is not None]
        time_ids = [one.time_ids for one in conditions if one.time_ids is not None]
        return Condition(
            torch.stack([one.hidden for one in conditions]),
            torch.stack(pooled) if pooled else None,
            torch.stack(time_ids) if time_ids else None,
        )


class Base(Protocol):
    """A frozen base in eval mode and without gradients.

    Attributes:
        info: Its description, known before weights are loaded. `info.scheduler_config` describes the noise
            schedule, which `diffusion.schedule` builds.
        denoiser: The network that is trained on.
        vae: Encodes and decodes images.
        dtype: Of the denoiser.
        safety_checker: Whether each image must be withheld; None if the base has none.
    """

    info: BaseInfo
    denoiser: nn.Module
    vae: Any
    dtype: torch.dtype
    safety_checker: Callable[[Sequence[Image]], Sequence[bool]] | None

    @property
    def device(self) -> torch.device:
        """The denoiser's device."""

    @property
    def components(self) -> dict[str, nn.Module]:
        """The networks that can carry adapters, by their names in LoRA files."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Effective dtype of each component, for the log."""

    @property
    def text_dtype(self) -> torch.dtype:
        """Dtype of the text encoders."""

    @property
    def attention_kernel(self) -> str:
        """Attention implementation of the denoiser, for the log."""

    def load_denoiser(self) -> None:
        """Loads the denoiser of a base that was loaded with `lazy`."""

    def text_encoders_to(self, device: torch.device | str) -> None:
        """Moves text encoders; `meta` frees their memory until they are needed again, as for the VAE."""

    def use_cpu_kernels(self) -> bool:
        """Computes attention and frozen convolutions faster, on a CPU in bf16; False if it cannot."""

    def use_blocked_attention(self) -> bool:
        """With the kernels of a CPU, computes attention's gradients in blocks; False if it cannot."""

    def compile_blocks(self) -> str | None:
        """Compiles the denoiser's transformer blocks when they first run; the reason if it cannot."""

    def enable_gradient_checkpointing(self, *, text: bool) -> None:
        """Recomputes activations in the backward pass, with `text` in text encoders as well."""

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation (B, C, h, w) of images (B, 3, H, W) in [-1, 1].

        In the denoiser's units, in float32. Raises a ModelError if they are not finite even so.
        """

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in about [-1, 1] of latents (B, C, h, w), in float32 on the CPU."""

    def encode_captions(self, captions: Sequence[str]) -> Condition:
        """Text states of captions in float32, each encoded alone, without time ids."""

    def encode_batch(self, captions: Sequence[str]) -> Condition:
        """Text states of captions in one pass, with gradients if a text encoder is trained."""

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The denoiser's prediction (B, C, h, w) in float32 for noisy latents and timesteps (B,)."""

    def example_inputs(
        self, latents: tuple[int, int] | None = None, batch_size: int = 1
    ) -> tuple[Tensor, Tensor, Condition]:
        """Fixed inputs for `denoise`, on its device, of a size h and w.

        By default the smallest with several positions at every level, since a CPU takes minutes for the size
        that SDXL was trained for.
        """

    def make_pipeline(self, scheduler: Any, *, from_image: bool = False) -> Any:
        """The stock diffusers pipeline around the denoiser, from encoded prompts to latents.

        With `from_image`, that for image to image, whose `prepare_latents` needs a VAE: replace it.
        """


def release_memory() -> None:
    """Returns freed memory to the system, which glibc would keep: a tenth of a run's peak on a CPU."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Lets tensors of the size of an image take the place of those that were freed.

    Otherwise each of them is new memory, which the system fills with zeros first: a tenth to a third of
    what the VAE takes for an image of 512 px.
    """
    _set_thresholds(dict.fromkeys(USUAL, LARGEST))
    try:
        yield
    finally:
        _set_thresholds(USUAL)
        release_memory()


def _set_thresholds(sizes: dict[int, int]) -> None:
    with suppress(OSError, AttributeError):
        for parameter, size in sizes.items():
            ctypes.CDLL(None).mallopt(parameter, size)
