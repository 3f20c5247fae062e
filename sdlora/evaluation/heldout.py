"""The held-out loss: fixed images, fixed noise, fixed timesteps, so that two numbers can be compared.

B batch, C channels, H W latent size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    """One image as the loss sees it.

    Args:
        key: Decides its noise; the image's digest.
        latents: The posterior's mean, (C, H, W).
        condition: Of its caption and, for SDXL, its size.
    """

    key: str
    latents: Tensor
    condition: Condition


@dataclass(frozen=True)
class HeldoutLoss:
    """The mean squared error over all images, and over each band of timesteps.

    Args:
        loss: Mean over everything.
        by_band: "0-199" and so on, low noise first.
        num_images: How many images it was taken over.
    """

    loss: float
    by_band: dict[str, float]
    num_images: int


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
    """Measures the loss without any random state: the same weights give the same number.

    Each image meets the middle of each band of timesteps once, with noise keyed by the image
    and the band. The loss is unweighted, so that runs with different objectives can be compared.

    Args:
        denoise: Takes noisy latents (B, C, H, W), timesteps (B,) and their condition.
        schedule: The base's forward process.
        items: The images; several sizes may be mixed.
        batch_size: Images in one forward pass.
        device: Where `denoise` runs.
        share: Of this process.
    """
    width = schedule.num_timesteps // NUM_BANDS
    groups: dict[torch.Size, list[HeldoutItem]] = defaultdict(list)
    for item in items:
        groups[item.latents.shape].append(item)
    batches = [
        (band, group[start : start + batch_size])
        for band in range(NUM_BANDS)
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]
    # Batches of other processes stay 0, so that the sum of the shares is what one process would measure.
    sums = torch.zeros(len(batches), dtype=torch.float64)
    for number in range(share.first, len(batches), share.num_shares):
        band, batch = batches[number]
        losses = _losses(denoise, schedule, batch, band * width + width // 2, device)
        sums[number] = losses.cpu().double().sum()
    totals = [0.0] * NUM_BANDS
    for (band, _), total in zip(batches, share.add(sums).tolist(), strict=True):
        totals[band] += total
    means = [total / len(items) for total in totals]
    names = [f"{band * width}-{(band + 1) * width - 1}" for band in range(NUM_BANDS)]
    return HeldoutLoss(sum(means) / NUM_BANDS, dict(zip(names, means, strict=True)), len(items))


def _losses(
    denoise: Denoise,
    schedule: NoiseSchedule,
    items: Sequence[HeldoutItem],
    timestep: int,
    device: torch.device,
) -> Tensor:
    latents = torch.stack([item.latents for item in items])
    generators = [torch.Generator().manual_seed(derive_seed("heldout", item.key, timestep)) for item in items]
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    latents, noise = latents.to(device), noise.to(device)
    timesteps = torch.full((len(items),), timestep, device=device)
    condition = Condition.stack([item.condition for item in items]).to(device)
    answer = denoise(schedule.add_noise(latents, noise, timesteps), timesteps, condition).float()
    return (answer - schedule.target(latents, noise, timesteps)).square().mean(dim=(1, 2, 3))


# There the three targets differ most from one another, and a trained denoiser is still close to its own.
SIGNAL = 0.6
CLEARLY = 0.6


@torch.no_grad()
def recognise_prediction(
    denoise: Denoise, schedule: NoiseSchedule, items: Sequence[HeldoutItem], device: torch.device
) -> str | None:
    """The prediction type whose target a denoiser's answers fit clearly better than the others'.

    Args:
        denoise: As for `heldout_loss`.
        schedule: The base's forward process; its own prediction type has no say.
        items: A few images.
        device: Where `denoise` runs.

    Returns:
        One of `PREDICTIONS`, or None if the answers fit none of them clearly.
    """
    timestep = int((schedule.alphas_cumprod.sqrt() - SIGNAL).abs().argmin())
    timesteps = torch.tensor([timestep], device=device)
    errors = dict.fromkeys(PREDICTIONS, 0.0)
    for item in items:
        latents = item.latents[None].to(device)
        generator = torch.Generator().manual_seed(derive_seed("prediction", item.key))
        noise = torch.randn(latents.shape, generator=generator).to(device)
        condition = Condition.stack([item.condition]).to(device)
        answer = denoise(schedule.add_noise(latents, noise, timesteps), timesteps, condition).float()
        for kind in errors:
            target = replace(schedule, prediction_type=kind).target(latents, noise, timesteps)
            errors[kind] += float((answer - target).square().mean() / target.square().mean())
    best, second = sorted(errors, key=errors.__getitem__)[:2]
    return best if errors[best] < CLEARLY * min(errors[second], len(items)) else None
