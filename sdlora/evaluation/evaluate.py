"""Measures a run on its held-out images: losses and image distances, of the base and with the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora.data.captions import without_trigger
from sdlora.errors import ConfigError
from sdlora.evaluation.context import open_context
from sdlora.evaluation.heldout import HeldoutLoss
from sdlora.evaluation.scores import Interval, mean_text, ratio_interval
from sdlora.models.base import Base
from sdlora.models.load import full_base as use_full_base
from sdlora.notebook import show_html
from sdlora.report.summary import MIN_IMAGES
from sdlora.runs import RunFolder


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
class Untriggered:
    """Distances without the trigger in the captions, for images whose captions contain more than the trigger.

    Args:
        images: Number of these images.
        base: Mean distances of the base's samples.
        style: Mean distances with the adapter.
        share: The decrease of the style distance without the trigger, over that with it; None for
            fewer than `MIN_IMAGES` images, and if there is no clear decrease with it.
    """

    images: int
    base: ImageDistance
    style: ImageDistance
    share: Interval | None = None


@dataclass(frozen=True)
class Evaluation:
    """Measures of a run on its held-out images; `style` is with the adapter.

    Args:
        images: Number of images.
        base_loss: Held-out loss of the base.
        style_loss: Held-out loss with the adapter.
        base_distances: Distances between the base's samples of the captions and the images.
        style_distances: Distances with the adapter.
        untriggered: Distances without the trigger; None if there is no trigger, or no caption has more.
        gap: Losses on the quantized and on the full base; None unless asked for.
    """

    images: int
    base_loss: HeldoutLoss
    style_loss: HeldoutLoss
    base_distances: Sequence[ImageDistance]
    style_distances: Sequence[ImageDistance]
    untriggered: Untriggered | None = None
    gap: Gap | None = None

    @property
    def base_distance(self) -> ImageDistance:
        return mean_distance(self.base_distances)

    @property
    def style_distance(self) -> ImageDistance:
        return mean_distance(self.style_distances)

    @property
    def style_wins(self) -> int:
        """Number of images that the adapter's sample is closer to in style than the base's."""
        pairs = zip(self.base_distances, self.style_distances, strict=True)
        return sum(style.style < base.style for base, style in pairs)

    @property
    def untriggered_distance(self) -> ImageDistance | None:
        return self.untriggered.style if self.untriggered else None

    @property
    def bleed(self) -> float | None:
        """The share of the decrease of the style distance that does not need the trigger."""
        return self.untriggered.share.value if self.untriggered and self.untriggered.share else None

    @property
    def loss_change(self) -> Interval | None:
        """Relative change of the held-out loss by the adapter; None for fewer than `MIN_IMAGES` images."""
        pairs = zip(self.base_loss.by_image, self.style_loss.by_image, strict=True)
        return ratio_interval([style - base for base, style in pairs], self.base_loss.by_image)

    @property
    def verdict(self) -> str:
        """What the losses show, or what is missing to show it; distances in VAE latents have no say."""
        change = self.loss_change
        if change is None:
            return f"none: {self.images} held-out images are too few; hold out {MIN_IMAGES} (data.heldout)"
        if not change.is_clear:
            return (
                f"none: {self.images} images cannot tell the change of the held-out loss from 0: {change}; "
                "hold out more images"
            )
        if change.value < 0:
            return f"the LoRA lowers the loss on images that it has not seen: {change}; judge the grid by eye"
        return f"the LoRA raises the held-out loss: {change}; try fewer train.steps or a lower learning rate"

    def to_json(self) -> dict[str, Any]:
        change, bare = self.loss_change, self.untriggered_distance
        return {
            **asdict(self),
            "base_distance": asdict(self.base_distance),
            "style_distance": asdict(self.style_distance),
            "style_wins": self.style_wins,
            "untriggered_distance": asdict(bare) if bare else None,
            "bleed": self.bleed,
            "loss_change": asdict(change) if change else None,
            "verdict": self.verdict,
        }

    def _repr_html_(self) -> str:
        return show_html("evaluation", self.lines())

    def lines(self) -> list[str]:
        base, style = self.base_distances, self.style_distances
        lines = [
            _beside("held-out loss", self.base_loss.by_image, self.style_loss.by_image)
            + f" on {self.images} images",
            _beside("style distance", [one.style for one in base], [one.style for one in style]),
            _beside("content distance", [one.content for one in base], [one.content for one in style]),
            "                  (samples against held-out images, in VAE latents: mean and standard "
            "deviation of the channels; every latent pixel; not a measure of quality)",
        ]
        if bare := self.untriggered:
            share = f"; {bare.share} of the decrease is there without it" if bare.share else ""
            lines.append(
                f"without trigger   style distance base {bare.base.style:.2g}, style {bare.style.style:.2g} "
                f"on {bare.images} images{share}"
            )
        lines.append(f"by the loss       {self.verdict}")
        return lines + ([f"gap               {self.gap}"] if self.gap else [])


def _beside(title: str, base: Sequence[float], style: Sequence[float]) -> str:
    return f"{title:<17} base {mean_text(base)}, style {mean_text(style)}"


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
        full_base: Measures the loss on the full base too, after training on a quantized one.
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
    captions = context.captions
    trigger = context.config.data.trigger
    bare = remove_triggers(captions, trigger) if trigger else {}
    count, total = len(captions), 2 * (len(captions) + len(bare))
    show = progress or (lambda finished, total: None)

    def measure(captions: Mapping[int, str], done: int) -> list[list[ImageDistance]]:
        stacks = [(), context.style]
        made = context.samples(stacks, captions, seed, lambda finished: show(done + finished, total))
        drawings = [context.drawings[number] for number in captions]
        return [image_distances(context.base, images, drawings) for images in made]

    plain, styled = measure(captions, 0)
    untriggered = None
    if bare:
        paired = [[row[number] for number in bare] for row in (plain, styled)]
        untriggered = compare_untriggered(*paired, *measure(bare, 2 * count))
    gap = None
    if full_base:
        with use_full_base(context.base) as full:
            used = replace(context, base=full).loss(context.style).loss
        gap = Gap(context.base.info.quantize, style_loss.loss, used, count)
    result = Evaluation(count, base_loss, style_loss, plain, styled, untriggered, gap)
    context.run.add_evaluation(**result.to_json(), adapter=context.run.adapter.name, seed=seed)
    return result


def compare_untriggered(
    base: Sequence[ImageDistance],
    style: Sequence[ImageDistance],
    bare_base: Sequence[ImageDistance],
    bare_style: Sequence[ImageDistance],
) -> Untriggered:
    """Compares the distances of the same images with the trigger in their captions, and without it."""
    gains = [before.style - after.style for before, after in zip(base, style, strict=True)]
    bare_gains = [before.style - after.style for before, after in zip(bare_base, bare_style, strict=True)]
    gain = ratio_interval(gains, [1.0] * len(gains))
    share = ratio_interval(bare_gains, gains) if gain and gain.low > 0 else None
    return Untriggered(len(gains), mean_distance(bare_base), mean_distance(bare_style), share)


def remove_triggers(captions: Mapping[int, str], trigger: str) -> dict[int, str]:
    """The captions without the trigger, of those that contain something else."""
    bare = {number: without_trigger(caption, trigger) for number, caption in captions.items()}
    return {number: caption for number, caption in bare.items() if caption}
