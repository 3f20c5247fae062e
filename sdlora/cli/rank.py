"""`sdlora spectrum`, `sdlora resize` and `sdlora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdlora.cli import app, options
from sdlora.errors import ConfigError


@app.command()
def spectrum(
    source: options.Source,
    plot: Annotated[Path | None, typer.Option(help="Plot the spectrum to this PNG file.")] = None,
) -> None:
    """Show how much of its rank a LoRA uses, block by block."""
    from rich.console import Console
    from rich.table import Table

    from sdlora.formats.files import load_adapter
    from sdlora.rank.spectrum import block_of
    from sdlora.rank.spectrum import spectrum as measure

    options.check_png(plot, "--plot")
    (file,) = options.find_adapters(source)
    found = measure(load_adapter(file, dtype=None))
    table = Table("block", box=None)
    for heading in ("modules", "rank", "effective", "50 %", "90 %", "99 %", "energy"):
        table.add_column(heading, justify="right")
    for row in found.blocks():
        ranks = (f"{rank:.1f}" for rank in row.ranks_for_energy)
        numbers = (row.num_modules, row.rank, f"{row.effective_rank:.1f}", *ranks, f"{row.energy:.1%}")
        table.add_row(row.block, *map(str, numbers))
    Console(highlight=False).print(table)
    options.say("effective: exp of the entropy of the singular values; 50 %, 90 %, 99 %: the rank with this")
    options.say("share of a module's energy (the sum of squares); both averaged over modules")
    if plot is not None:
        from sdlora.report.plots import draw_spectrum

        values = {name: row.tolist() for name, row in found.values.items()}
        blocks = {name: block_of(name) for name in values}
        options.say(f"plot      {draw_spectrum(plot, values, blocks, title=file.name)}")


@app.command()
def resize(
    source: options.Source,
    out: options.Out,
    rank: Annotated[int | None, typer.Option(help="This rank in all modules.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep this fraction of each module's energy, such as 0.99.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Keep singular values above this share of the largest, such as 0.05.")
    ] = None,
    score: Annotated[
        float | None, typer.Option(help="Keep those above this share of the base weight's norm: 0.003.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model, for --score.")] = None,
    size_mb: Annotated[float | None, typer.Option(help="Keep as much as fits into this file size.")] = None,
    format: options.Dialect = "diffusers",
    precision: options.Precision = "fp16",
) -> None:
    """Reduce the rank of a LoRA (by SVD) by one of these rules, and print the error."""
    dialect, dtype = options.export_settings(format, precision)
    if base is not None and score is None:
        raise ConfigError(f"--base {base} has no effect without --score; remove it", key="option--base")
    if not any(value is not None for value in (rank, energy, ratio, score, size_mb)):
        problem = "a rule is missing; write --rank 8, --energy 0.99, --ratio, --score or --size-mb"
        raise ConfigError(problem, key="resize.one-rule")
    from sdlora.export.export import check_out, export_adapter
    from sdlora.export.rewrite import weight_norms
    from sdlora.formats.files import load_adapter
    from sdlora.rank.resize import resize as shrink

    (file,) = options.find_adapters(source)
    check_out(out, [file])
    adapter = load_adapter(file, dtype=None)
    norms = weight_norms(base, list(adapter.modules)) if base and score is not None else None
    small, report = shrink(
        adapter,
        rank=rank,
        energy=energy,
        ratio=ratio,
        score=score,
        base_norms=norms,
        size_mb=size_mb,
        precision=dtype,
        dialect=dialect,
    )
    del adapter  # a large file, which the smaller one no longer needs
    written = export_adapter(small, out, dialect=dialect, precision=dtype)
    options.say("\n".join([*report.lines(), *written.lines()]))


@app.command()
def merge(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|LORA[:WEIGHT] ...",
            help="Run folders, or LoRA files in any dialect; with their weights, such as a.safetensors:0.7.",
        ),
    ],
    out: options.Out,
    weights: Annotated[str | None, typer.Option(help="Such as 0.7,0.3.", show_default="1 each")] = None,
    method: Annotated[str, typer.Option(help="concatenate (exact), svd, ties or dare.")] = "concatenate",
    rank: Annotated[int | None, typer.Option(help="Rank of svd, ties, dare; default: the largest.")] = None,
    density: Annotated[float | None, typer.Option(help="Fraction kept by ties, dare; default: 0.5.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of dare.", show_default="0")] = None,
    format: options.Dialect = "diffusers",
    precision: options.Precision = "fp16",
) -> None:
    """Merge LoRAs into one file."""
    dialect, dtype = options.export_settings(format, precision)
    factors = options.parse_numbers(weights, float, "--weights")
    from sdlora.export.export import check_out, export_adapter
    from sdlora.formats.files import load_adapter, split_sum
    from sdlora.rank.merge import merge as join

    parts = [part for source in sources for part in split_sum(source)]
    if factors and (len(factors) != len(parts) or any(factor != 1 for _, factor in parts)):
        problem = f"--weights {weights} does not fit {' '.join(sources)}; write one number per LoRA, once"
        raise ConfigError(problem, key="option--weights")
    factors = factors or [factor for _, factor in parts]
    files = options.find_adapters(*(str(path) for path, _ in parts))
    check_out(out, files)
    adapters = [load_adapter(file, dtype=None) for file in files]
    pairs = list(zip(adapters, factors, strict=True))
    joined, report = join(pairs, method, rank=rank, density=density, seed=seed)  # type: ignore[arg-type]
    written = export_adapter(joined, out, dialect=dialect, precision=dtype)
    options.say("\n".join([*(report.lines() if report else ()), *written.lines()]))
