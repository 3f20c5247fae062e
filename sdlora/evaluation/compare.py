"""Runs, steps, LoRA files and settings beside each other: one grid, tables and curves of their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdlora.data.records import spread
from sdlora.data.scan import read_dataset
from sdlora.errors import ConfigError, SdloraError, first_line
from sdlora.evaluation.choice import MAX_TRAINING, describe_few, why_unranked
from sdlora.evaluation.context import MAX_IMAGES, load_cropped
from sdlora.evaluation.features import DRAWING, Features, load_features
from sdlora.evaluation.scores import Accuracy, BootstrapWeights, Interval, Reference, content_kept, style_gain
from sdlora.report.plots import draw_loss_curves
from sdlora.report.summary import SPLITS, describe_limits, losses_of
from sdlora.sampling.generate import Column
from sdlora.sampling.grid import AXES, make_pages, varying_axes
from sdlora.sampling.images import SampledImage, write_png
from sdlora.sampling.session import (
    DENOISE,
    SamplePlan,
    SampleRequest,
    choose_device,
    choose_folder,
    plan_sample,
)
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
class ScoreRow:
    """Scores of a column of the grid; None where one could not be measured.

    Args:
        name: Name of the adapter.
        strength: Strength of the adapter.
        settings: The settings that differ, such as `guidance 7`.
        style: The way from the base (0) to real images of the run's set (1).
        content: How far it still shows what the base shows for the same prompt and seed: 1 as well, 0 not.
    """

    name: str
    strength: float
    settings: str
    style: Interval | None
    content: Interval | None

    @property
    def texts(self) -> dict[str, str]:
        """Each score with the digits that it bears."""
        scores = {"style": self.style, "content": self.content}
        return {name: score.percent if score else "-" for name, score in scores.items()}


@dataclass(frozen=True)
class Comparison:
    """What `compare` made: pages of the grid, the plot of the runs' losses, and tables."""

    folder: Path
    grids: Sequence[Path]
    curves: Path | None
    losses: Sequence[LossRow]
    notes: Sequence[str] = ()
    scores: Sequence[ScoreRow] = ()

    def lines(self) -> list[str]:
        """The tables, what limits them, and where the files are."""
        splits = [split for split in SPLITS if any(split in row.losses for row in self.losses)]
        rows = [["", "step", *(f"loss of {SPLITS[split]}" for split in splits)]] if splits else []
        for row in self.losses if splits else ():
            step = "" if row.step is None else str(row.step)
            rows.append([row.name, step, *(_loss_text(row, split) for split in splits)])
        lines = _align(rows)
        if self.scores:
            lines.append("scores    style: 0% the base, 100% real images; content: 100% as the base")
            cells = [
                [one.name, f"{one.strength:g}", one.settings, *one.texts.values()] for one in self.scores
            ]
            lines += _align([["", "strength", "", "style", "content"], *cells])
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"curves    {self.curves}"] if self.curves else []
        return [*lines, *(f"grid      {grid}" for grid in self.grids)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def _repr_png_(self) -> bytes:
        """The first page, which notebooks show."""
        return self.grids[0].read_bytes()


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table, without columns that are empty."""
    kept = [column for column in zip(*rows, strict=True) if any(column)]
    columns = [[cell.ljust(max(map(len, column))) for cell in column] for column in kept]
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]


def _loss_text(row: LossRow, split: str) -> str:
    if split not in row.losses:
        return "not measured"
    change = f" ({row.changes[split]:+.0%})" if split in row.changes else ""
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
    image: str | Path | None = None,
    denoise: float = DENOISE,
    scores: bool = False,
    features: str | None = None,
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
        steps: Sampling steps, one number or several, as for guidance and scheduler.
        scores: Measures how near each column is to the images of its run, and what it keeps of the base's
            content, over all prompts and seeds.
        features: A vision model to score by, as for `choose`; needed on any base but the built-in one.
        out: Output folder; by default `samples/compare-NAMES`.
    """
    settings = {"prompts": prompts, "seeds": seeds, "strengths": strengths}
    given = {"steps": steps, "guidance": guidance, "scheduler": scheduler}
    axes = {name: _as_list(value) for name, value in given.items() if value is not None}
    start = None if image is None else (image, denoise)
    request = SampleRequest(base, step, out, size, force, warn, settings, axes, start)
    plan = plan_comparison(sources, request)
    return draw_comparison(plan, progress, scores=scores or features is not None, features=features)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | range) else [value]


def plan_comparison(sources: Source | Sequence[Source], request: SampleRequest) -> SamplePlan:
    """Checks everything that `compare` needs, without loading the base."""
    plan = plan_sample(sources, request)
    if not plan.subjects:
        raise ConfigError("compare needs at least one run or LoRA; pass some", key="compare.empty")
    out = Path(request.out) if request.out else Path("samples") / f"compare-{plan.name}"
    if not (out / RECORD).is_file():
        out = choose_folder(request.out, f"compare-{plan.name}", plan.config.images)
    check_writable(out)
    return plan.checked(replace(request, out=out), resumes=True)


