"""From a plan to everything the loop needs: base, encodings, adapter, held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora.config import RunConfig
from sdlora.data.buckets import Crop
from sdlora.data.cache import TensorCache, cache_folder
from sdlora.data.records import ImageRecord
from sdlora.diffusion.objective import Objective
from sdlora.dtypes import Precision
from sdlora.evaluation.heldout import HeldoutItem, recognise_prediction
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import mount
from sdlora.lora.layers import Dropout
from sdlora.models.base import Base, Condition
from sdlora.models.load import load_base
from sdlora.report.terminal import Terminal
from sdlora.training.adapter import make_adapter, text_digest
from sdlora.training.encodings import Encodings
from sdlora.training.plan import RunPlan
from sdlora.training.preflight import spread_records
from sdlora.tree.lineage import Stack, path_to_stack

NUM_HELDOUT = 64
NUM_CHECKED = 2


class HeldoutView(NamedTuple):
    """An image of the held-out loss with its crop and the mean of its latents (C, H, W)."""

    record: ImageRecord
    crop: Crop
    latents: Tensor


@dataclass(frozen=True)
class Prepared:
    """Everything the loop needs.

    Args:
        base: The denoiser on the device with the adapter mounted, and the text encoders where they learn.
        adapter: The trainable adapter.
        objective: The loss's settings.
        encodings: Latents and text states.
        splits: Images of the held-out loss: `train`, and `heldout` if there are any.
        prompt_states: Text states of the prompts and the negative prompt; empty if training changes them.
        dropout: Of the adapter.
        max_norm: `lora.max_norm`.
        parents: Frozen adapters below the trained one: (adapter, strength), the root first.
    """

    base: Base
    adapter: Adapter
    objective: Objective
    encodings: Encodings
    splits: Mapping[str, list[HeldoutView]]
    prompt_states: Mapping[str, Condition]
    dropout: Dropout
    max_norm: float
    parents: Stack = ()

    @torch.no_grad()
    def heldout_items(self, split: str, most: int | None = None) -> list[HeldoutItem]:
        """Up to `most` images of a split with their current text states."""
        return [
            HeldoutItem(
                view.record.digest,
                view.latents,
                self.encodings.conditions([view.record.caption], [(view.record, view.crop)])[0].to("cpu"),
            )
            for view in self.splits[split][:most]
        ]


def prepare(plan: RunPlan, accelerator: Accelerator, precision: Precision, terminal: Terminal) -> Prepared:
    """Loads the base, encodes, moves the encoders off the device, and mounts a fresh adapter."""
    config = plan.config
    text_learns = config.lora.text_encoder
    device, waits = accelerator.device, config.data.cache is not False
    base = load_base(plan.info, dtype=precision.base_dtype, device=device, waits=waits)
    parents = path_to_stack(plan.parents)
    encodings = Encodings(
        base,
        _open_cache(config),
        config.data,
        text_learns=text_learns,
        text_digest=text_digest(plan.info, plan.parents),
    )
    heldout = spread_records(plan.index.heldout, NUM_HELDOUT)
    train = spread_records(
        plan.index.records, len(heldout) or min(NUM_HELDOUT, max(2, plan.num_images // 10))
    )
    _encode(plan, encodings, accelerator, terminal)
    prompts = dict.fromkeys([*config.sample.prompts, config.sample.negative_prompt])
    # With trained text encoders, sampling encodes the prompts for each column.
    text_differs = text_learns or any(adapter.changes_text for adapter, _ in parents)
    prompt_states = {} if text_differs else {prompt: encodings.condition(prompt) for prompt in prompts}
    splits = {
        split: [_heldout_view(plan, encodings, record) for record in records]
        for split, records in (("train", train), ("heldout", heldout))
        if records
    }
    base.denoiser.to(device)
    if config.train.gradient_checkpointing:
        base.enable_gradient_checkpointing(text=text_learns)
    adapter, started = make_adapter(config, plan.info, base.components, plan.layout)
    if started:
        terminal.print(f"start     {config.lora.init_from}: {started}")
    dropout = Dropout(config.lora.dropout)
    mount(base.components, [*parents, (adapter, 1.0)], dropout)
    return Prepared(
        base=base,
        adapter=adapter,
        objective=plan.objective,
        encodings=encodings,
        splits=splits,
        prompt_states=prompt_states,
        dropout=dropout,
        max_norm=config.lora.max_norm,
        parents=parents,
    )


def warn_if_prediction_differs(plan: RunPlan, prepared: Prepared) -> str | None:
    """Compares the base's predictions with its prediction type: a wrong one fails silently (R-32).

    Returns:
        A warning if they fit another type.
    """
    schedule, base = prepared.objective.schedule, prepared.base
    items = prepared.heldout_items("train", NUM_CHECKED)
    found = recognise_prediction(base.denoise, schedule, items, base.device)
    if found is None or found == schedule.prediction_type:
        return None
    return (
        f"objective.prediction_type = {schedule.prediction_type}, but the predictions of the base "
        f"{plan.info.name} fit {found}; to train with that, stop and set "
        f"objective.prediction_type={found} objective.force_prediction_type=true"
    )


def _open_cache(config: RunConfig) -> TensorCache | None:
    return None if config.data.cache is False else TensorCache(cache_folder())


def _encode(plan: RunPlan, encodings: Encodings, accelerator: Accelerator, terminal: Terminal) -> None:
    """Fills the cache, each process a share."""
    config = plan.config
    views = [
        (record, crop)
        for record in plan.index.records
        for crop in dict.fromkeys(plan.buckets.crops[record.name])
    ]
    views += [
        (record, plan.buckets.crops[record.name][0]) for record in (*plan.index.heldout, *plan.index.records)
    ]
    records = (*plan.index.records, *plan.index.heldout)
    captions = [caption for record in records for caption in (record.caption, *record.variants)]
    captions += ["", *config.sample.prompts, config.sample.negative_prompt]
    base, device = encodings.base, accelerator.device
    base.text_encoders_to(device)
    mount(base.components, path_to_stack(plan.parents))
    if encodings.cache is None:
        return
    # One at a time, to save memory: text encoders, then the VAE, then the denoiser.
    encodings.prepare((), captions, accelerator, terminal)
    if not encodings.text_learns:
        base.text_encoders_to("cpu")
    base.vae.to(device)
    encodings.prepare(dict.fromkeys(views), (), accelerator, terminal)
    base.vae.to("cpu")
    encodings.check_cache(terminal)


def _heldout_view(plan: RunPlan, encodings: Encodings, record: ImageRecord) -> HeldoutView:
    crop = plan.buckets.crops[record.name][0]
    mean, _ = encodings.posterior(record, crop)
    return HeldoutView(record, crop, mean)
