"""Runs, steps, LoRA files and settings beside each other: one grid, a table of losses, and their curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdlora.errors import ConfigError
from sdlora.report.plots import draw_loss_curves
from sdlora.report.summary import MIN_IMAGES, SPLITS, losses_of
from sdlora.runs import RunFolder
from sdlora.sampling.grid import make_pages
from sdlora.sampling.images import write_png
from sdlora.sampling.session import SamplePlan, SampleRequest, choose_folder, plan_sample
from sdlora.sampling.sources import Source, Step, Subject
from sdlora.sampling.store import ImageStore
from sdlora.writing import check_writable, write_json

RECORD, IMAGES = "compare.json", "images"


@dataclass(frozen=True)
class LossRow:
    """Validation losses of one saved step, by split, each with its change since the first step of the run."""

    name: str
    step: int | None
    losses: dict[str, float]
    changes: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """What `compare` made: pages of the grid, the plot of the runs' losses, and their table."""

    folder: Path
    grids: Sequence[Path]
    curves: Path | None
    losses: Sequence[LossRow]
    notes: Sequence[str] = ()

    def lines(self) -> list[str]:
        """The table, what limits it, and where the files are."""
        splits = [split for split in SPLITS if any(split in row.losses for row in self.losses)]
        rows = [["", "step", *(f"loss of {SPLITS[split]}" for split in splits)]] if splits else []
        for row in self.losses if splits else ():
            step = "" if row.step is None else str(row.step)
            rows.append([row.name, step, *(_loss_text(row, split) for split in splits)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"curves    {self.curves}"] if self.curves else []
        return [*lines, *(f"grid      {grid}" for grid in self.grids)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def _repr_png_(self) -> bytes:
        """The first page, which notebooks show."""
        return self.grids[0].read_bytes()


def _loss_text(row: LossRow, split: str) -> str:
    if split not in row.losses:
        return "not measured"
    change = f" ({row.changes[split]:+.1%})" if split in row.changes else ""
    return f"{row.losses[split]:.4f}{change}"


def compare(
    sources: Source | Sequence[Source],
    *,
    base: str | Path | None = None,
    step: Step | Sequence[Step] = None,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    strengths: Sequence[float] | None = None,
    steps: int | Sequence[int] | None = None,
    guidance: float | Sequence[float] | None = None,
    scheduler: str | Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    out: str | Path | None = None,
    force: bool = False,
    warn: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Draws runs, LoRA files, adapters or tree nodes beside each other, and lists and plots their losses.

    Everything that is given several times is an axis: the grid has a column for each source, saved step,
    strength and setting, and a row for each prompt and seed. An output folder that has a comparison is
    continued: images that it already has are not drawn again. The rest is as for `sample`.

    Args:
        sources: Runs, LoRA files, adapters, tree nodes, or sums such as `a.safetensors:0.6+b:0.4`.
        base: The base of all; by default the first run's, or the one that the first file names.
        step: Saved steps of the runs, such as `[50, 100, "final"]`.
        prompts: By default the first run's; `{trigger}` is replaced by the trigger of each.
        seeds: One row for each prompt and seed.
        strengths: One column each.
        steps: Sampling steps, one number or several.
        guidance: Guidance scales.
        scheduler: diffusers schedulers.
        size: Width and height in pixels.
        out: Output folder; by default `samples/compare-NAMES`.
        force: Accepts changed ancestors of a child, and ignores missing ones.
        warn: Called with a line if an adapter may not fit.
        progress: Called with (finished, total) images.

    Raises:
        SdloraError: If something does not exist or does not fit.
    """
    settings = {"prompts": prompts, "seeds": seeds, "strengths": strengths}
    given = {"steps": steps, "guidance": guidance, "scheduler": scheduler}
    axes = {name: _as_list(value) for name, value in given.items() if value is not None}
    request = SampleRequest(base, step, out, size, force, warn, settings, axes)
    return draw_comparison(plan_comparison(sources, request), progress)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | range) else [value]


def plan_comparison(sources: Source | Sequence[Source], request: SampleRequest) -> SamplePlan:
    """Checks everything that `compare` needs, without loading the base."""
    plan = plan_sample(sources, request)
    if not plan.subjects:
        raise ConfigError("compare needs at least one run or LoRA; pass some", key="compare.empty")
    out = Path(request.out) if request.out else Path("samples") / f"compare-{plan.name}"
    if not (out / RECORD).is_file():
        out = choose_folder(request.out, f"compare-{plan.name}")
    check_writable(out)
    return plan.checked(replace(request, out=out), resumes=True)


def draw_comparison(plan: SamplePlan, progress: Callable[[int, int], None] | None = None) -> Comparison:
    """Draws what is missing, and writes grids, curves and `compare.json`."""
    assert plan.out is not None
    folder = Path(plan.out)
    # From here on, the folder is continued.
    write_json(folder / RECORD, {"title": plan.title})
    images = plan.draw(ImageStore(folder / IMAGES), progress)
    pages = make_pages(plan.in_rows(images), title=plan.title, targets=plan.targets)
    for old in folder.glob("grid*.png"):
        old.unlink()
    grids = [
        write_png(folder / f"grid{f'-{number}' if number > 1 else ''}.png", page, {"base": plan.info.name})
        for number, page in enumerate(pages, 1)
    ]
    runs = _runs_of(plan.subjects)
    curves = draw_loss_curves(folder / "loss.png", runs) if runs else None
    rows = [row for subject in plan.subjects if (row := _loss_row(subject))]
    result = Comparison(folder, grids, curves, rows, describe_limits(runs))
    values = {"title": plan.title, **result.to_json()}
    write_json(folder / RECORD, {**values, "folder": str(folder), "grids": [grid.name for grid in grids],
                                 "curves": curves.name if curves else None})  # fmt: skip
    return result


def _runs_of(subjects: Sequence[Subject]) -> list[RunFolder]:
    found = {part.run.path: part.run for subject in subjects for part in subject.parts if part.run}
    return list(found.values())


def _loss_row(subject: Subject) -> LossRow | None:
    """The losses of a run's step, or the one in the metadata of a file."""
    part = subject.parts[0]
    if subject.is_sum:
        return None
    if part.run is None:
        try:
            return LossRow(
                subject.name, None, {"heldout": float(part.adapter.notes["sdlora.heldout_loss"])}, {}
            )
        except (KeyError, ValueError):
            return None
    step = part.run.step_of(part.file)
    losses, changes = {}, {}
    for split in SPLITS:
        measured = losses_of(part.run, split)
        if step in measured:
            losses[split], first = measured[step], measured[min(measured)]
            if step != min(measured) and first > 0:
                changes[split] = losses[split] / first - 1
    return LossRow(subject.name, step, losses, changes)


def describe_limits(runs: Sequence[RunFolder]) -> list[str]:
    """What the losses of these runs cannot show."""
    notes, plans = [], [next(run.events("plan"), {}) for run in runs]
    for key, what in (("dataset_digest", "images"), ("base_digest", "bases")):
        if len({plan.get(key) for plan in plans}) > 1:
            notes.append(f"these runs have different {what}: their losses cannot be compared")
    counts = [
        event.get("images", 0)
        for run in runs
        for event in run.events("heldout")
        if event["split"] == "heldout"
    ]
    if counts and min(counts) < MIN_IMAGES:
        notes.append(
            f"{min(counts)} held-out images are too few to rank runs by their loss; hold out {MIN_IMAGES}"
        )
    return notes
