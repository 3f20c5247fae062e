"""Which saved step, at which strength: scores of every cell, the best one, and what is wrong with the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdlora.evaluation.heldout import HeldoutLoss
from sdlora.evaluation.scores import Accuracy, Interval, Score
from sdlora.report.summary import MIN_IMAGES

MIN_CONTENT, MANY_COPIES = 0.5, 0.25
# A user can raise the strength for more style, but cannot get a torn thing back.
CONTENT_WEIGHT = 2
MIN_PROMPTS, MAX_TRAINING = 4, 400


@dataclass(frozen=True)
class Cell:
    """A saved step at a strength.

    Args:
        step: A step, or "final".
        strength: Strength of the adapter.
        style: The way from the base (0) to real images of the set (1).
        content: How far it still shows what the base shows for the same prompt and seed: 1 as well, 0 not.
        diversity: Differences between images, over those between the base's.
        copies: Share of images that are copies of a training image; see `CopyCheck`.
        prompts_found: Share of images whose own prompt is the most like them of all; None if the features
            read no text.
        loss: Held-out loss; None without held-out images.
        loss_change: Its relative change from the base's; None below `MIN_IMAGES`.
    """

    step: int | str
    strength: float
    style: Score
    content: Score
    diversity: Score
    copies: float
    prompts_found: Score | None = None
    loss: HeldoutLoss | None = None
    loss_change: Interval | None = None

    @property
    def score(self) -> Score:
        """Style × content², by which cells are compared: no threshold that noise would decide about."""
        content = self.content
        weights = content.value**CONTENT_WEIGHT, content.draws**CONTENT_WEIGHT
        return Score(self.style.value * weights[0], self.style.draws * weights[1])

    @property
    def name(self) -> str:
        return f"{self.step if self.step == 'final' else f'step {self.step}'} at {self.strength:g}"

    def to_json(self) -> dict[str, Any]:
        scores = {name: asdict(getattr(self, name).interval) for name in ("style", "content", "diversity")}
        if self.prompts_found:
            scores["prompts_found"] = asdict(self.prompts_found.interval)
        loss = {"loss": self.loss.loss, "by_band": self.loss.by_band} if self.loss else {"loss": None}
        change = asdict(self.loss_change) if self.loss_change else None
        facts = {"step": self.step, "strength": self.strength, "copies": self.copies}
        return {**facts, **scores, **loss, "loss_change": change}


@dataclass(frozen=True)
class SpotChecks:
    """What only single cells are asked.

    Args:
        copies: Samples of training captions that are copies, and how many were drawn.
        name: The cell that they were drawn with, the strongest of the last step.
        bleed: Style gain of the best cell without the trigger; None without a trigger, or if prompts have
            nothing else.
    """

    copies: tuple[int, int]
    name: str
    bleed: Score | None = None


@dataclass(frozen=True)
class RunFacts:
    """What a verdict rests on, apart from the scores.

    Args:
        features: Name of the features.
        is_validated: Whether they are meant for this base and these images.
        accuracy: How often they are right on images whose style and content are known.
        training: Number of training images.
        heldout: Number of held-out images.
        captions: The training captions that differ.
        prompts: Number of prompts.
        learning_rate: That of the run, and the base's default.
    """

    features: str
    is_validated: bool
    accuracy: Accuracy
    training: int
    heldout: int
    captions: Sequence[str]
    prompts: int
    learning_rate: tuple[float, float]


@dataclass(frozen=True)
class Choice:
    """The cells of a run, and the recommended one."""

    cells: Sequence[Cell]
    facts: RunFacts
    spot_checks: SpotChecks | None = None
    curve: Path | None = None
    exported: Path | None = None

    @property
    def best(self) -> Cell | None:
        """The cell with the best score.

        None if it keeps too little content, is not clearly nearer to the style than the base, or something
        is missing to say so.
        """
        cell = top_cell(self.cells)
        is_good = cell.content.value >= MIN_CONTENT and cell.style.interval.low > 0
        return cell if is_good and not self.missing else None

    @property
    def missing(self) -> str:
        """What is missing for a recommendation; empty if nothing is."""
        facts = self.facts
        return why_unranked(facts.features, facts.is_validated, facts.prompts, facts.accuracy)

    @property
    def ties(self) -> list[Cell]:
        """Cells that keep enough content too, and whose score cannot be told from that of the best."""
        best = top_cell(self.cells)
        others = [cell for cell in self.cells if cell is not best and cell.content.value >= MIN_CONTENT]
        return [cell for cell in others if (best.score - cell.score).interval.low <= 0]

    @property
    def reason(self) -> str:
        """The recommendation in one sentence, or why there is none."""
        cell = top_cell(self.cells)
        if self.missing:
            return f"none: {self.missing}"
        if cell.content.value < MIN_CONTENT:
            most = max(self.cells, key=lambda one: one.content.value)
            return f"none: too much content is lost everywhere; {most.name} keeps most of it, {most.content}"
        if cell.style.interval.low <= 0:
            strength = max(one.strength for one in self.cells)
            styles = [one.style.value for one in self.cells if one.strength == strength]
            remedy = "train longer, or with a higher learning rate"
            if styles[-1] < styles[0]:
                remedy = "later steps are farther from it, so look at the samples beside real images"
            return (
                f"none: {cell.name}, the best by style and content, is not clearly nearer to the style than "
                f"the base; {remedy}"
            )
        text = (
            f"{cell.name} has the best of both, {cell.style} of the style and {cell.content} of the content"
        )
        ties = self.ties
        if not ties:
            return text
        names = ", ".join(tie.name for tie in sorted(ties, key=lambda tie: -tie.score.value)[:3])
        others = f"{names} and {len(ties) - 3} more" if len(ties) > 3 else names
        return f"{text}; {others} cannot be told apart from it, so compare them by eye"

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the run, the cause first."""
        return [text for text in (*self._about_images(), self._about_copies(), self._about_content()) if text]

    def _about_images(self) -> list[str]:
        facts, found = self.facts, []
        if facts.training < MIN_IMAGES:
            found.append(
                f"{facts.training} training images are too few to tell a style from what they show; "
                f"add more, at least {MIN_IMAGES}"
            )
        elif len(facts.captions) == 1:
            found.append(
                f"all {facts.training} captions are {facts.captions[0]!r:.60}, so what the images show is "
                "taught as part of the style; caption what each one shows"
            )
        return [*found, describe_few(facts.heldout)]

    def _about_copies(self) -> str:
        worst = max(self.cells, key=lambda cell: cell.copies)
        if worst.copies >= MANY_COPIES:
            return (
                f"{worst.copies:.0%} of the samples of {worst.name} are copies of training images; "
                "use an earlier step, or train on more images"
            )
        if self.spot_checks and self.spot_checks.copies[0] >= MANY_COPIES * self.spot_checks.copies[1]:
            copies, drawn = self.spot_checks.copies
            return (
                f"{copies} of {drawn} samples of training captions, {self.spot_checks.name}, are copies of "
                "training images; use an earlier step, or train on more images"
            )
        if self.facts.training > MAX_TRAINING:
            return f"copies were looked for among {MAX_TRAINING} of the {self.facts.training} training images"
        return ""

    def _about_content(self) -> str:
        weakest = min(cell.strength for cell in self.cells)
        broken = [cell for cell in self.cells if cell.content.interval.high < MIN_CONTENT]
        if not any(cell.strength == weakest for cell in broken):
            return ""
        first = next(cell for cell in self.cells if cell.strength == weakest)
        used, usual = self.facts.learning_rate
        remedy = "use an earlier step, or train for fewer train.steps"
        has_later = any(cell.step != first.step for cell in self.cells)
        if used >= 3 * usual or (first in broken and has_later):
            remedy = f"lower train.learning_rate ({used:g}; the base's default is {usual:g})"
        return (
            f"{broken[-1].name} keeps {broken[-1].content} of the content, and too much is lost even at "
            f"strength {weakest:g}; {remedy}"
        )

    def to_json(self) -> dict[str, Any]:
        spot_checks, best = self.spot_checks, self.best
        return {
            "step": best.step if best else None,
            "strength": best.strength if best else None,
            "reason": self.reason,
            "ties": [{"step": cell.step, "strength": cell.strength} for cell in self.ties] if best else [],
            "warnings": self.warnings,
            "features": self.facts.features,
            "features_right": asdict(self.facts.accuracy),
            "bleed": asdict(spot_checks.bleed.interval) if spot_checks and spot_checks.bleed else None,
            "copies_of_captions": list(spot_checks.copies) if spot_checks else None,
            "cells": [cell.to_json() for cell in self.cells],
        }

    def lines(self) -> list[str]:
        lines = [
            "scores            style: 0% the base, 100% real images; content and diversity: 100% as the base",
            "cell              style  content  diversity  copies  held-out loss",
        ]
        has_texts = self.cells[0].prompts_found is not None
        if has_texts:
            lines[1] += "  prompts found"
        for cell in self.cells:
            mark = "*" if cell is self.best else " "
            loss = f"{cell.loss.loss:.3g}" if cell.loss else "-"
            scores = f"{cell.style!s:>5}  {cell.content!s:>7}  {cell.diversity!s:>9}"
            found = f"{'':>{13 - len(loss)}}  {cell.prompts_found!s:>13}" if has_texts else ""
            lines.append(f"{mark} {cell.name:<14}  {scores}  {cell.copies:>6.0%}  {loss}{found}")
        if self.spot_checks and self.spot_checks.bleed:
            lines.append(f"without trigger   {self.spot_checks.bleed} of the way to the style")
        lines.append(f"features          {self.facts.features}, right for {self.facts.accuracy}")
        lines += [f"warning           {text}" for text in self.warnings]
        lines.append(f"recommended       {self.reason}")
        if self.curve:
            lines.append(f"curve             {self.curve}")
        return lines + ([f"wrote             {self.exported}"] if self.exported else [])


def top_cell(cells: Sequence[Cell]) -> Cell:
    """The cell with the best score; if none is above 0, the one that keeps most of the content."""
    return max(cells, key=lambda cell: (max(cell.score.value, 0), cell.content.value))


def why_unranked(features: str, is_validated: bool, prompts: int, accuracy: Accuracy | None = None) -> str:
    """What is missing to rank by scores; empty if nothing is. The arguments are as in `RunFacts`."""
    if not is_validated:
        return (
            f"the features {features!r} are for flat drawings on the built-in base; pass "
            "--features with a folder or Hub id of CLIP or DINOv2, or a file of CSD"
        )
    if prompts < MIN_PROMPTS:
        return f"{prompts} different prompts are too few; pass {MIN_PROMPTS} (--prompt)"
    if accuracy and accuracy.problem:
        return f"the features {features!r} {accuracy.problem}; pass others (--features)"
    return ""


def describe_few(heldout: int) -> str:
    """What style is measured against without enough held-out images; empty with enough."""
    if heldout >= MIN_IMAGES:
        return ""
    return (
        f"{heldout} held-out images are too few: style is measured against the training "
        f"images, leaving the nearest out; hold out {MIN_IMAGES} (data.heldout)"
    )
