"""Checkpoints of a run (adapter, optimizer, counters), and the facts that its files carry."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.config import RunConfig
from sdlora.errors import RunError
from sdlora.export.metadata import TrainingMetadata
from sdlora.models.components import kohya_hashes
from sdlora.reading import UnfitFileError, read_header, read_json
from sdlora.report.summary import losses_of
from sdlora.report.terminal import Terminal
from sdlora.runs import RunFolder
from sdlora.training.device import package_versions
from sdlora.training.health import Counters
from sdlora.training.plan import RunPlan
from sdlora.training.resume import digest_json, run_fingerprint
from sdlora.training.step import StepRunner
from sdlora.writing import sync_folder, temporary_name

ADAPTER_FILE = "adapter.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MAX_STATE_BYTES = 2**28
EMA_PREFIX = "average."


def save_state(run: RunFolder, plan: RunPlan, runner: StepRunner, counters: Counters) -> None:
    """Writes the checkpoint of a step, then deletes the oldest ones.

    An OSError, such as a full disk, leaves nothing behind and no older checkpoint deleted.
    """
    scaler, ema = runner.accelerator.scaler, runner.ema
    averages = {EMA_PREFIX + name: value for name, value in ema.values.items()} if ema else {}
    save_checkpoint(
        run.checkpoint(counters.step),
        tensors={**runner.adapter.named_tensors(), **averages},
        optimizer=runner.optimizer.state_dict(),
        state={
            "counters": asdict(counters),
            "num_averaged": ema.num_updates if ema else 0,
            "scaler": scaler.state_dict() if scaler else None,
            "identity": {
                **run_fingerprint(plan, runner.precision),
                "kernels": list(runner.prepared.kernels),
            },
            "versions": dict(package_versions()),
        },
    )
    run.remove_checkpoints(keep=plan.config.train.keep_checkpoints)


def newest_complete_step(run: RunFolder, terminal: Terminal) -> int:
    """The step of the newest checkpoint that can be read; 0 if there is none."""
    for step in reversed(run.checkpoint_steps()):
        try:
            read_checkpoint(run.checkpoint(step))
        except RunError as error:
            terminal.warn(f"{error}; trying the one before")
            continue
        return step
    return 0


def load_state(run: RunFolder, step: int, runner: StepRunner) -> Counters:
    """Restores adapter, optimizer and EMA from the checkpoint of a step; returns the counters.

    Raises a RunError if the checkpoint belongs to another adapter, another optimizer or another program.
    """
    folder = run.checkpoint(step)
    tensors, optimizer, state = read_checkpoint(folder)
    try:
        _restore(runner, tensors, optimizer, state)
        return Counters.restore(state["counters"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise RunError(
            f"checkpoint {folder} does not fit the run ({type(error).__name__}: {error}); move it away to "
            "resume from the one before",
            key="checkpoint-mismatch",
        ) from None


def _restore(
    runner: StepRunner, tensors: dict[str, Tensor], optimizer: dict[str, Any], state: dict[str, Any]
) -> None:
    own = runner.adapter.named_tensors()
    averages = {
        name.removeprefix(EMA_PREFIX): tensors.pop(name) for name in [*tensors] if name.startswith(EMA_PREFIX)
    }
    if set(own) != set(tensors):
        problem = "the checkpoint adapts other modules than lora.targets; start a new run"
        raise RunError(problem, key="lora.targets")
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
        tensor.data.copy_(tensors[name])
    if runner.ema is not None:
        runner.ema.restore(averages, state["num_averaged"])
    try:
        runner.optimizer.load_state_dict(optimizer)
    except (ValueError, KeyError) as error:
        problem = f"the checkpoint does not fit train.optimizer: {error}"
        raise RunError(problem, key="train.optimizer") from None
    if runner.accelerator.scaler and state["scaler"]:
        runner.accelerator.scaler.load_state_dict(state["scaler"])


def save_checkpoint(
    folder: Path, *, tensors: Mapping[str, Tensor], optimizer: Mapping[str, Any], state: Mapping[str, Any]
) -> None:
    """Writes a checkpoint as a whole: into a temporary folder, read back, then renamed.

    An OSError, such as a full disk, leaves nothing behind.

    Args:
        folder: Of the checkpoint.
        tensors: The trained values, fp32.
        optimizer: A torch optimizer's `state_dict()`.
        state: Counters; JSON values.
    """
    temporary = temporary_name(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        values: dict[str, Tensor] = {}
        numbers = _split_tensors(optimizer, "", values)
        _save(tensors, temporary / ADAPTER_FILE)
        _save(values, temporary / OPTIMIZER_FILE)
        digests = {name: _digest_file(temporary / name) for name in (ADAPTER_FILE, OPTIMIZER_FILE)}
        text = seal_state({**state, "optimizer": numbers, "digests": digests})
        (temporary / STATE_FILE).write_text(text, encoding="utf-8")
        for file in temporary.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        read_checkpoint(temporary)
        if folder.exists():
            # It is damaged: the run was resumed from an earlier step and has reached this one again.
            shutil.rmtree(folder)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint: trained values, the optimizer's `state_dict()`, counters.

    Raises a RunError if it is incomplete or differs from what was saved.
    """
    state = read_state(folder)
    try:
        digests, numbers = state.pop("digests"), state.pop("optimizer")
        tensors, values = (
            _read_tensors(folder / name, digests[name]) for name in (ADAPTER_FILE, OPTIMIZER_FILE)
        )
        return tensors, _join_tensors(numbers, values), state
    except (OSError, UnfitFileError) as error:
        raise RunError(f"checkpoint {folder} is incomplete: {error}", key="checkpoint-incomplete") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"checkpoint {folder} was written by another program ({type(error).__name__})"
        raise RunError(problem, key="checkpoint-foreign") from None


