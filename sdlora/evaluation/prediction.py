"""What a UNet predicts, told by its answers: a base whose configuration is wrong trains to nothing, silently.

B batch, C channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sdlora.diffusion.objective import keyed_generator
from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.evaluation.heldout import Denoise, HeldoutItem
from sdlora.models.condition import Condition
from sdlora.models.configuration import PREDICTIONS

# There the three targets differ most from one another, and a trained UNet is still close to its own.
SIGNAL = 0.6
CLEARLY = 0.6


@torch.no_grad()
def recognise_prediction(
    denoise: Denoise, schedule: NoiseSchedule, items: Sequence[HeldoutItem], device: torch.device
) -> str | None:
    """The prediction type whose target a UNet's answers fit clearly better than the others'.

    Args:
        denoise: As for `heldout_loss`.
        schedule: The base's forward process; its own prediction type has no say.
        items: A few pictures.
        device: Where `denoise` runs.

    Returns:
        One of `PREDICTIONS`, or None if the answers fit none of them clearly.
    """
    timestep = int((schedule.alphas_cumprod.sqrt() - SIGNAL).abs().argmin())
    timesteps = torch.tensor([timestep], device=device)
    errors = dict.fromkeys(PREDICTIONS, 0.0)
    for item in items:
        latents = item.latents[None].to(device)
        generator = keyed_generator("prediction", item.key)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        condition = Condition.stack([item.condition]).to(device)
        answer = denoise(schedule.add_noise(latents, noise, timesteps), timesteps, condition).float()
        for kind in errors:
            target = replace(schedule, prediction_type=kind).target(latents, noise, timesteps)
            errors[kind] += float((answer - target).square().mean() / target.square().mean())
    best, second = sorted(errors, key=errors.__getitem__)[:2]
    return best if errors[best] < CLEARLY * min(errors[second], len(items)) else None