def draw_comparison(
    plan: SamplePlan,
    progress: Callable[[int, int], None] | None = None,
    *,
    scores: bool = False,
    features: str | None = None,
) -> Comparison:
    """Draws what is missing, and writes grids, curves and `compare.json`; arguments are as for `compare`."""
    assert plan.out is not None
    folder = Path(plan.out)
    scorer = load_features(features, choose_device()) if scores else None
    # From here on, the folder is continued.
    write_json(folder / RECORD, {"title": plan.title})
    drawn = with_bases(plan) if scorer else plan
    samples = drawn.draw(ImageStore(folder / IMAGES), progress)
    scored, missing = score_columns(drawn, samples, scorer) if scorer else ([], [])
    images = [one for n, one in enumerate(samples) if n % len(drawn.columns) < len(plan.columns)]
    # At several settings, a column has several scores, which only the table can show.
    shown = scored if len(plan.settings) == 1 else []
    has_names = any(column.adapter for column in plan.columns)
    labels = {(row.name if has_names else "", row.strength): [" ".join(one) for one in row.texts.items()]
              for row in shown}  # fmt: skip
    pages = make_pages(plan.in_rows(images), title=plan.title, targets=plan.targets, labels=labels)
    for old in folder.glob("grid*.png"):
        old.unlink()
    grids = [
        write_png(folder / f"grid{f'-{number}' if number > 1 else ''}.png", page, {"base": plan.info.name})
        for number, page in enumerate(pages, 1)
    ]
    parts = (part for subject in plan.subjects for part in subject.parts)
    runs = list({part.run.path: part.run for part in parts if part.run}.values())
    curves = draw_loss_curves(folder / "loss.png", runs) if runs else None
    rows = [row for subject in plan.subjects if (row := _loss_row(subject))]
    result = Comparison(folder, grids, curves, rows, [*describe_limits(runs), *missing], scored)
    values = {"title": plan.title, **result.to_json()}
    write_json(folder / RECORD, {**values, "folder": str(folder), "grids": [grid.name for grid in grids],
                                 "curves": curves.name if curves else None})  # fmt: skip
    return result


def with_bases(plan: SamplePlan) -> SamplePlan:
    """The plan with another column of the base for each other trigger, to measure adapters against."""
    triggers = {column.trigger for column in plan.columns if column.trigger} - {plan.trigger}
    if not any("{trigger}" in prompt for prompt in plan.prompts):
        return plan
    return replace(plan, columns=[*plan.columns, *(Column(trigger=one) for one in sorted(triggers))])


def score_columns(
    plan: SamplePlan, samples: Sequence[SampledImage], features: Features
) -> tuple[list[ScoreRow], list[str]]:
    """Scores of each column but the base's, at each setting; and lines about those that are missing."""
    is_validated = features.name != DRAWING or plan.info.is_builtin
    if missing := why_unranked(features.name, is_validated, len(set(plan.prompts))):
        return [], [f"no scores: {missing}"]
    axes, count = varying_axes(plan.settings), len(plan.columns)
    weights = BootstrapWeights.draw(len(plan.prompts), len(plan.config.sample.seeds))
    references, notes = _find_references(plan, features)
    rows = []
    for place, settings in enumerate(plan.settings):
        text = ", ".join(AXES[axis](getattr(settings, axis)) for axis in axes)
        drawn = [samples[place * count + n :: count * len(plan.settings)] for n in range(count)]
        images = [[sample.image for sample in own] for own in drawn]
        # What the base draws for a trigger is what its adapters change.
        bases = {
            column.trigger or plan.trigger: number
            for number, column in enumerate(plan.columns)
            if not column.stack
        }
        shown = {number: features.content(images[number]) for number in bases.values()}
        styles = {number: features.style(images[number]) for number in bases.values()}
        offsets = {
            (path, number): reference.offsets(images[number], styles[number])
            for path, reference in references.items()
            for number in bases.values()
        }
        for path, number in offsets if len(set(plan.prompts)) == len(plan.prompts) else ():
            known = references[path].rows, styles[number], shown[number]
            if problem := Accuracy.measure(*known, len(plan.prompts)).problem:
                notes.append(f"do not trust the scores of {path.name}: {features.name!r} {problem}")
        for column, own, made in zip(plan.columns, drawn, images, strict=True):
            number = bases.get(column.trigger or plan.trigger, 0)
            subject = next((one for one in plan.subjects if one.is_shown_in(column)), None)
            if subject is None:
                continue
            name, style = column.adapter or subject.name or plan.name, None
            if any(sample.blank for sample in (*drawn[number], *own)):
                notes.append(f"no scores of {name} at {column.strength:g}: an image is blank")
                continue
            kept = content_kept(features, shown[number], features.content(made), len(plan.prompts))
            if subject.run and (reference := references.get(subject.run.path)):
                before = offsets[subject.run.path, number]
                style = style_gain(weights, reference, before, reference.offsets(made)).interval
            rows.append(ScoreRow(name, column.strength, text, style, weights.mean(kept).interval))
    return rows, list(dict.fromkeys(notes))


def _find_references(plan: SamplePlan, features: Features) -> tuple[dict[Path, Reference], list[str]]:
    """Images of each run that style is measured against, as in `evaluate`; and why a subject has none."""
    found, notes, info = dict[Path, Reference](), list[str](), plan.info
    for subject in plan.subjects:
        if subject.run is None:
            reason = "a sum has no images of its own" if subject.is_sum else "only a run knows its images"
            notes.append(f"no style score of {subject.name or plan.name}: {reason}")
        elif subject.run.path not in found:
            config = subject.run.read_config()
            try:
                index, buckets = read_dataset(config, resolution=info.resolution, min_step=info.min_step)
                few = describe_few(len(index.heldout))
                chosen = spread(index.records, MAX_TRAINING) if few else index.heldout[:MAX_IMAGES]
                images = [load_cropped(record, config, buckets) for record in chosen]
            except SdloraError as error:
                notes.append(f"no style score of {subject.run.name}: {first_line(error)}")
                continue
            found[subject.run.path] = Reference(features, images, leave_one_out=bool(few))
            notes += [f"{subject.run.name}: {few}"] if few else []
    return found, notes


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
