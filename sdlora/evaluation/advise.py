"""The rank that a run needs: its adapter is measured at smaller ranks, without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from PIL import Image
from torch import Tensor

from sdlora.dtypes import DTYPES
from sdlora.errors import ConfigError, RunError
from sdlora.evaluation.context import EvaluationContext, load_cropped, open_context
from sdlora.evaluation.evaluate import image_distances, mean_distance
from sdlora.evaluation.features import DRAWING, Features, load_features
from sdlora.evaluation.heldout import HeldoutLoss
from sdlora.evaluation.scores import BootstrapWeights, Interval, Reference, Score, ratio_interval, style_gain
from sdlora.export.export import export_adapter
from sdlora.lora.adapter import Adapter
from sdlora.rank.resize import resize
from sdlora.rank.spectrum import spectrum
from sdlora.report.plots import draw_rank_curve
from sdlora.report.summary import MIN_IMAGES
from sdlora.runs import RunFolder
from sdlora.sampling.session import choose_device
from sdlora.writing import write_json

MAX_SAMPLES = 8
# Of the way from the base to the style; less does not meet the eye.
VISIBLE_STYLE = 0.02


@dataclass(frozen=True)
class Candidate:
    """The adapter at one rank.

    Args:
        rank: The largest rank of a module.
        megabytes: Size of the file without its header.
        energy: Share of the energy of the whole adapter.
        loss: Held-out loss.
        kept: Share of what was learned: of the decrease of the loss by the whole adapter.
        distance: Distance of its samples from those of the whole adapter, over that of samples without it.
        interval: `kept` with its interval over images; None for fewer than `MIN_IMAGES`.
        style_lost: Style gain of the whole adapter's samples less that of its own; None without features that
            are known to be right for the base.
    """

    rank: int
    megabytes: float
    energy: float
    loss: float
    kept: float
    distance: float
    interval: Interval | None = None
    style_lost: Interval | None = None

    def keeps(self, share: float) -> bool:
        """Whether the whole interval lies above a share, and no style is clearly lost."""
        return self.interval is not None and self.interval.low >= share and not self.is_plainer

    @property
    def is_plainer(self) -> bool:
        """Whether its samples have clearly and visibly less of the style."""
        return self.style_lost is not None and self.style_lost.low > VISIBLE_STYLE


@dataclass(frozen=True)
class Advice:
    """The candidates, and the smallest rank that surely keeps enough.

    Args:
        candidates: From the smallest rank to that of the run.
        loss_without: Held-out loss without the adapter, with its parents alone.
        keep: The share that is enough.
        rank: The recommended rank; None for fewer than `MIN_IMAGES` held-out images.
        images: Number of held-out images.
        files: Files of the recommended rank; none if it is that of the run.
        curve: Plot of the candidates.
    """

    candidates: list[Candidate]
    loss_without: float
    keep: float
    rank: int | None
    images: int
    files: tuple[Path, ...]
    curve: Path

    def lines(self) -> list[str]:
        lines = [f"validation loss on {self.images} images, {self.loss_without:.3g} without the adapter"]
        lines += [
            f"rank {one.rank:>4}  {one.megabytes:>7.2f} MB  energy {one.energy:>4.0%}  loss {one.loss:.3g}  "
            f"keeps {one.interval or format(one.kept, '.0%')}  images {one.distance:.0%} away"
            + (", with less style" if one.is_plainer else "")
            for one in self.candidates
        ]
        lines.append(f"advice    {self._advice()}")
        return [*lines, f"curve     {self.curve}", *(f"wrote     {file}" for file in self.files)]

    def _advice(self) -> str:
        whole = self.candidates[-1]
        if self.rank is None:
            return f"none: {self.images} held-out images are too few; hold out {MIN_IMAGES} (data.heldout)"
        smaller = [one for one in self.candidates if one.rank < self.rank and not one.is_plainer]
        maybe = [str(one.rank) for one in smaller if one.interval and one.interval.high >= self.keep]
        also = f"; rank {' or '.join(maybe)} may be enough too, but its interval is too wide" if maybe else ""
        if self.rank == whole.rank:
            lost = f"surely keeps {self.keep:.0%} of what it learned, and its style"
            return f"keep rank {whole.rank}: no smaller one {lost}{also}"
        best = next(one for one in self.candidates if one.rank == self.rank)
        by = "by the loss alone; pass --features to weigh samples too"
        if best.style_lost:
            by = f"and the style of {MAX_SAMPLES} samples cannot be told from its own"
        return (
            f"rank {best.rank} keeps {self.keep:.0%} or more of what rank {whole.rank} learned, {by}: "
            f"{_size(best.megabytes)} MB instead of {_size(whole.megabytes)}; its samples are "
            f"{best.distance:.0%} of the way back to those without the LoRA, so compare them by eye{also}"
        )


def _size(megabytes: float) -> str:
    return f"{megabytes:.2g}" if megabytes < 99 else f"{megabytes:.0f}"


def advise_rank(
    run: str | Path | RunFolder,
    *,
    keep: float = 0.99,
    ranks: Sequence[int] = (),
    features: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Advice:
    """Truncates a run's adapter to smaller ranks, measures each, and writes the smallest that is enough.

    The held-out loss decides, if there are images enough and the whole interval over them lies above `keep`;
    and the style of samples, which must not be clearly less. The spectrum cannot: small directions may
    matter, and large ones may be noise.

    Args:
        run: The run folder; the file, `rank.json` and the curve `rank.png` are written into it.
        keep: The share of what was learned that is enough.
        ranks: Ranks to try; by default powers of two.
        features: A vision model, as for `choose`.
        seed: Seed of the samples.
        progress: Called with (finished, total): the losses of each rank, then the images.

    Raises:
        ConfigError: If `keep` or a rank is out of range.
        RunError: If there are no held-out images, or the adapter does not lower their loss.
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"--keep {keep:g} must be above 0 and at most 1; use 0.99", key="option--keep")
    if any(rank < 1 for rank in ranks):
        shown = ",".join(map(str, ranks))
        raise ConfigError(f"--ranks {shown} must be at least 1 each; use 1,2,4,8", key="option--ranks")
    scorer = load_features(features, choose_device())  # before what takes longer
    context = open_context(run)
    whole = context.adapter.rank
    adapters = {rank: resize(context.adapter, rank=rank)[0] for rank in candidate_ranks(whole, ranks)}
    adapters[whole] = context.adapter
    without = context.loss(context.ancestors)
    is_known = scorer.name != DRAWING or context.base.info.is_builtin
    tell = progress or (lambda finished, total: None)
    candidates = _measure(context, adapters, without, scorer if is_known else None, seed, tell)
    best = next((one.rank for one in candidates if one.keeps(keep) or one.rank == whole), whole)
    rank = best if len(context.records) >= MIN_IMAGES else None
    files = _write(context, adapters[rank]) if rank not in (None, whole) else ()
    curve = draw_rank_curve(
        context.run.rank_curve,
        {one.rank: one.loss for one in candidates},
        {
            "of what was learned": [one.kept for one in candidates],
            "of the energy": [one.energy for one in candidates],
            "of the way to the images": [1 - one.distance for one in candidates],
        },
        without=without.loss,
        best=rank,
        title=context.run.name,
    )
    advice = Advice(candidates, without.loss, keep, rank, len(context.records), files, curve)
    values = {**asdict(advice), "files": [file.name for file in advice.files], "curve": advice.curve.name}
    write_json(context.run.advice_file, {**values, "adapter": context.run.adapter.name, "seed": seed})
    return advice


