"""What one training sample draws, and the loss of a batch: one value per sample.

B batch, C channels, H W latent size, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional

from sdlora.config import ObjectiveSection
from sdlora.diffusion.schedule import NoiseSchedule, TimestepSampler, describe_parameters, make_sampler
from sdlora.objectives import LOSSES, TIMESTEPS

SNR_RANGE = (1e-3, 1e3)
# A pass forward and backward, and one forward, more; backward costs a little more than forward.
PRIOR_COST = "each step takes about 2.5 times as long"


def draw_noise(shape: torch.Size, settings: ObjectiveSection, generator: Generator) -> Tensor:
    """The noise ε that the denoiser predicts, (C, H, W).

    Offset noise (Guttenberg 2023, "Diffusion with Offset Noise"): ε' = ε + s ξ, where ξ ~ N(0, I) is one
    number for each channel: the mean of an image is noised as well, so that the denoiser learns to move it.
    """
    noise = torch.randn(shape, generator=generator)
    if settings.noise_offset:
        noise = noise + settings.noise_offset * torch.randn((shape[0], 1, 1), generator=generator)
    if settings.pyramid_noise:
        noise = add_pyramid(noise, settings.pyramid_noise, settings.pyramid_discount, generator)
    return noise


def add_pyramid(noise: Tensor, levels: int, discount: float, generator: Generator) -> Tensor:
    """Adds coarser noise to white noise, and brings the sum back to unit variance.

    Multi-resolution noise (Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training"):
    ε' = (ε + Σ_{i < n} dⁱ up(ε_i)) / std, where ε_i is white noise of 1 / r_iⁱ the size, r_i uniform in
    [2, 4), enlarged bilinearly; the sum ends early at a level of one pixel. Low frequencies gain: the
    denoiser learns to move whole areas and the mean, which white noise hardly touches.
    `noise` is ε, (C, H, W); `levels` is the most that n can be, `discount` is d.
    """
    channels, height, width = noise.shape
    total = noise
    for level in range(levels):
        ratio = (2 + 2 * float(torch.rand((), generator=generator))) ** level
        size = (max(1, int(height / ratio)), max(1, int(width / ratio)))
        coarse = torch.randn((1, channels, *size), generator=generator)
        total = total + discount**level * functional.interpolate(coarse, (height, width), mode="bilinear")[0]
        if 1 in size:
            break
    return total / total.std()


def perturb(noise: Tensor, strength: float, generator: Generator) -> Tensor:
    """The noise that makes the denoiser's input, (C, H, W); its target stays ε.

    Input perturbation (Ning et al. 2023, 2301.11706): x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) (ε + γ ξ) with
    ξ ~ N(0, I) and γ = `strength`: the denoiser gets used to errors like its own while sampling.
    """
    return noise + strength * torch.randn(noise.shape, generator=generator) if strength else noise


def timestep_weight(schedule: NoiseSchedule, timesteps: Tensor, settings: ObjectiveSection) -> Tensor | None:
    """The weight of each sample by its timestep, (B,); None if all count alike."""
    if settings.min_snr_gamma:
        return min_snr_weight(schedule, timesteps, settings.min_snr_gamma)
    return debiased_weight(schedule, timesteps) if settings.debiased else None


def min_snr_weight(schedule: NoiseSchedule, timesteps: Tensor, gamma: float) -> Tensor:
    """The Min-SNR-γ weight, shape (B,).

    Hang et al. 2023 (2303.09556), section 3.4: min(SNR, γ) for x_0 targets, divided by SNR for ε targets and
    by SNR + 1 for v targets. Written so that it stays finite at SNR = 0 and ∞.
    """
    snr = schedule.snr(timesteps)
    if schedule.prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    clipped = snr.clamp(max=gamma)
    return clipped if schedule.prediction_type == "sample" else clipped / (snr + 1)


def debiased_weight(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """The weight of debiased estimation, shape (B,): high noise counts more.

    Yu et al. 2023 (2310.08442): 1 / √SNR for ε targets, which is √SNR for x_0 targets and
    √SNR / (SNR + 1) for v targets. The SNR is kept in [0.001, 1000]: no weight is infinite at SNR = 0 or ∞,
    and no base without zero terminal SNR goes below.
    """
    snr = schedule.snr(timesteps).clamp(*SNR_RANGE)
    if schedule.prediction_type == "epsilon":
        return snr.rsqrt()
    return snr.sqrt() if schedule.prediction_type == "sample" else snr.sqrt() / (snr + 1)


Denoiser = Callable[[Tensor, Tensor], Tensor]


class BaseDenoiser(Protocol):
    """A denoiser without the adapter."""

    def __call__(self, noisy: Tensor, timesteps: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        """As `Denoiser`; with `chosen`, for those samples of the batch alone."""


@dataclass(frozen=True)
class Objective:
    """The training objective: noise schedule, timesteps, loss and weights."""

    schedule: NoiseSchedule
    settings: ObjectiveSection

    @cached_property
    def sampler(self) -> TimestepSampler:
        return make_sampler(self.schedule, self.settings)

    @cached_property
    def without_layout(self) -> Objective:
        """The objective without `objective.layout_range`."""
        return replace(self, settings=self.settings.model_copy(update={"layout_range": None}))


@dataclass(frozen=True)
class Draws:
    """The random draws of a batch; all (B, C, H, W), but timesteps (B,).

    Args:
        latents: x_0, drawn from the posterior.
        noise: ε of the target.
        timesteps: t.
        input_noise: ε, plus the input perturbation if there is one; what is added to the latents.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    input_noise: Tensor

    def to(self, device: torch.device) -> Draws:
        return Draws(*(getattr(self, field.name).to(device) for field in fields(self)))


