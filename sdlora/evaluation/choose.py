"""Measures the saved steps of a run at several strengths, and recommends one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from sdlora.data.captions import without_trigger
from sdlora.data.records import spread
from sdlora.evaluation.choice import (
    CONTENT_WEIGHT,
    MAX_TRAINING,
    Cell,
    Choice,
    RunFacts,
    SpotChecks,
    top_cell,
)
from sdlora.evaluation.context import EvaluationContext, load_cropped, open_context
from sdlora.evaluation.features import DRAWING, Features, load_features
from sdlora.evaluation.heldout import HeldoutLoss
from sdlora.evaluation.scores import (
    Accuracy,
    BootstrapWeights,
    CopyCheck,
    Reference,
    Score,
    content_kept,
    diversity,
    ratio_interval,
    style_gain,
)
from sdlora.evaluation.sweep import SampleGallery, Sweep, SweepPoint, plan_sweep
from sdlora.export.export import export_adapter
from sdlora.report.plots import draw_choice
from sdlora.report.summary import MIN_IMAGES
from sdlora.runs import RunFolder
from sdlora.sampling.session import choose_device

NUM_SPOT_CHECKS = 8
IMAGE_KEYS = ("step", "strength", "prompt", "seed", "file")


def choose(
    run: str | Path | RunFolder,
    *,
    steps: Sequence[int | str] = (),
    strengths: Sequence[float] = (),
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (),
    features: str | Features | None = None,
    export: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Choice:
    """Draws a run's saved steps at several strengths, scores them, and recommends one.

    Images are kept in the run, so that a second call draws only what is new. The scores are added to
    `evaluation.json`, and `evaluation.png` plots them.

    Args:
        run: The run folder.
        steps: Saved steps, or "final"; by default up to five, evenly spaced.
        strengths: By default the run's, if it has several; else 0.5, 0.8 and 1.
        prompts: By default the run's, and then captions, up to eight.
        seeds: By default 0 and 1.
        features: A folder or Hub id of CLIP or DINOv2, or a file of CSD, or what `load_features` made of
            it; by default `DrawingFeatures`.
        export: Writes the recommended adapter as `adapters/best.safetensors`, with its strength folded in.
        progress: Called with (finished, total) images.

    Raises:
        RunError: If a step was not saved.
        ConfigError: If a prompt or a strength cannot be used.
        ModelError: If the features cannot be loaded.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    features = load_features(features, choose_device())  # before what takes longer
    context = open_context(folder, needs_heldout=False)
    captions = [one.caption for one in (*context.records, *context.training)]
    sweep = plan_sweep(folder, captions, steps=steps, strengths=strengths, prompts=prompts, seeds=seeds)
    scoring = Scoring(context, sweep, features)
    gallery = SampleGallery(context, progress)
    choice = scoring.choose(gallery)
    title = f"{folder.name}: {choice.best.name}" if choice.best else folder.name
    best = choice.cells.index(choice.best) if choice.best else None
    cells = choice.to_json()["cells"]
    curve = draw_choice(folder.evaluation_curve, cells, best=best, weight=CONTENT_WEIGHT, title=title)
    choice = replace(choice, curve=curve)
    if export and choice.best:
        adapter = gallery.adapter(choice.best.step)
        notes = {**adapter.notes, "sdlora.recommended": choice.best.name}
        folded = replace(adapter, alpha=adapter.rank * choice.best.strength, notes=notes)
        report = export_adapter(folded, folder.best_adapter, precision=context.config.export.precision)
        choice = replace(choice, exported=report.path)
    images = [
        dict(zip(IMAGE_KEYS, (*(place or (None, 0.0)), *row, gallery.file(place, row)), strict=True))
        for place in (None, *sweep.cells)
        for row in sweep.rows
    ]
    folder.add_evaluation(choice={**choice.to_json(), "images": images})
    return choice


