"""The metadata of a LoRA file about its run, in the keys that other tools read.

`ss_*` is read by kohya's tools, A1111 and its forks and Civitai; `modelspec.*` by newer model managers;
`sdlora.*` is our own. Rank, alpha, names and hash of the tensors are added when a file is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sdlora.tree.lineage import Ancestor, lineage_to_notes

_OPTIONS = {
    "dropout": "ss_network_dropout",
    "max_norm": "ss_scale_weight_norms",
    "min_snr_gamma": "ss_min_snr_gamma",
    "debiased": "ss_debiased_estimation",
    "noise_offset": "ss_noise_offset",
    "pyramid_noise": "ss_multires_noise_iterations",
    "pyramid_discount": "ss_multires_noise_discount",
    "input_perturbation": "ss_ip_noise_gamma",
    "clip_skip": "ss_clip_skip",
}


@dataclass(frozen=True)
class TrainingMetadata:
    """A run in plain values; nothing private (no paths, and captions only with `export.include_captions`).

    `repeats` maps the repeats of an image in an epoch to the number of such images; `batch_size` is the
    global one, `learning_rate` that of the denoiser. `date` is the start of the run, ISO 8601. `base_hashes`
    are the old and the new form of kohya and the web UIs, which a folder does not have; `ancestors` has the
    root first; `options` are the settings of adapter and objective that differ from the defaults.
    """

    title: str
    base_name: str
    base_digest: str
    family: str
    kohya_version: str  # sd_v1, sd_v2, sd_v2_v, sdxl_base_v1-0
    kohya_v2: bool
    architecture: str  # as modelspec has it: stable-diffusion-v1
    prediction_type: str
    trigger: str | None
    rank: int
    alpha: float
    targets: Sequence[str]
    steps: int
    images_seen: int
    repeats: Mapping[int, int]  # without class images
    dataset_digest: str
    resolution: int
    batch_size: int
    learning_rate: float
    optimizer: str
    schedule: str
    precision: str
    seed: int
    date: str
    class_images: int = 0  # of an epoch; kohya's regularization images
    base_hashes: tuple[str, str] | None = None
    text_learning_rate: float | None = None
    ancestors: Sequence[Ancestor] = ()
    heldout_loss: float | None = None
    captions: Sequence[str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return sum(self.repeats.values())


def run_metadata(facts: TrainingMetadata) -> dict[str, str]:
    """The metadata of a file; safetensors requires text values."""
    started = datetime.fromisoformat(facts.date)
    # Without a zone the text would mean another moment on another machine.
    started = started if started.tzinfo else started.replace(tzinfo=UTC)
    old_hash, new_hash = facts.base_hashes or (None, None)
    texts: dict[str, object] = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{facts.architecture}/lora",
        "modelspec.title": facts.title,
        "modelspec.date": started.replace(microsecond=0).isoformat(),
        "modelspec.resolution": f"{facts.resolution}x{facts.resolution}",
        "modelspec.prediction_type": "v"
        if facts.prediction_type == "v_prediction"
        else facts.prediction_type,
        "modelspec.trigger_phrase": facts.trigger or None,
        "ss_output_name": facts.title,
        "ss_v2": facts.kohya_v2,
        "ss_base_model_version": facts.kohya_version,
        "ss_sd_model_name": facts.base_name,
        "ss_sd_model_hash": old_hash,
        "ss_new_sd_model_hash": new_hash,
        "ss_training_started_at": started.timestamp(),
        "ss_steps": facts.steps,
        "ss_max_train_steps": facts.steps,
        "ss_num_train_images": sum(repeats * count for repeats, count in facts.repeats.items()),
        "ss_num_reg_images": facts.class_images,
        "ss_total_batch_size": facts.batch_size,
        "ss_resolution": f"({facts.resolution}, {facts.resolution})",
        "ss_learning_rate": facts.learning_rate,
        "ss_unet_lr": facts.learning_rate,
        "ss_text_encoder_lr": facts.text_learning_rate,
        "ss_optimizer": facts.optimizer,
        "ss_lr_scheduler": facts.schedule,
        "ss_mixed_precision": facts.precision,
        "ss_seed": facts.seed,
        "ss_tag_frequency": json.dumps(_tag_frequency(facts), ensure_ascii=False),
        "ss_dataset_dirs": json.dumps(_folders(facts)),
        "sdlora.family": facts.family,
        "sdlora.base_name": facts.base_name,
        "sdlora.base_digest": facts.base_digest,
        "sdlora.prediction_type": facts.prediction_type,
        "sdlora.trained_rank": facts.rank,
        "sdlora.trained_alpha": f"{facts.alpha:g}",
        "sdlora.targets": json.dumps(list(facts.targets)),
        "sdlora.trigger": facts.trigger or None,
        "sdlora.steps": facts.steps,
        "sdlora.images_seen": facts.images_seen,
        "sdlora.resolution": facts.resolution,
        "sdlora.dataset_digest": facts.dataset_digest,
        "sdlora.heldout_loss": None if facts.heldout_loss is None else f"{facts.heldout_loss:.6g}",
        "sdlora.versions": json.dumps(dict(facts.versions), sort_keys=True),
        **lineage_to_notes(facts.ancestors),
    }
    if facts.captions is not None:
        texts["sdlora.captions"] = json.dumps(list(facts.captions), ensure_ascii=False)
    texts = {key: value for key, value in texts.items() if value is not None}
    texts |= {f"sdlora.{name}": json.dumps(value) for name, value in facts.options.items()}
    texts |= {key: facts.options[name] for name, key in _OPTIONS.items() if name in facts.options}
    return {key: str(value) for key, value in texts.items()}


def _folders(facts: TrainingMetadata) -> dict[str, dict[str, int]]:
    """kohya's list of `N_name` folders; their own names are private."""
    return {
        "images" if repeats == 1 else f"{repeats}_images": {"n_repeats": repeats, "img_count": count}
        for repeats, count in sorted(facts.repeats.items())
    }


def _tag_frequency(facts: TrainingMetadata) -> dict[str, dict[str, int]]:
    """The number of images with each tag; without consent to show captions, the trigger alone."""
    if facts.captions is None:
        return {"images": {facts.trigger: facts.num_images}} if facts.trigger else {}
    tags = (tag.strip() for caption in facts.captions for tag in caption.split(","))
    return {"images": dict(sorted(Counter(tag for tag in tags if tag).items()))}
