"""From a plan to everything the loop needs: base, encodings, adapter, held-out images."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora.data.buckets import Crop
from sdlora.data.cache import CHECKED, add_note, read_notes
from sdlora.data.captions import without_trigger
from sdlora.data.records import ImageRecord
from sdlora.diffusion.objective import Objective
from sdlora.dtypes import Precision
from sdlora.errors import RunError
from sdlora.evaluation.heldout import HeldoutItem, recognise_prediction
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import mount
from sdlora.lora.layers import Dropout, lora_layers
from sdlora.memory.monitor import StageMonitor
from sdlora.models.attention import has_fast_products
from sdlora.models.base import Base, Condition, release_memory
from sdlora.models.load import load_base
from sdlora.report.terminal import Terminal
from sdlora.sampling.images import SampledImage
from sdlora.training.adapter import make_adapter
from sdlora.training.encodings import Encodings, View
from sdlora.training.plan import RunPlan
from sdlora.tree.lineage import Stack, path_to_stack

NUM_CHECKED = 2
CPU_KERNELS = "cpu_kernels"
BLOCKED_ATTENTION = "blocked_attention"
COMPILED = "compiled_blocks"
FUSED_LORA = "fused_lora"


class HeldoutView(NamedTuple):
    """An image of the held-out loss with its crop and the mean of its latents (C, H, W)."""

    record: ImageRecord
    crop: Crop
    latents: Tensor


@dataclass(frozen=True)
class Prepared:
    """Everything the loop needs."""

    base: Base  # the denoiser on the device with the adapter mounted; text encoders if trained
    adapter: Adapter
    objective: Objective
    encodings: Encodings
    splits: Mapping[str, list[HeldoutView]]  # of the held-out loss: `train`, and `heldout` if there are any
    prompt_states: Mapping[str, Condition]  # of the prompts; empty if training changes them
    dropout: Dropout
    max_norm: float
    parents: Stack = ()  # frozen adapters below the trained one: (adapter, strength), the root first
    fixed_images: dict[int, SampledImage] = field(default_factory=dict)  # by cell: without this adapter
    kernels: Sequence[str] = ()  # the faster ones that compute a step
    watch: StageMonitor = field(default_factory=StageMonitor)

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


def prepare(
    plan: RunPlan,
    accelerator: Accelerator,
    precision: Precision,
    terminal: Terminal,
    kernels: Sequence[str] | None = None,
    watch: StageMonitor | None = None,
) -> Prepared:
    """Loads the base, encodes, frees the encoders' memory, and mounts a fresh adapter.

    `kernels` are those of a run that is resumed; `watch` notes what encoding takes.
    """
    config, watch = plan.config, watch or StageMonitor(accelerator.device)
    text_learns, device = config.lora.text_encoder, accelerator.device
    lazy = config.data.cache is not False
    base = load_base(
        plan.info, dtype=precision.base_dtype, device=device, vae_dtype=precision.vae_dtype, lazy=lazy
    )
    parents = path_to_stack(plan.parents)
    encodings = Encodings(base, plan)
    # With adapters on text encoders, sampling encodes the prompts for each column.
    text_differs = text_learns or any(adapter.changes_text for adapter, _ in parents)
    if text_differs:
        base.text_encoders_to(device)
        mount(base.components, parents)
    if lazy:
        with watch.stage("encoding"):
            _encode(plan, encodings, accelerator, terminal, text_stays=text_differs)
    prompts = dict.fromkeys([*config.sample.prompts, config.sample.negative_prompt])
    prompt_states = {} if text_differs else {prompt: encodings.condition(prompt) for prompt in prompts}
    train, heldout = plan.validated
    splits = {
        split: [HeldoutView(*view, encodings.posterior(*view)[0]) for view in _first_views(plan, chosen)]
        for split, chosen in (("train", train), ("heldout", heldout))
        if chosen
    }
    base.load_denoiser()
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
        kernels=use_kernels(base, precision, terminal, compiles=config.train.compile, before=kernels),
        watch=watch,
    )


def use_kernels(
    base: Base, precision: Precision, terminal: Terminal, *, compiles: bool, before: Collection[str] | None
) -> tuple[str, ...]:
    """Switches on the faster kernels that suit the run, or those of the run that is resumed.

    Under autocast there are none but compiled blocks; those of a CPU are for bf16, blocked attention for one
    with AMX. Returns their names, for the checkpoints.

    Raises:
        RunError: If a kernel of the resumed run cannot be used here.
    """
    is_stored = precision.compute == precision.base
    used = []
    if is_stored and (before is None or CPU_KERNELS in before) and base.use_cpu_kernels():
        used.append(CPU_KERNELS)
        is_wanted = has_fast_products() if before is None else BLOCKED_ATTENTION in before
        if is_wanted and base.use_blocked_attention():
            used.append(BLOCKED_ATTENTION)
    if is_stored and (before is None or FUSED_LORA in before):
        for layer in lora_layers(base.components).values():
            layer.is_fused = True
        used.append(FUSED_LORA)
    if compiles if before is None else COMPILED in before:
        if problem := base.compile_blocks():
            if before is None:
                terminal.warn(f"train.compile = true has no effect: torch.compile fails here ({problem})")
        else:
            used.append(COMPILED)
    if missing := sorted(set(before or ()) - set(used)):
        raise RunError(
            f"the run computed with {', '.join(missing)}, which this device does not support; resume it on "
            "a device like the first, or choose again: --allow-changed compute",
            key="kernels",
        )
    return tuple(used)


def warn_if_prediction_differs(plan: RunPlan, prepared: Prepared) -> str | None:
    """A warning if the base's predictions fit another type than its own, which fails silently.

    That they fit is noted in the cache: the check takes as long as a step, and a base stays as it is.
    """
    schedule, base = prepared.objective.schedule, prepared.base
    if read_notes(CHECKED).get(plan.info.digest) == schedule.prediction_type:
        return None
    items = prepared.heldout_items("train", NUM_CHECKED)
    found = recognise_prediction(base.denoise, schedule, items, base.device)
    if found == schedule.prediction_type:
        add_note(CHECKED, plan.info.digest, found)
    if found in (None, schedule.prediction_type):
        return None
    return (
        f"objective.prediction_type = {schedule.prediction_type}, but the predictions of the base "
        f"{plan.info.name} fit {found}; to train with that, stop and set "
        f"objective.prediction_type={found} objective.force_prediction_type=true"
    )


def _encode(
    plan: RunPlan, encodings: Encodings, accelerator: Accelerator, terminal: Terminal, *, text_stays: bool
) -> None:
    """Fills the cache, each process a share."""
    records, sample, base = plan.index.records, plan.config.sample, encodings.base
    heldout = plan.index.heldout
    captions = [text for record in (*records, *heldout) for text in (record.caption, *record.variants)]
    captions += ["", *sample.prompts, sample.negative_prompt]
    if plan.config.objective.prior_weight:
        captions += [
            without_trigger(text, record.trigger)
            for record in records
            if record.trigger
            for text in record.captions
        ]
    views = [(record, crop) for record in records for crop in plan.buckets.crops[record.name]]
    # One at a time, to save memory: text encoders, then the VAE, then the denoiser.
    if not encodings.text_learns:
        encodings.prepare(captions, accelerator, terminal)
        base.text_encoders_to("cpu" if text_stays else "meta")
        release_memory()
    encodings.prepare([*views, *_first_views(plan, heldout)], accelerator, terminal)
    base.vae.to("meta")
    encodings.check_cache(terminal)


def _first_views(plan: RunPlan, records: Sequence[ImageRecord]) -> list[View]:
    return [(record, plan.buckets.crops[record.name][0]) for record in records]
