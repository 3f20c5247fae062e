"""The held-out loss: with fixed images, noise and timesteps, so that two numbers can be compared.

B batch, C channels, H W latent size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.models.base import Condition
from sdlora.models.checks import PREDICTIONS
from sdlora.seeds import derive_seed

NUM_BANDS = 5

Denoise = Callable[[Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True)
class HeldoutItem:
    """An image of the held-out loss.

    `key`, its digest, decides the noise. `latents` are the mean of the posterior, (C, H, W).
    """

    key: str
    latents: Tensor
    condition: Condition


@dataclass(frozen=True)
class HeldoutLoss:
    """The mean squared error: over everything, by band of timesteps ("0-199", …), low noise first, and of
    each image, over all bands, in the order of the items."""

    loss: float
    by_band: dict[str, float]
    num_images: int
    by_image: tuple[float, ...] = field(default=(), repr=False)


class Share(NamedTuple):
    """Every `num_shares`-th batch, from the `first`-th on; `add` sums a tensor over all shares."""

    first: int = 0
    num_shares: int = 1
    add: Callable[[Tensor], Tensor] = torch.clone


@torch.no_grad()
def heldout_loss(
    denoise: Denoise,
    schedule: NoiseSchedule,
    items: Sequence[HeldoutItem],
    *,
    batch_size: int,
    device: torch.device,
    share: Share = Share(),  # noqa: B008
) -> HeldoutLoss:
    """Measures the loss without random state: the same weights give the same number.

    Each image is noised once to the middle of each band of timesteps, with noise from the image's key and the
    timestep. The loss is unweighted, so that runs with different objectives can be compared.

    Args:
        denoise: Takes noisy latents (B, C, H, W), timesteps (B,) and their condition.
        schedule: The base's forward process.
        items: Images of one or more sizes.
        batch_size: Number of images in a forward pass.
        device: Device of `denoise`.
        share: Share of this process.
    """
    width = schedule.num_timesteps // NUM_BANDS
    groups: dict[torch.Size, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        groups[item.latents.shape].append(number)
    batches = [
        (band, group[start : start + batch_size])
        for band in range(NUM_BANDS)
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]
    # Batches of other processes stay 0, so that the sum over the shares does not depend on their number.
    losses = torch.zeros(NUM_BANDS, len(items), dtype=torch.float64)
    for band, numbers in batches[share.first :: share.num_shares]:
        batch, timestep = [items[number] for number in numbers], band * width + width // 2
        seeds = [derive_seed("heldout", item.key, timestep) for item in batch]
        answer, *known = _denoise(denoise, schedule, batch, seeds, timestep, device)
        errors = (answer - schedule.target(*known)).square().mean(dim=(1, 2, 3))
        losses[band, numbers] = errors.cpu().double()
    losses = share.add(losses)
    totals = [0.0] * NUM_BANDS
    for band, numbers in batches:
        totals[band] += float(losses[band, numbers].sum())
    means = [total / len(items) for total in totals]
    names = [f"{band * width}-{(band + 1) * width - 1}" for band in range(NUM_BANDS)]
    by_image = tuple(losses.mean(dim=0).tolist())
    return HeldoutLoss(sum(means) / NUM_BANDS, dict(zip(names, means, strict=True)), len(items), by_image)


def _denoise(
    denoise: Denoise,
    schedule: NoiseSchedule,
    items: Sequence[HeldoutItem],
    seeds: Sequence[int],
    timestep: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The denoiser's answer (B, C, H, W) to items with noise from seeds; then latents, noise, timesteps."""
    latents = torch.stack([item.latents for item in items])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    latents, noise = latents.to(device), noise.to(device)
    timesteps = torch.full((len(items),), timestep, device=device)
    condition = Condition.stack([item.condition for item in items]).to(device)
    answer = denoise(schedule.add_noise(latents, noise, timesteps), timesteps, condition).float()
    return answer, latents, noise, timesteps


# Where the signal has this share, the targets differ most, and a trained denoiser is still close to its own.
SIGNAL = 0.6
CLEARLY = 0.6
# A part of an image shows it as well, in a third of the time of 512 px.
MOST_CELLS = 32


@torch.no_grad()
def recognise_prediction(
    denoise: Denoise, schedule: NoiseSchedule, items: Sequence[HeldoutItem], device: torch.device
) -> str | None:
    """Finds the one of `PREDICTIONS` whose target fits a denoiser's answers clearly better than the others.

    The prediction type of the schedule is ignored. The middle of a few items, all of one size, is enough.
    """
    timestep = int((schedule.alphas_cumprod.sqrt() - SIGNAL).abs().argmin())
    seeds = [derive_seed("prediction", item.key) for item in items]
    height, width = (min(MOST_CELLS, *(item.latents.shape[dim] for item in items)) for dim in (1, 2))
    parts = [replace(item, latents=_middle(item.latents, height, width)) for item in items]
    answer, *known = _denoise(denoise, schedule, parts, seeds, timestep, device)
    errors = {}
    for kind in PREDICTIONS:
        target = replace(schedule, prediction_type=kind).target(*known)
        shares = (answer - target).square().mean(dim=(1, 2, 3)) / target.square().mean(dim=(1, 2, 3))
        errors[kind] = float(shares.sum())
    best, second = sorted(errors, key=errors.__getitem__)[:2]
    return best if errors[best] < CLEARLY * min(errors[second], len(items)) else None


def _middle(latents: Tensor, height: int, width: int) -> Tensor:
    """The middle (C, height, width) of latents (C, H, W)."""
    top, left = (latents.shape[1] - height) // 2, (latents.shape[2] - width) // 2
    return latents[:, top : top + height, left : left + width]
