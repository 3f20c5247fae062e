"""The rank that a run needs: its adapter is measured at smaller ranks, without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from sdlora.dtypes import DTYPES
from sdlora.errors import ConfigError, RunError
from sdlora.evaluation.context import EvaluationContext, open_context
from sdlora.evaluation.evaluate import image_distances, mean_distance
from sdlora.export.export import export_adapter
from sdlora.lora.adapter import Adapter
from sdlora.rank.resize import resize
from sdlora.rank.spectrum import spectrum
from sdlora.report.plots import draw_rank_curve
from sdlora.runs import RunFolder
from sdlora.writing import write_json

MAX_SAMPLES = 8


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
    """

    rank: int
    megabytes: float
    energy: float
    loss: float
    kept: float
    distance: float


@dataclass(frozen=True)
class Advice:
    """The candidates, and the smallest rank that keeps enough.

    Args:
        candidates: From the smallest rank to that of the run.
        loss_without: Held-out loss without the adapter, with its parents alone.
        keep: The share that is enough.
        rank: The recommended rank.
        images: Number of held-out images.
        files: Files of the recommended rank; none if it is that of the run.
        curve: Plot of the candidates.
    """

    candidates: list[Candidate]
    loss_without: float
    keep: float
    rank: int
    images: int
    files: tuple[Path, ...]
    curve: Path

    def lines(self) -> list[str]:
        whole = self.candidates[-1]
        best = next(one for one in self.candidates if one.rank == self.rank)
        lines = [f"validation loss on {self.images} images, {self.loss_without:.4f} without the adapter"]
        lines += [
            f"rank {one.rank:>4}  {one.megabytes:>7.2f} MB  energy {one.energy:>6.1%}  loss {one.loss:.4f}  "
            f"keeps {one.kept:>6.1%}  images {one.distance:.1%} away"
            for one in self.candidates
        ]
        if best is whole:
            lines.append(
                f"advice    keep rank {whole.rank}: no smaller one keeps {self.keep:.0%} of what it learned"
            )
        else:
            lines.append(
                f"advice    rank {best.rank} keeps {min(best.kept, 1):.0%} of what rank {whole.rank} learned"
                f": {_size(best.megabytes)} MB instead of {_size(whole.megabytes)}"
            )
        return [*lines, f"curve     {self.curve}", *(f"wrote     {file}" for file in self.files)]


def _size(megabytes: float) -> str:
    return f"{megabytes:.2g}" if megabytes < 99 else f"{megabytes:.0f}"


def advise_rank(
    run: str | Path | RunFolder,
    *,
    keep: float = 0.99,
    ranks: Sequence[int] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Advice:
    """Truncates a run's adapter to smaller ranks, measures each, and writes the smallest that is enough.

    The held-out loss decides. The spectrum cannot: small directions may matter, and large ones may be noise.

    Args:
        run: The run folder; the file, `rank.json` and the curve `rank.png` are written into it.
        keep: The share of what was learned that is enough.
        ranks: Ranks to try; by default powers of two.
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
    context = open_context(run)
    whole = context.adapter.rank
    adapters = {rank: resize(context.adapter, rank=rank)[0] for rank in candidate_ranks(whole, ranks)}
    adapters[whole] = context.adapter
    without = context.loss(context.ancestors).loss
    candidates = _measure(context, adapters, without, seed, progress or (lambda finished, total: None))
    best = next(one.rank for one in candidates if one.kept >= keep or one.rank == whole)
    files = _write(context, adapters[best]) if best != whole else ()
    curve = draw_rank_curve(
        context.run.rank_curve,
        {one.rank: one.loss for one in candidates},
        {
            "of what was learned": [one.kept for one in candidates],
            "of the energy": [one.energy for one in candidates],
            "of the way to the images": [1 - one.distance for one in candidates],
        },
        without=without,
        best=best,
        title=context.run.name,
    )
    advice = Advice(candidates, without, keep, best, len(context.records), files, curve)
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
    without: float,
    seed: int,
    progress: Callable[[int, int], object],
) -> list[Candidate]:
    """Measures adapters by rank, the whole one last; `without` is the loss without any."""
    stacks = {rank: (*context.ancestors, (adapter, 1.0)) for rank, adapter in adapters.items()}
    captions = [record.caption for record in context.records[:MAX_SAMPLES]]
    total = len(stacks) + (len(stacks) + 1) * len(captions)
    losses: list[float] = []
    for number, stack in enumerate(stacks.values(), 1):
        losses.append(context.loss(stack).loss)
        progress(number, total)
    learned = without - losses[-1]
    if learned <= 0:
        raise RunError(
            f"run {context.run.path} has not lowered the held-out loss ({without:.4f} without its adapter, "
            f"{losses[-1]:.4f} with it), so no rank can be recommended; see `sdlora spectrum`",
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
    itemsize = DTYPES[context.config.export.precision].itemsize
    return [
        Candidate(
            rank=rank,
            megabytes=adapter.num_parameters * itemsize / 1e6,
            energy=1 - found.error(dict.fromkeys(found.values, rank)) ** 2,
            loss=loss,
            kept=(without - loss) / learned,
            distance=distance(images) / far,
        )
        for (rank, adapter), loss, images in zip(adapters.items(), losses, samples, strict=True)
    ]


def _write(context: EvaluationContext, adapter: Adapter) -> tuple[Path, ...]:
    """Writes the adapter in the dialects of the run, with the metadata of the run's own file."""
    settings, run = context.config.export, context.run
    return tuple(
        export_adapter(
            adapter, run.ranked_adapter(adapter.rank, dialect), dialect=dialect, precision=settings.precision
        ).path
        for dialect in dict.fromkeys(settings.formats)
    )
