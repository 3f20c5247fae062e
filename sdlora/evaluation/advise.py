"""How much rank a run needed: its adapter at smaller ranks, measured, without training anything."""

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
from sdlora.rank.spectrum import Spectrum, spectrum
from sdlora.report.plots import draw_rank_curve
from sdlora.runs import RunFolder
from sdlora.writing import write_json

MAX_PICTURES = 8


@dataclass(frozen=True)
class Candidate:
    """The adapter at one rank.

    Args:
        rank: The largest of its modules.
        megabytes: Of the file, its header left out.
        energy: The share of the whole adapter's energy that is left.
        loss: The held-out loss.
        kept: The share of what was learned: how far the loss fell below that of no adapter, of how far it
            falls with the whole one.
        distance: Of its samples from those of the whole adapter, over that of samples without it.
    """

    rank: int
    megabytes: float
    energy: float
    loss: float
    kept: float
    distance: float


@dataclass(frozen=True)
class Advice:
    """What each rank keeps, and the smallest that keeps enough.

    Args:
        candidates: From the smallest rank to that of the run.
        loss_without: Held-out loss without the adapter, on its parents alone.
        keep: The share asked for.
        rank: The advised one.
        images: Held-out images.
        files: What was written.
        curve: The image.
    """

    candidates: list[Candidate]
    loss_without: float
    keep: float
    rank: int
    images: int
    files: tuple[Path, ...]
    curve: Path

    def lines(self) -> list[str]:
        """As printed."""
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

    Held-out loss decides. The spectrum cannot: small directions may matter, large ones may be learned noise.

    Args:
        run: The run folder; it gets the file, `rank.json` and the curve `rank.png`.
        keep: The share of what was learned that is enough.
        ranks: To try; powers of two by default.
        progress: Called with (finished, total): the losses of each rank, then the images.

    Raises:
        ConfigError: If `keep` or a rank is out of range.
        RunError: If there are no held-out images, or the adapter has learnt nothing that they show.
    """
    _check(keep, ranks)
    context = open_context(run)
    found = spectrum(context.adapter)
    tried = candidate_ranks(context.adapter.rank, ranks)
    adapters = {rank: resize(context.adapter, rank=rank)[0] for rank in tried}
    adapters[context.adapter.rank] = context.adapter
    without = context.loss(context.ancestors).loss
    total, show = _count_work(context, adapters), progress or (lambda finished, total: None)
    losses: dict[int, float] = {}
    for number, (rank, adapter) in enumerate(adapters.items(), 1):
        losses[rank] = context.loss((*context.ancestors, (adapter, 1.0))).loss
        show(number, total)
    learned = without - losses[context.adapter.rank]
    if learned <= 0:
        raise RunError(
            f"run {context.run.path} has not lowered the held-out loss ({without:.4f} without its adapter, "
            f"{losses[context.adapter.rank]:.4f} with it), so none can be recommended; see `sdlora spectrum`",
            key="rank.nothing-learned",
        )
    distances = _image_distances(context, adapters, seed, lambda done: show(len(adapters) + done, total))
    candidates = [
        Candidate(
            rank=rank,
            megabytes=adapter.num_parameters * DTYPES[context.config.export.precision].itemsize / 1e6,
            energy=1 - found.error(_ranks(found, rank)) ** 2,
            loss=losses[rank],
            kept=(without - losses[rank]) / learned,
            distance=distances[rank],
        )
        for rank, adapter in adapters.items()
    ]
    best = next(one.rank for one in candidates if one.kept >= keep or one.rank == context.adapter.rank)
    files = _write(context, adapters[best]) if best != context.adapter.rank else ()
    curve = _draw(context, candidates, without, best)
    advice = Advice(candidates, without, keep, best, len(context.records), files, curve)
    values = {**asdict(advice), "files": [file.name for file in advice.files], "curve": advice.curve.name}
    write_json(context.run.advice_file, {**values, "adapter": context.run.adapter.name, "seed": seed})
    return advice


def _check(keep: float, ranks: Sequence[int]) -> None:
    if not 0 < keep <= 1:
        raise ConfigError(f"--keep {keep:g} must be above 0 and at most 1; use 0.99", key="option--keep")
    if any(rank < 1 for rank in ranks):
        raise ConfigError(
            f"--ranks {','.join(map(str, ranks))} must be at least 1 each; use 1,2,4,8", key="option--ranks"
        )


def _count_work(context: EvaluationContext, adapters: Mapping[int, Adapter]) -> int:
    return len(adapters) + (len(adapters) + 1) * min(len(context.records), MAX_PICTURES)


def candidate_ranks(largest: int, asked: Sequence[int] = ()) -> list[int]:
    """The ranks below that of the adapter: those asked for, or the powers of two."""
    powers = [2**number for number in range(largest.bit_length())]
    return sorted({rank for rank in asked or powers if rank < largest})


def _ranks(found: Spectrum, rank: int) -> dict[str, int]:
    return {name: min(rank, len(values)) for name, values in found.values.items()}


def _image_distances(
    context: EvaluationContext, adapters: dict[int, Adapter], seed: int, progress: Callable[[int], object]
) -> dict[int, float]:
    """How far samples are from those of the whole adapter, over how far they are without any."""
    captions = [record.caption for record in context.records[:MAX_PICTURES]]
    stacks = [context.ancestors, *((*context.ancestors, (adapter, 1.0)) for adapter in adapters.values())]
    without, *shown = context.samples(stacks, captions, seed, progress)
    whole = shown[list(adapters).index(context.adapter.rank)]

    def distance(images: list[Tensor]) -> float:
        return mean_distance(image_distances(context.base, images, whole)).content

    far = distance(without) or 1.0
    return {rank: distance(images) / far for rank, images in zip(adapters, shown, strict=True)}


def _write(context: EvaluationContext, adapter: Adapter) -> tuple[Path, ...]:
    """The adapter in the dialects of the run, with what the run's own file says."""
    settings = context.config.export
    return tuple(
        export_adapter(
            adapter,
            context.run.ranked_adapter(adapter.rank, dialect),
            dialect=dialect,
            precision=settings.precision,
        ).path
        for dialect in dict.fromkeys(settings.formats)
    )


def _draw(context: EvaluationContext, candidates: Sequence[Candidate], without: float, best: int) -> Path:
    return draw_rank_curve(
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
