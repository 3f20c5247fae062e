"""An adapter leaves the house: files for other programs, and the upload."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from sdlora.errors import AdapterError, first_line
from sdlora.formats.files import load_adapter, resolve_adapter, save_adapter
from sdlora.formats.keys import Dialect
from sdlora.formats.write import Precision, Rounding, round_adapter
from sdlora.lora.adapter import Adapter


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written."""

    path: Path
    dialect: Dialect
    rounding: Rounding
    size_bytes: int
    note: str = ""
    """What to know about the readers of the file."""

    @property
    def precision(self) -> Precision:
        """The precision of the file, which may be larger than asked (R-36)."""
        return self.rounding.used

    def __str__(self) -> str:
        rounding = self.rounding
        error = f"relative error {rounding.relative_error:.1e}, newly zero {rounding.newly_zero_share:.2%}"
        if rounding.used != rounding.asked:
            error = f"{rounding.asked} would lose too much ({error}), so it stays {rounding.used}"
        return f"{self.path} ({self.dialect}, {self.precision}, {self.size_bytes / 1e6:.2f} MB; {error})"

    def lines(self) -> list[str]:
        """For people."""
        return [f"wrote     {self}", *([f"note      {self.note}"] if self.note else [])]


def export_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    dialect: Dialect = "diffusers",
    precision: Precision = "fp16",
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Writes an adapter for other programs: scale folded, rounded where that loses nothing (R-02, R-36).

    Args:
        adapter: As trained, or as read from any file.
        path: The `.safetensors` file.
        dialect: `diffusers`, or `kohya` for A1111, Forge, ComfyUI and kohya's tools.
        precision: As asked; a file that would lose too much stays fp32.
        metadata: From `run_metadata`. Not given, the adapter's notes go on (a file that is converted
            keeps what it says, the run's own dates included).

    Raises:
        AdapterError: If the adapter is not finite or changes nothing (R-06), or the place is not writable.
    """
    rounded, rounding = round_adapter(adapter, precision)
    file = save_adapter(path, rounded, dialect=dialect, metadata=metadata)
    notes = {module.dialect_notes.get(dialect, "") for module in adapter.modules.values()}
    return ExportReport(file, dialect, rounding, file.stat().st_size, max(notes))


def export(
    source: str | Path, out: str | Path, *, dialect: Dialect = "diffusers", precision: Precision = "fp16"
) -> ExportReport:
    """Writes a run's adapter, or a LoRA file of any dialect, as another file; its metadata goes along.

    Args:
        source: A run folder or a LoRA file.
        out: The `.safetensors` file to write.

    Raises:
        AdapterError: If the source is not a LoRA, or the file cannot be written or is the source itself.
        RunError: If the run has no saved adapter yet.
    """
    file = resolve_adapter(source).file
    check_out(out, [file])
    return export_adapter(load_adapter(file), out, dialect=dialect, precision=precision)


def check_out(out: str | Path, sources: Iterable[Path]) -> None:
    """Refuses to write over one of the files that the new one is made of.

    Raises:
        AdapterError: If it is one of them, under whatever name.
    """
    place = Path(out)
    if place.exists() and any(file.exists() and place.samefile(file) for file in sources):
        raise AdapterError(f"--out {out} is the input file; use another name")


def push_run(source: str | Path, repo_id: str, *, api: Any = None) -> str:
    """Uploads a run's final files, model card and grid, or a single LoRA file.

    Args:
        source: A run folder, or a LoRA file; a README.md beside it goes along.
        repo_id: `owner/name`; made if it does not exist.
        api: A `huggingface_hub.HfApi`, or one like it.

    Returns:
        Where the files are.
    """
    found = resolve_adapter(source)
    file, run = found.file, found.run
    if run is None:
        load_adapter(file)
        card = file.with_name("README.md")
        return push_to_hub({path.name: path for path in (file, card) if path.is_file()}, repo_id, api=api)
    files = {file.name: file}
    for path in (run.final_adapter("kohya"), run.model_card):
        if path.is_file():
            files[path.name] = path
    grids = [*sorted(run.samples.glob("step-*/grid.png")), *run.adapters.glob("grid.png")]
    if grids:
        files["grid.png"] = grids[-1]
    return push_to_hub(files, repo_id, api=api)


def push_to_hub(files: Mapping[str, Path], repo_id: str, *, api: Any = None) -> str:
    """Uploads files to Hugging Face in one commit; the repository is made if it does not exist.

    Args:
        files: Name there to file here.
        repo_id: `owner/name`.
        api: A `huggingface_hub.HfApi`, or one like it.

    Returns:
        Where the files are.

    Raises:
        AdapterError: With exit code 1, if that fails: no network, no token, no right to write.
    """
    api = HfApi() if api is None else api
    try:
        url = str(api.create_repo(repo_id, exist_ok=True))
        with tempfile.TemporaryDirectory() as folder:
            for name, file in files.items():
                shutil.copyfile(file, Path(folder) / name)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add a style LoRA")
    except Exception as problem:
        error = AdapterError(
            f"upload to {repo_id} failed: {first_line(problem)}; check the network and the name, and log "
            "in with `hf auth login` (with a write token)"
        )
        error.exit_code = 1
        raise error from problem
    return url