def draw(objective: Objective, posteriors: Sequence[tuple[Tensor, Tensor]], seeds: Sequence[int]) -> Draws:
    """Draws latents, timesteps and noise, each sample from its own generator.

    `posteriors` are the VAE's mean and standard deviation of each sample, (C, H, W); `seeds` are from
    `derive_seed`.
    """
    settings = objective.settings
    latents, noise, timesteps, input_noise = [], [], [], []
    for (mean, std), seed in zip(posteriors, seeds, strict=True):
        # Settings that are off draw nothing, so that new ones do not change runs without them.
        generator = torch.Generator().manual_seed(seed)
        latents.append(mean + std * torch.randn(mean.shape, generator=generator))
        timesteps.append(objective.sampler.draw(generator))
        noise.append(draw_noise(mean.shape, settings, generator))
        input_noise.append(perturb(noise[-1], settings.input_perturbation, generator))
    return Draws(torch.stack(latents), torch.stack(noise), torch.cat(timesteps), torch.stack(input_noise))


def mask_weights(masks: Tensor, least: float) -> Tensor:
    """Weights of positions, (B, 1, H, W), from masks in [0, 1] of that shape.

    At least `least` everywhere, then divided by their mean over the sample: however small the inside of a
    mask, the sample counts as much as one without a mask.
    """
    weights = masks.clamp(min=least)
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)


def denoising_loss(
    denoise: Denoiser,
    objective: Objective,
    draws: Draws,
    masks: Tensor | None = None,
    denoise_base: BaseDenoiser | None = None,
    layout: list[int] | None = None,
) -> Tensor:
    """The weighted error of the denoiser's prediction, one value per sample, shape (B,).

    Rombach et al. 2022 (2112.10752), equation 2, for the base's own prediction type.

    Args:
        denoise: Predicts (B, C, H, W) from noisy latents (B, C, H, W) and timesteps (B,).
        objective: Schedule, loss and weights.
        draws: The random draws of the batch.
        masks: What counts, (B, 1, H, W) in [0, 1].
        denoise_base: `denoise` without the adapter, for `objective.layout_range` and
            `objective.unmasked_prior`.
        layout: The samples whose target is the base's own prediction, from `layout_samples`.
    """
    schedule, settings = objective.schedule, objective.settings
    noisy = schedule.add_noise(draws.latents, draws.input_noise, draws.timesteps)
    target = schedule.target(draws.latents, draws.noise, draws.timesteps)
    if layout and denoise_base is not None:
        target = target.clone()  # it may be the noise
        target[layout] = denoise_base(noisy[layout], draws.timesteps[layout], layout).float()
    answer = denoise(noisy, draws.timesteps).float()
    losses = _losses(answer - target, objective, draws)
    if masks is not None:
        losses = losses * mask_weights(masks, settings.unmasked_weight)
        if settings.unmasked_prior and denoise_base is not None:
            prior = _losses(answer - denoise_base(noisy, draws.timesteps).float(), objective, draws)
            losses = losses + settings.unmasked_prior * (1 - masks) * prior
    means = _mean_of_samples(losses, objective, draws)
    if layout:
        means[layout] = means[layout] * settings.layout_weight
    return means


