"""What the files of a run say about it."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdlora.config import RunConfig
from sdlora.export.metadata import TrainingMetadata
from sdlora.models.weights import kohya_hashes
from sdlora.report.summary import losses_of
from sdlora.runs import RunFolder
from sdlora.training.plan import RunPlan


def training_metadata(run: RunFolder, plan: RunPlan, *, step: int, images_seen: int) -> TrainingMetadata:
    """The run in plain values, at a step; nothing private unless `export.include_captions` allows it."""
    config, info = plan.config, plan.info
    environment = run.read_environment()
    started = next((event["time"] for event in run.events("plan")), 0.0)
    captions = [record.caption for record in plan.index.records] if config.export.include_captions else None
    return TrainingMetadata(
        title=run.name,
        base_name=info.name,
        base_digest=info.digest,
        family=info.family,
        kohya_version=info.traits.kohya_version,
        kohya_v2=info.traits.kohya_v2,
        architecture=info.traits.architecture,
        prediction_type=plan.config.objective.prediction_type or info.prediction_type,
        trigger=config.data.trigger,
        rank=config.lora.rank,
        alpha=config.lora.trained_alpha,
        targets=config.lora.targets,
        steps=step,
        images_seen=images_seen,
        repeats=Counter(record.repeats for record in plan.index.records),
        dataset_digest=plan.index.digest,
        resolution=config.data.resolution or info.resolution,
        batch_size=plan.global_batch,
        learning_rate=config.train.learning_rate,
        optimizer=config.train.optimizer,
        schedule=config.train.schedule,
        precision=str(environment.get("compute_dtype")),
        seed=config.train.seed,
        date=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        base_hashes=_base_hashes(info.path),
        text_learning_rate=config.train.text_encoder_rate if config.lora.text_encoder else None,
        ancestors=[parent.ancestor for parent in plan.parents],
        heldout_loss=_heldout_loss(run, step),
        captions=captions,
        options=_options(config),
        versions=dict(environment.get("versions") or {}),
    )


def _base_hashes(path: Path) -> tuple[str, str] | None:
    """Of a base in one file; none where it is out of reach by now, since a save must not fail for it."""
    try:
        return kohya_hashes(path) if path.is_file() else None
    except OSError:
        return None


def _heldout_loss(run: RunFolder, step: int) -> float | None:
    """As measured at this step, if it was."""
    return losses_of(run, "heldout").get(step)


def _options(config: RunConfig) -> dict[str, Any]:
    """What differs from the defaults in adapter and objective, beside what has a place of its own."""
    elsewhere = {"rank", "alpha", "targets", "init_from", "parent", "force_parent"}
    lora = config.lora.model_dump(exclude_defaults=True, exclude=elsewhere)
    return lora | config.objective.model_dump(exclude_defaults=True, exclude={"prediction_type"})