class Scoring:
    """Everything that the images of a run are compared with."""

    def __init__(self, context: EvaluationContext, sweep: Sweep, features: Features) -> None:
        self.context, self.sweep, self.features = context, sweep, features
        config, plan = context.config, context.plan
        training = [load_cropped(record, config, plan) for record in spread(context.training, MAX_TRAINING)]
        self.copies = CopyCheck(training)
        is_enough = len(context.records) >= MIN_IMAGES
        heldout = [load_cropped(record, config, plan) for record in context.records]
        self.reference = Reference(features, heldout if is_enough else training, leave_one_out=not is_enough)
        self.weights = BootstrapWeights.draw(len(sweep.prompts), len(sweep.seeds))

    def choose(self, gallery: SampleGallery) -> Choice:
        """Draws and scores all cells, and checks the best and the strongest of them more closely."""
        sweep = self.sweep
        cells = self.score(gallery.draw([None, *sweep.cells], sweep.rows))
        if self.context.records:
            before = self.context.loss(())
            cells = [self._with_loss(cell, gallery, before) for cell in cells]
        strongest = max(cells[-len(sweep.strengths) :], key=lambda cell: cell.strength)
        return Choice(cells, self._facts(), self._check_spots(gallery, top_cell(cells), strongest))

    def score(self, drawn: Mapping[SweepPoint, Sequence[Image.Image]]) -> list[Cell]:
        """The scores of all cells, by the images of each and of the base, in the order of the rows."""
        base, count = drawn[None], len(self.sweep.prompts)
        style, shown = self.features.style(base), self.features.content(base)
        offsets = self.reference.offsets(base, style)
        self.accuracy = Accuracy.measure(self.reference.rows, style, shown, count)
        cells = []
        for step, strength in self.sweep.cells:
            images = drawn[step, strength]
            content = self.features.content(images)
            cells.append(
                Cell(
                    step,
                    strength,
                    style_gain(self.weights, self.reference, offsets, self.reference.offsets(images)),
                    self.weights.mean(content_kept(self.features, shown, content, count)),
                    diversity(self.weights, shown, content),
                    float(self.copies.copied(images, base).mean()),
                    self._prompts_found(images),
                )
            )
        return cells

    def _prompts_found(self, images: Sequence[Image.Image]) -> Score | None:
        """The share of images whose own prompt is most like them (R-precision, as in arXiv 1711.10485)."""
        prompts, trigger = self.sweep.prompts, self.context.config.data.trigger
        # A vision model does not know the trigger.
        texts = [without_trigger(prompt, trigger) or prompt for prompt in prompts] if trigger else prompts
        likeness = self.features.likeness(images, texts)
        if likeness is None:
            return None
        own = np.repeat(np.arange(len(prompts)), len(self.sweep.seeds))
        # Prompts that differ by the trigger alone are one text.
        found = likeness[np.arange(len(own)), own] >= likeness.max(axis=1)
        return self.weights.mean(found.astype(np.float64))

    def _with_loss(self, cell: Cell, gallery: SampleGallery, before: HeldoutLoss) -> Cell:
        """The cell with its held-out loss, and the change from the base's."""
        own = self.context.loss((*self.context.ancestors, (gallery.adapter(cell.step), cell.strength)))
        changes = [after - first for first, after in zip(before.by_image, own.by_image, strict=True)]
        return replace(cell, loss=own, loss_change=ratio_interval(changes, before.by_image))

    def _facts(self) -> RunFacts:
        context, info = self.context, self.context.base.info
        is_model = self.features.name != DRAWING
        return RunFacts(
            features=self.features.name,
            is_validated=is_model or info.is_builtin,
            accuracy=self.accuracy,
            training=len(context.training),
            heldout=len(context.records),
            captions=sorted({caption for record in context.training for caption in record.captions}),
            prompts=len(set(self.sweep.prompts)),
            learning_rate=(context.config.train.learning_rate, info.defaults.learning_rate),
        )

    def _check_spots(self, gallery: SampleGallery, best: Cell, strongest: Cell) -> SpotChecks:
        """Draws the strongest cell of the last step for training captions, where copies are seen first, and
        the best one for the prompts without the trigger."""
        sweep, cell = self.sweep, (strongest.step, strongest.strength)
        captions = list(dict.fromkeys(record.caption for record in self.context.training if record.caption))
        rows = [(caption, seed) for caption in spread(captions, NUM_SPOT_CHECKS) for seed in sweep.seeds[:1]]
        drawn = gallery.draw([None, cell], rows)
        copied = self.copies.copied(drawn[cell], drawn[None])
        found = SpotChecks((int(copied.sum()), len(copied)), strongest.name)
        trigger = self.context.config.data.trigger
        bare = {prompt: without_trigger(prompt, trigger) for prompt in sweep.prompts} if trigger else {}
        asked = [text for prompt, text in bare.items() if text and text != prompt]
        if len(set(asked)) < 2:
            return found
        cell = (best.step, best.strength)
        rows = [(text, seed) for text in dict.fromkeys(asked) for seed in sweep.seeds]
        drawn = gallery.draw([None, cell], rows)
        weights = BootstrapWeights.draw(len(set(asked)), len(sweep.seeds))
        base, own = (self.reference.offsets(drawn[one]) for one in (None, cell))
        return replace(found, bleed=style_gain(weights, self.reference, base, own))
