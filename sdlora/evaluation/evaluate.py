"""Measures a run on its held-out pictures: losses, and distances between pictures, base beside style."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora.config import RunConfig
from sdlora.data.buckets import BucketPlan, plan_buckets
from sdlora.data.images import crop_image, load_image
from sdlora.data.records import ImageRecord, Size
from sdlora.data.scan import scan_dataset
from sdlora.data.tensors import image_to_tensor
from sdlora.diffusion.schedule import schedule_from_config
from sdlora.errors import RunError
from sdlora.evaluation.heldout import HeldoutItem, HeldoutLoss, heldout_loss
from sdlora.evaluation.pictures import picture_distance, to_pixels
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import mounted
from sdlora.lora.files import load_adapter
from sdlora.models.dtypes import DTYPES
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.runs import RunFolder, write_json
from sdlora.sampling.generate import generate
from sdlora.sampling.session import choose_device, make_request

MAX_IMAGES = 40


@dataclass(frozen=True)
class Evaluation:
    """Base and style on the held-out pictures of a run.

    Args:
        images: How many pictures.
        base_loss: The held-out loss without the adapter.
        style_loss: And with it.
        base_distance: The mean distance (RMS of VAE latents) between samples of the held-out captions
            and the held-out pictures, without the adapter.
        style_distance: And with it.
        style_wins: For how many pictures the style's sample is nearer than the base's.
    """

    images: int
    base_loss: HeldoutLoss
    style_loss: HeldoutLoss
    base_distance: float
    style_distance: float
    style_wins: int

    def lines(self) -> list[str]:
        """As printed."""
        change = self.style_loss.loss / self.base_loss.loss - 1
        closer = self.style_distance / self.base_distance - 1
        return [
            f"held-out loss     base {self.base_loss.loss:.4f}, style {self.style_loss.loss:.4f} ({change:+.1%})",
            f"picture distance  base {self.base_distance:.3f}, style {self.style_distance:.3f} ({closer:+.1%}), "
            f"style nearer in {self.style_wins} of {self.images} (RMS of VAE latents, samples against "
            "held-out pictures of the same caption)",
        ]


def evaluate(
    run: str | Path | RunFolder, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Evaluates the final adapter of a run, and writes `evaluation.json`.

    Args:
        run: The run folder.
        seed: Of the samples.
        progress: Told (finished, total) sampled pictures.

    Raises:
        RunError: If the run has no held-out pictures.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    config = folder.read_config()
    info = inspect_base(config.base)
    index = scan_dataset(config.images, config.data, config.train.seed)
    records = index.heldout[:MAX_IMAGES]
    if not records:
        raise RunError(
            f"run {folder.path} has no held-out pictures; train with data.heldout=0.1 or a folder heldout/"
        )
    adapter = load_adapter(folder.adapter)
    device = choose_device()
    base = load_base(info, dtype=DTYPES[folder.read_environment()["base_dtype"]], device=device)
    plan = plan_buckets(
        index.records,
        config.data.resolution or info.resolution,
        config.data,
        heldout=index.heldout,
        min_step=info.min_step,
        seed=config.train.seed,
    )
    drawings = [_as_seen(record, plan, config) for record in records]
    base_loss, style_loss = _losses(base, adapter, records, drawings)
    samples = _samples(base, adapter, config, records, plan, seed, progress)
    distances = {
        strength: [
            picture_distance(base, [sample], [drawing])
            for sample, drawing in zip(samples[strength], drawings, strict=True)
        ]
        for strength in (0.0, 1.0)
    }
    result = Evaluation(
        images=len(records),
        base_loss=base_loss,
        style_loss=style_loss,
        base_distance=_mean(distances[0.0]),
        style_distance=_mean(distances[1.0]),
        style_wins=sum(style < plain for plain, style in zip(distances[0.0], distances[1.0], strict=True)),
    )
    values: dict[str, Any] = {**asdict(result), "adapter": folder.adapter.name, "seed": seed}
    write_json(folder.evaluation_file, values)
    return result


def _as_seen(record: ImageRecord, plan: BucketPlan, config: RunConfig) -> Tensor:
    image = load_image(record.path, config.data.background)
    return image_to_tensor(crop_image(image, plan.crops[record.name][0]))


def _losses(
    base: StableDiffusion, adapter: Adapter, records: Sequence[ImageRecord], drawings: Sequence[Tensor]
) -> tuple[HeldoutLoss, HeldoutLoss]:
    schedule = schedule_from_config(base.info.scheduler_config)
    items = [
        HeldoutItem(record.digest, base.encode_images(drawing[None])[0][0].cpu(), hidden.cpu())
        for record, drawing in zip(records, drawings, strict=True)
        for hidden in base.encode_captions([record.caption])
    ]
    plain = heldout_loss(base.denoise, schedule, items, batch_size=8, device=base.device)
    with mounted(base.unet, [(adapter, 1.0)]):
        styled = heldout_loss(base.denoise, schedule, items, batch_size=8, device=base.device)
    return plain, styled


def _samples(
    base: StableDiffusion,
    adapter: Adapter,
    config: RunConfig,
    records: Sequence[ImageRecord],
    plan: BucketPlan,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> dict[float, list[Tensor]]:
    """Samples of the captions, each in the size of its picture, for strengths 0 and 1."""
    groups: dict[Size, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        groups[plan.bucket_of(record.name)].append(number)
    found: dict[tuple[float, int], Tensor] = {}
    for size, numbers in groups.items():
        request = make_request(config.sample, base.info, (size.width, size.height))
        captions = [records[number].caption for number in numbers]
        pictures = generate(base, adapter, captions, [seed], [1.0], request.settings)
        by_strength = {strength: [p for p in pictures if p.strength == strength] for strength in (0.0, 1.0)}
        for strength, made in by_strength.items():
            found |= {(strength, n): to_pixels(p.image) for n, p in zip(numbers, made, strict=True)}
        if progress is not None:
            progress(len(found), 2 * len(records))
    return {strength: [found[strength, n] for n in range(len(records))] for strength in (0.0, 1.0)}


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
