"""Measures a run on its held-out images: losses and image distances, of the base and with the adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sdlora.data.captions import trigger_pattern
from sdlora.errors import ConfigError
from sdlora.evaluation.context import open_context
from sdlora.evaluation.heldout import HeldoutLoss
from sdlora.models.base import Base
from sdlora.models.load import full_base as use_full_base
from sdlora.runs import RunFolder
from sdlora.writing import write_json


@dataclass(frozen=True, slots=True)
class ImageDistance:
    """Distances between a sample and a held-out image: root mean squares over VAE latents.

    Args:
        style: Between the mean and the standard deviation of each channel, which do not depend on positions:
            palette, contrast, amount of line (the statistics of AdaIN, arXiv 1703.06868, equation 8).
        content: Between the latents themselves: a stroke elsewhere counts as much as no stroke.
    """

    style: float
    content: float


def image_distances(base: Base, samples: Sequence[Tensor], drawings: Sequence[Tensor]) -> list[ImageDistance]:
    """The distances of each pair of images, (3, H, W) in [-1, 1], by the VAE of the base."""
    pairs = zip(_encode(base, samples), _encode(base, drawings), strict=True)
    return [
        ImageDistance(style=_rms(_statistics(sample) - _statistics(drawing)), content=_rms(sample - drawing))
        for sample, drawing in pairs
    ]


def mean_distance(distances: Sequence[ImageDistance]) -> ImageDistance:
    """The mean over images."""
    count = len(distances)
    return ImageDistance(
        style=sum(distance.style for distance in distances) / count,
        content=sum(distance.content for distance in distances) / count,
    )


def _encode(base: Base, images: Sequence[Tensor]) -> list[Tensor]:
    return [base.encode_images(image[None])[0][0].cpu().double() for image in images]


def _statistics(latents: Tensor) -> Tensor:
    """Mean and standard deviation of each channel of (C, h, w), shape (2 C,)."""
    return torch.cat([latents.mean(dim=(1, 2)), latents.std(dim=(1, 2))])


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


@dataclass(frozen=True)
class Gap:
    """Held-out loss of an adapter on the quantized base of its training, and on the full base."""

    quantize: str
    trained: float
    used: float
    images: int

    def __str__(self) -> str:
        return (
            f"loss {self.trained:.4f} on the {self.quantize} base it was trained on, {self.used:.4f} on the "
            f"full base ({self.used / self.trained - 1:+.2%}), over {self.images} images"
        )


@dataclass(frozen=True)
class Evaluation:
    """Measures of a run on its held-out images; `style` is with the adapter.

    Args:
        images: Number of images.
        base_loss: Held-out loss of the base.
        style_loss: Held-out loss with the adapter.
        base_distance: Mean distances between the base's samples of the captions and the images.
        style_distance: Mean distances with the adapter.
        style_wins: Number of images that the adapter's sample is closer to in style than the base's.
        untriggered_distance: Mean distances with the adapter, without the trigger in the captions; None
            if there is no trigger.
        gap: Losses on the quantized and on the full base; None unless asked for.
    """

    images: int
    base_loss: HeldoutLoss
    style_loss: HeldoutLoss
    base_distance: ImageDistance
    style_distance: ImageDistance
    style_wins: int
    untriggered_distance: ImageDistance | None = None
    gap: Gap | None = None

    @property
    def bleed(self) -> float | None:
        """The share of the gain in style that does not need the trigger (R-30)."""
        gain = self.base_distance.style - self.style_distance.style
        if self.untriggered_distance is None or gain <= 0:
            return None
        return (self.base_distance.style - self.untriggered_distance.style) / gain

    def lines(self) -> list[str]:
        base, style = self.base_distance, self.style_distance
        lines = [
            _beside("held-out loss", self.base_loss.loss, self.style_loss.loss) + f" on {self.images} images",
            _beside("style distance", base.style, style.style)
            + f"; closer with the LoRA for {self.style_wins} of {self.images}",
            _beside("content distance", base.content, style.content),
            "                  (samples against held-out images, in VAE latents: mean and standard "
            "deviation of the channels; every latent pixel)",
        ]
        if self.untriggered_distance is not None:
            share = "" if self.bleed is None else f": {self.bleed:.0%} of the style is there without it"
            lines.append(f"without trigger   style distance {self.untriggered_distance.style:.3f}{share}")
        return lines + ([f"gap               {self.gap}"] if self.gap else [])


def _beside(title: str, base: float, style: float) -> str:
    return f"{title:<17} base {base:.4f}, style {style:.4f} ({style / base - 1:+.1%})"


def evaluate(
    run: str | Path | RunFolder,
    *,
    seed: int = 0,
    full_base: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates the final adapter of a run, and writes `evaluation.json`.

    Args:
        run: The run folder.
        seed: Seed of the samples.
        full_base: Measures the loss on the full base too, after training on a quantized one (R-48).
        progress: Called with (finished, total) sampled images.

    Raises:
        RunError: If the run has no held-out images.
        ConfigError: If `full_base` is set, but the base of the run is not quantized.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    if full_base and folder.read_config().base.quantize == "none":
        problem = f"--full-base: run {folder.path} was trained on the full base; remove the option"
        raise ConfigError(problem, key="option--full-base")
    context = open_context(folder)
    base_loss, style_loss = context.loss(()), context.loss(context.style)
    trigger = context.config.data.trigger
    captions = [record.caption for record in context.records]
    count, total = len(captions), len(captions) * (3 if trigger else 2)
    show = progress or (lambda finished, total: None)
    samples = context.samples([(), context.style], captions, seed, lambda done: show(done, total))
    plain, styled = (image_distances(context.base, made, context.drawings) for made in samples)
    untriggered = None
    if trigger:
        bare = [remove_trigger(caption, trigger) for caption in captions]
        (without,) = context.samples([context.style], bare, seed, lambda done: show(2 * count + done, total))
        untriggered = mean_distance(image_distances(context.base, without, context.drawings))
    gap = None
    if full_base:
        with use_full_base(context.base) as full:
            used = replace(context, base=full).loss(context.style).loss
        gap = Gap(context.base.info.quantize, style_loss.loss, used, count)
    result = Evaluation(
        images=count,
        base_loss=base_loss,
        style_loss=style_loss,
        base_distance=mean_distance(plain),
        style_distance=mean_distance(styled),
        style_wins=sum(style.style < base.style for base, style in zip(plain, styled, strict=True)),
        untriggered_distance=untriggered,
        gap=gap,
    )
    values = {**asdict(result), "bleed": result.bleed, "adapter": context.run.adapter.name, "seed": seed}
    write_json(context.run.evaluation_file, values)
    return result


def remove_trigger(caption: str, trigger: str) -> str:
    """The caption without the trigger and the comma after it."""
    bare = trigger_pattern(trigger).sub("", caption)
    return re.sub(r"\s*,(?:\s*,)*\s*", ", ", bare).strip(" ,") or "a picture"