def layout_samples(draws: Draws, settings: ObjectiveSection) -> list[int]:
    """The samples whose timestep is in `objective.layout_range`, for draws that are still on the CPU."""
    first, end = settings.layout_range or (0, 0)
    return [number for number, one in enumerate(draws.timesteps.tolist()) if first <= one < end]


def prior_loss(denoise: Denoiser, denoise_base: BaseDenoiser, objective: Objective, draws: Draws) -> Tensor:
    """The weighted distance of the prediction from that without the adapter, shape (B,).

    Prior prediction, as OneTrainer has it, and ai-toolkit's differential output preservation: what the base
    knows of captions without the trigger is kept without images that show it.
    """
    noisy = objective.schedule.add_noise(draws.latents, draws.input_noise, draws.timesteps)
    error = denoise(noisy, draws.timesteps).float() - denoise_base(noisy, draws.timesteps).float()
    return _mean_of_samples(_losses(error, objective, draws), objective, draws)


def _losses(error: Tensor, objective: Objective, draws: Draws) -> Tensor:
    """The loss function of an error (B, C, H, W), in each place."""
    settings = objective.settings
    entry = LOSSES[settings.loss]
    return entry.function(error, objective.schedule, draws.timesteps, **settings.parameters(entry))


def _mean_of_samples(losses: Tensor, objective: Objective, draws: Draws) -> Tensor:
    """The mean over each sample (B,), weighted by its timestep."""
    weight = timestep_weight(objective.schedule, draws.timesteps, objective.settings)
    means = losses.mean(dim=(1, 2, 3))
    return means if weight is None else means * weight


def describe_objective(objective: Objective) -> str:
    """The objective in one line, for the plan: what is off is not mentioned."""
    settings, sampler = objective.settings, objective.sampler
    loss, timesteps = settings.loss, f"{settings.timesteps} timesteps"
    if parameters := settings.parameters(LOSSES[settings.loss]):
        loss += f" ({describe_parameters(parameters)})"
    if (sampler.low, sampler.high) != (0, objective.schedule.num_timesteps):
        timesteps += f" in {sampler.low}-{sampler.high - 1}"
    if sampler.layout:
        first, end = sampler.layout
        timesteps += f", the base's layout in {first}-{end - 1} x {settings.layout_weight:g}"
    if settings.timesteps != "uniform":
        parts = [describe_parameters(settings.parameters(TIMESTEPS[settings.timesteps]))]
        parts.append(f"half of them in {sampler.quantile(0.25)}-{sampler.quantile(0.75)}")
        timesteps += f" ({'; '.join(filter(None, parts))})"
    others = {
        f"min-SNR {settings.min_snr_gamma:g}": settings.min_snr_gamma,
        "debiased weights": settings.debiased,
        f"noise offset {settings.noise_offset:g}": settings.noise_offset,
        f"pyramid noise {settings.pyramid_noise} x {settings.pyramid_discount:g}": settings.pyramid_noise,
        f"input perturbation {settings.input_perturbation:g}": settings.input_perturbation,
        f"outside masks the base's prediction x {settings.unmasked_prior:g}": settings.unmasked_prior,
        f"prior prediction x {settings.prior_weight:g} ({PRIOR_COST})": settings.prior_weight,
    }
    return ", ".join([loss, timesteps, *(text for text, is_on in others.items() if is_on)])
