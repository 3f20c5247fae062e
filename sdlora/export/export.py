"""Export of adapters as files for other programs, and the upload."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from sdlora.errors import AdapterError, first_line
from sdlora.formats.container import read_tensors
from sdlora.formats.files import AnyAdapter, PathLike, load_adapter, resolve_adapter, save_adapter
from sdlora.formats.keys import Dialect
from sdlora.formats.write import LARGEST_ERROR, Precision, Rounding, fold, relative_error, round_adapter
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import plan_layout
from sdlora.runs import RunFolder


@dataclass(frozen=True, slots=True)
class ExportReport:
    path: Path
    dialect: Dialect
    rounding: Rounding
    size_bytes: int
    note: str = ""
    """A warning about programs that do not read the whole file."""

    @property
    def precision(self) -> Precision:
        """The precision of the file, which may be larger than asked."""
        return self.rounding.used

    def __str__(self) -> str:
        rounding = self.rounding
        error = f"relative error {rounding.relative_error:.1e}, newly zero {rounding.newly_zero_share:.2%}"
        if rounding.used != rounding.asked:
            error = f"{rounding.asked} would lose too much ({error}), so it stays {rounding.used}"
        return f"{self.path} ({self.dialect}, {self.precision}, {self.size_bytes / 1e6:.2f} MB; {error})"

    def lines(self) -> list[str]:
        return [f"wrote     {self}", *([f"note      {self.note}"] if self.note else [])]


def export_adapter(
    adapter: AnyAdapter,
    path: str | Path,
    *,
    dialect: Dialect = "diffusers",
    precision: Precision = "fp16",
    metadata: Mapping[str, str] | None = None,
    step: int | None = None,
) -> ExportReport:
    """Writes an adapter for other programs: scale folded, rounded where that loses nothing.

    Args:
        adapter: As trained, or as read from any file; or a run, a LoRA file or a tree node. A run's is
            rounded from the fp32 tensors of its checkpoint, if that is still there.
        path: The `.safetensors` file.
        dialect: `diffusers`, or `kohya` for A1111, Forge, ComfyUI and kohya's tools.
        precision: A file that would lose too much stays fp32.
        metadata: From `run_metadata`; by default the adapter's notes, so a converted file keeps its own.
        step: A saved step of a run; by default its final adapter.

    Raises:
        AdapterError: If the adapter is not finite or changes nothing, is not a LoRA or the output
            itself, or the file is not writable.
        RunError: If the run has no saved adapter yet.
    """
    if not isinstance(adapter, Adapter):
        adapter = _open(adapter, path, step)
    rounded, rounding = round_adapter(adapter, precision)
    file = save_adapter(path, rounded, dialect=dialect, metadata=metadata)
    notes = {module.dialect_notes.get(dialect, "") for module in adapter.modules.values()}
    return ExportReport(file, dialect, rounding, file.stat().st_size, max(notes))


def _open(source: PathLike, out: PathLike, step: int | None) -> Adapter:
    """The adapter of a file or a run; of a run as trained, in fp32."""
    file, run = resolve_adapter(source, step)
    check_out(out, [file])
    adapter = load_adapter(file)
    return adapter if run is None else _trained_adapter(run, file, adapter)


def _trained_adapter(run: RunFolder, file: Path, saved: Adapter) -> Adapter:
    """The adapter of a run's file in fp32, as trained; as saved where the checkpoint is gone or differs."""
    step = run.step_of(file)
    if step is None or not run.checkpoint_adapter(step).is_file():
        return saved
    tensors, _ = read_tensors(run.checkpoint_adapter(step))
    parts = {name: {part: f"{name}.{part}" for part in one.tensors()} for name, one in saved.modules.items()}
    if not all(key in tensors for keys in parts.values() for key in keys.values()):
        return saved
    modules = dict(saved.modules)
    for name, keys in parts.items():
        kind: Any = type(modules[name])
        modules[name] = kind(
            **{part: tensors.get(f"average.{key}", tensors[key]) for part, key in keys.items()}
        )
    scales = plan_layout(run.read_config().lora, list(modules)).scales()
    trained = fold(replace(saved, modules=modules, scales=scales))
    is_same = relative_error(trained, saved) <= LARGEST_ERROR["bf16"]
    return replace(trained, notes=saved.notes) if is_same else saved


def check_out(out: PathLike, sources: Iterable[Path]) -> None:
    """Raises an AdapterError if the output is one of the input files, under any name."""
    place = Path(out)
    if place.exists() and any(file.exists() and place.samefile(file) for file in sources):
        raise AdapterError(f"--out {out} is the input file; use another name", key="option--out")


def push_run(source: str | Path, repo_id: str, *, api: Any = None) -> str:
    """Uploads the final files, model card and newest grid of a run, or a LoRA file, to Hugging Face.

    The repository (`owner/name`) is made if it does not exist, and its address is returned. Raises an
    AdapterError with exit code 1 if that fails: no network, no token, no right to write.
    """
    file, run = resolve_adapter(source)
    if run is None:
        load_adapter(file)
        files = [file, file.with_name("README.md")]
    else:
        grids = [*sorted(run.samples.glob("step-*/grid.png")), *run.adapters.glob("grid.png")]
        files = [file, run.final_adapter("kohya"), run.model_card, *grids[-1:]]
    api = HfApi() if api is None else api
    try:
        url = str(api.create_repo(repo_id, exist_ok=True))
        with tempfile.TemporaryDirectory() as folder:
            for path in filter(Path.is_file, files):
                shutil.copyfile(path, Path(folder) / path.name)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add a style LoRA")
    except Exception as error:
        raise AdapterError(
            f"upload to {repo_id} failed: {first_line(error)}; check the network and the name, and log in "
            "with `hf auth login` (with a write token)",
            key="upload-failed",
            exit_code=1,
        ) from error
    return url
