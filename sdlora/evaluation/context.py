"""A run's held-out images and its base, ready to measure adapters on."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from sdlora.config import RunConfig
from sdlora.data.buckets import BucketPlan
from sdlora.data.images import crop_image, load_record
from sdlora.data.records import ImageRecord, Size
from sdlora.data.scan import read_dataset
from sdlora.data.tensors import crop_to_time_ids, image_to_tensor
from sdlora.diffusion.schedule import schedule_from_config
from sdlora.dtypes import DTYPES
from sdlora.errors import RunError
from sdlora.evaluation.heldout import HeldoutItem, HeldoutLoss, heldout_loss
from sdlora.formats.files import load_adapter
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import mounted
from sdlora.models.base import Base, Condition
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
from sdlora.runs import RunFolder
from sdlora.sampling.generate import Column, generate
from sdlora.sampling.images import SampleSettings, as_prompt
from sdlora.sampling.session import choose_device
from sdlora.sampling.store import ImageStore
from sdlora.tree.lineage import Stack, find_ancestors, path_to_stack

MAX_IMAGES = 40


@dataclass(frozen=True, eq=False)
class EvaluationContext:
    """A run's base (in the dtype of the training), final adapter with its ancestors, and held-out images."""

    run: RunFolder
    config: RunConfig
    base: Base
    adapter: Adapter
    ancestors: Stack
    records: Sequence[ImageRecord]
    plan: BucketPlan
    drawings: Sequence[Tensor]
    """The images, cropped, (3, H, W) in [-1, 1]."""
    latents: Sequence[Tensor]
    """Latents of the drawings, (C, h, w)."""
    training: Sequence[ImageRecord] = ()

    @property
    def style(self) -> Stack:
        """The adapter on top of its ancestors."""
        return (*self.ancestors, (self.adapter, 1.0))

    @property
    def captions(self) -> dict[int, str]:
        """The held-out captions as prompts, by the number of their image."""
        return {number: as_prompt(record.caption) for number, record in enumerate(self.records)}

    def loss(self, stack: Stack) -> HeldoutLoss:
        """The held-out loss with a stack mounted; with an empty one, that of the base."""
        schedule = schedule_from_config(self.base.info.scheduler_config)
        with mounted(self.base.components, stack):
            conditions = map(self._condition, self.records)
            keys = (record.digest for record in self.records)
            items = list(map(HeldoutItem, keys, self.latents, conditions))
            return heldout_loss(self.base.denoise, schedule, items, batch_size=8, device=self.base.device)

    def _condition(self, record: ImageRecord) -> Condition:
        condition = self.base.encode_captions([record.caption])[0].to("cpu")
        if not self.base.info.has_time_ids:
            return condition
        return condition.with_time_ids(crop_to_time_ids(record.size, self.plan.crops[record.name][0]))

    def samples(
        self,
        stacks: Sequence[Stack],
        captions: Mapping[int, str],
        seed: int,
        progress: Callable[[int], object] = lambda finished: None,
    ) -> list[list[Tensor]]:
        """Samples of captions, by the number of the image whose size they get, for each stack.

        `progress` gets the number of finished images.
        """
        groups: dict[Size, list[int]] = defaultdict(list)
        for number in captions:
            groups[self.plan.bucket_of(self.records[number].name)].append(number)
        columns = [Column(stack, 1.0 if stack else 0.0) for stack in stacks]
        found: list[dict[int, Tensor]] = [{} for _ in stacks]
        for size, numbers in groups.items():
            settings = SampleSettings.of(self.config.sample, (size.width, size.height))
            # A blank image would be measured, too.
            settings = replace(settings, safety_checker=False)
            prompts = [captions[number] for number in numbers]
            images = generate(
                self.base,
                columns,
                prompts,
                [seed],
                settings,
                store=ImageStore(self.run.evaluation_images),
                progress=lambda done, total: progress(sum(map(len, found)) + done),
            )
            for place, made in enumerate(found):
                own = images[place :: len(columns)]
                made |= {number: image_to_tensor(p.image) for number, p in zip(numbers, own, strict=True)}
        return [[made[number] for number in captions] for made in found]


def open_context(run: str | Path | RunFolder, *, needs_heldout: bool = True) -> EvaluationContext:
    """Loads a run's base, its final adapter with its ancestors, and its held-out images.

    Raises:
        RunError: If the run is read-only, or has no held-out images and needs them.
        AdapterError: If an ancestor is missing or changed.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    if not os.access(folder.path, os.W_OK):
        problem = f"run {folder.path} is read-only, but results are written into it; copy it elsewhere"
        raise RunError(problem, key="run.not-writable")
    config = folder.read_config()
    info = inspect_base(config.base, config.objective, config.data)
    index, plan = read_dataset(config, resolution=info.resolution, min_step=info.min_step)
    records = index.heldout[:MAX_IMAGES]
    if not records and needs_heldout:
        problem = (
            f"run {folder.path} has no held-out images; train with data.heldout=0.1 or a folder heldout/"
        )
        raise RunError(problem, key="data.heldout")
    adapter = load_adapter(folder.adapter)
    ancestors = path_to_stack(find_ancestors(folder.adapter, adapter))
    base = load_base(info, dtype=DTYPES[folder.base_dtype], device=choose_device())
    drawings = [image_to_tensor(load_cropped(record, config, plan)) for record in records]
    latents = [base.encode_images(drawing[None])[0][0].cpu() for drawing in drawings]
    found = (folder, config, base, adapter, ancestors, records, plan, drawings, latents)
    return EvaluationContext(*found, index.records)


def load_cropped(record: ImageRecord, config: RunConfig, plan: BucketPlan) -> Image.Image:
    """An image as it is trained on."""
    return crop_image(load_record(record, config.data.background), plan.crops[record.name][0])