def candidate_ranks(largest: int, asked: Sequence[int] = ()) -> list[int]:
    """The given ranks, or the powers of two, below that of the adapter."""
    powers = [2**number for number in range(largest.bit_length())]
    return sorted({rank for rank in asked or powers if rank < largest})


def _measure(
    context: EvaluationContext,
    adapters: Mapping[int, Adapter],
    without: HeldoutLoss,
    features: Features | None,
    seed: int,
    progress: Callable[[int, int], object],
) -> list[Candidate]:
    """Measures adapters by rank, the whole one last; `without` is the loss without any."""
    stacks = {rank: (*context.ancestors, (adapter, 1.0)) for rank, adapter in adapters.items()}
    captions = dict(islice(context.captions.items(), MAX_SAMPLES))
    total = len(stacks) + (len(stacks) + 1) * len(captions)
    losses: list[HeldoutLoss] = []
    for number, stack in enumerate(stacks.values(), 1):
        losses.append(context.loss(stack))
        progress(number, total)
    learned = without.loss - losses[-1].loss
    if learned <= 0:
        raise RunError(
            f"run {context.run.path} has not lowered the held-out loss ({without.loss:.4f} without its "
            f"adapter, {losses[-1].loss:.4f} with it), so no rank can be recommended; see `sdlora spectrum`",
            key="rank.nothing-learned",
        )
    bare, *samples = context.samples(
        [context.ancestors, *stacks.values()],
        captions,
        seed,
        lambda done: progress(len(stacks) + done, total),
    )

    def distance(images: list[Tensor]) -> float:
        return mean_distance(image_distances(context.base, images, samples[-1])).content

    far, found = distance(bare) or 1.0, spectrum(context.adapter)
    gains = _style_gains(context, features, bare, samples) if features else []
    itemsize = DTYPES[context.config.export.precision].itemsize
    return [
        Candidate(
            rank=rank,
            megabytes=adapter.num_parameters * itemsize / 1e6,
            energy=1 - found.error(dict.fromkeys(found.values, rank)) ** 2,
            loss=loss.loss,
            kept=(without.loss - loss.loss) / learned,
            distance=distance(images) / far,
            interval=ratio_interval(_decreases(without, loss), _decreases(without, losses[-1])),
            style_lost=(gains[-1] - gains[number]).interval if gains else None,
        )
        for number, ((rank, adapter), loss, images) in enumerate(
            zip(adapters.items(), losses, samples, strict=True)
        )
    ]


def _style_gains(
    context: EvaluationContext, features: Features, bare: list[Tensor], samples: Sequence[list[Tensor]]
) -> list[Score]:
    """The style gain of the samples of each rank, as `evaluate` measures it."""
    drawings = [load_cropped(record, context.config, context.plan) for record in context.records]
    reference = Reference(features, drawings, leave_one_out=False)
    weights = BootstrapWeights.draw(len(bare), 1)
    pixels = [[((one + 1) * 127.5).round().clamp(0, 255).byte() for one in rows] for rows in (bare, *samples)]
    images = [[Image.fromarray(one.permute(1, 2, 0).numpy()) for one in rows] for rows in pixels]
    before, *after = map(reference.offsets, images)
    return [style_gain(weights, reference, before, rows) for rows in after]


def _decreases(without: HeldoutLoss, loss: HeldoutLoss) -> list[float]:
    """The decrease of the loss of each image."""
    return [before - after for before, after in zip(without.by_image, loss.by_image, strict=True)]


def _write(context: EvaluationContext, adapter: Adapter) -> tuple[Path, ...]:
    """Writes the adapter in the dialects of the run, with the metadata of the run's own file."""
    settings, run = context.config.export, context.run
    return tuple(
        export_adapter(
            adapter, run.ranked_adapter(adapter.rank, dialect), dialect=dialect, precision=settings.precision
        ).path
        for dialect in dict.fromkeys(settings.formats)
    )