def _read_tensors(file: Path, digest: str) -> dict[str, Tensor]:
    try:
        read_header(file)
        if _digest_file(file) != digest:
            raise UnfitFileError("differs from what was saved")
        return load_file(file)
    except (UnfitFileError, SafetensorError) as error:
        raise UnfitFileError(f"{file.name} {error}") from None


def read_state(folder: Path) -> dict[str, Any]:
    """Reads the counters and the fingerprint alone; raises a RunError as `read_checkpoint` does."""
    try:
        outer = read_json(folder / STATE_FILE, MAX_STATE_BYTES)
        if not isinstance(outer, dict) or outer.get("digest") != digest_json(outer.get("state")):
            raise UnfitFileError("differs from what was saved")
    except (OSError, UnfitFileError, RecursionError) as error:
        problem = f"checkpoint {folder} is incomplete: {STATE_FILE} {error}"
        raise RunError(problem, key="checkpoint-incomplete") from None
    return dict(outer["state"])


def seal_state(state: Mapping[str, Any]) -> str:
    """JSON of a state with its own digest."""
    return json.dumps({"digest": digest_json(state), "state": state}, indent=1)


def _digest_file(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    # Some optimizers keep one table in the state of every parameter; safetensors refuses shared memory.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(own, file)
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from None


def _split_tensors(value: Any, path: str, found: dict[str, Tensor]) -> Any:
    """Moves each tensor of a nested value into `found`, and leaves a reference to its name."""
    if isinstance(value, Tensor):
        found[path] = value
        return {"__tensor__": path}
    if isinstance(value, Mapping):
        prefix = f"{path}." if path else ""
        return {
            "__map__": [[key, _split_tensors(item, f"{prefix}{key}", found)] for key, item in value.items()]
        }
    if isinstance(value, list | tuple):
        return [_split_tensors(item, f"{path}.{number}", found) for number, item in enumerate(value)]
    return value


def _join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join_tensors(item, tensors) for item in value]
    if isinstance(value, dict) and "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if isinstance(value, dict) and "__map__" in value:
        return {key: _join_tensors(item, tensors) for key, item in value["__map__"]}
    return value


def training_metadata(run: RunFolder, plan: RunPlan, counters: Counters) -> TrainingMetadata:
    """The metadata of a file saved at a step; nothing private unless `export.include_captions` allows it."""
    config, info = plan.config, plan.info
    environment = run.read_environment()
    started = next((event["time"] for event in run.events("plan")), 0.0)
    styled, classes = plan.index.styled, [record for record in plan.index.records if record.is_class]
    captions = [record.caption for record in styled] if config.export.include_captions else None
    return TrainingMetadata(
        title=plan.config.export.name or run.name,
        base_name=info.name,
        base_digest=info.digest,
        family=info.family,
        kohya_version=info.traits.kohya_version,
        kohya_v2=info.traits.kohya_v2,
        architecture=info.traits.architecture,
        prediction_type=config.objective.prediction_type or info.prediction_type,
        trigger=config.data.trigger,
        rank=config.lora.rank,
        alpha=config.lora.trained_alpha,
        targets=config.lora.targets,
        steps=counters.step,
        images_seen=counters.images_seen,
        repeats=Counter(record.repeats for record in styled),
        class_images=sum(record.repeats for record in classes),
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
        heldout_loss=losses_of(run, "heldout").get(counters.step),
        captions=captions,
        options=_options(config),
        versions=dict(environment.get("versions") or {}),
    )


def _base_hashes(path: Path) -> tuple[str, str] | None:
    """kohya's hashes of a base in one file; None if that is gone by now: a save must not fail for it."""
    try:
        return kohya_hashes(path) if path.is_file() else None
    except OSError:
        return None


def _options(config: RunConfig) -> dict[str, Any]:
    """Settings of adapter, text and objective that differ from the defaults and have no own field."""
    elsewhere = {"rank", "alpha", "targets", "init_from", "parent", "force_parent"}
    lora = config.lora.model_dump(exclude_defaults=True, exclude=elsewhere)
    text = config.data.model_dump(
        exclude_defaults=True, include={"clip_skip", "prompt_chunks", "prompt_weights"}
    )
    return lora | text | config.objective.model_dump(exclude_defaults=True, exclude={"prediction_type"})
