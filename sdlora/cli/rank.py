"""`sdlora spectrum`, `sdlora resize` and `sdlora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdlora.cli import app
from sdlora.cli.options import Dialect, Out, Precision, Source

if TYPE_CHECKING:
    from rich.table import Table

    from sdlora.rank.spectrum import Spectrum


@app.command()
def spectrum(
    source: Source,
    plot: Annotated[Path | None, typer.Option(help="Plot the spectrum to this PNG file.")] = None,
) -> None:
    """Show how much of its rank a LoRA uses, block by block."""
    from rich.console import Console

    from sdlora.cli.options import check_png, note_newest
    from sdlora.formats.files import load_adapter, resolve_adapter
    from sdlora.rank.spectrum import block_of
    from sdlora.rank.spectrum import spectrum as measure

    check_png(plot, "--plot")
    note_newest(source)
    file = resolve_adapter(source).file
    found = measure(load_adapter(file, dtype=None))
    Console(highlight=False).print(_block_table(found))
    typer.echo("effective: exp of the entropy of the singular values; 50 %, 90 %, 99 %: the rank that holds")
    typer.echo("this share of a module's energy (the sum of squares); both averaged over modules")
    if plot is not None:
        from sdlora.report.plots import draw_spectrum

        values = {name: row.tolist() for name, row in found.values.items()}
        blocks = {name: block_of(name) for name in values}
        typer.echo(f"plot      {draw_spectrum(plot, values, blocks, title=file.name)}")


def _block_table(found: Spectrum) -> Table:
    from rich.table import Table

    table = Table("block", box=None)
    for heading in ("modules", "rank", "effective", "50 %", "90 %", "99 %", "energy"):
        table.add_column(heading, justify="right")
    for row in found.blocks():
        ranks = (f"{rank:.1f}" for rank in row.ranks_for_energy)
        numbers = (row.num_modules, row.rank, f"{row.effective_rank:.1f}", *ranks, f"{row.energy:.1%}")
        table.add_row(row.block, *map(str, numbers))
    return table


@app.command()
def resize(
    source: Source,
    out: Out,
    rank: Annotated[int | None, typer.Option(help="This rank in all modules.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep this fraction of each module's energy, such as 0.99.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Keep singular values above this share of the largest, such as 0.05.")
    ] = None,
    score: Annotated[
        float | None, typer.Option(help="The same, of the base weight's norm, such as 0.003.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model, for --score.")] = None,
    size_mb: Annotated[float | None, typer.Option(help="Keep as much as fits into this file size.")] = None,
    format: Dialect = "diffusers",
    precision: Precision = "fp16",
) -> None:
    """Reduce the rank of a LoRA (by SVD) by one of these rules, and print the error."""
    from sdlora.cli.options import export_settings, note_newest
    from sdlora.errors import ConfigError

    dialect, dtype = export_settings(format, precision)
    if base is not None and score is None:
        raise ConfigError(f"--base {base} has no effect without --score; remove it", key="option--base")
    from sdlora.export.export import check_out, export_adapter
    from sdlora.export.rewrite import weight_norms
    from sdlora.formats.files import load_adapter, resolve_adapter
    from sdlora.rank.resize import resize as shrink

    note_newest(source)
    file = resolve_adapter(source).file
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
    typer.echo("\n".join([*report.lines(), *written.lines()]))


@app.command()
def merge(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RUN|LORA ...", help="Run folders, or LoRA files in any dialect.")
    ],
    out: Out,
    weights: Annotated[str | None, typer.Option(help="Such as 0.7,0.3.", show_default="1 each")] = None,
    method: Annotated[str, typer.Option(help="concatenate (exact), svd, ties or dare.")] = "concatenate",
    rank: Annotated[int | None, typer.Option(help="Rank of svd, ties, dare; default: the largest.")] = None,
    density: Annotated[float | None, typer.Option(help="Fraction kept by ties, dare; default: 0.5.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of dare.", show_default="0")] = None,
    format: Dialect = "diffusers",
    precision: Precision = "fp16",
) -> None:
    """Merge LoRAs into one file."""
    from sdlora.cli.options import export_settings, note_newest, parse_numbers
    from sdlora.errors import ConfigError

    dialect, dtype = export_settings(format, precision)
    factors = parse_numbers(weights, float, "--weights") or [1.0] * len(sources)
    if len(factors) != len(sources):
        problem = f"--weights {weights} has {len(factors)} numbers for {len(sources)} LoRAs; use one per LoRA"
        raise ConfigError(problem, key="option--weights")
    from sdlora.export.export import check_out, export_adapter
    from sdlora.formats.files import load_adapter, resolve_adapter
    from sdlora.rank.merge import merge as join

    note_newest(*sources)
    files = [resolve_adapter(source).file for source in sources]
    check_out(out, files)
    adapters = [load_adapter(file, dtype=None) for file in files]
    pairs = list(zip(adapters, factors, strict=True))
    joined, report = join(pairs, method, rank=rank, density=density, seed=seed)  # type: ignore[arg-type]
    written = export_adapter(joined, out, dialect=dialect, precision=dtype)
    typer.echo("\n".join([*(report.lines() if report else ()), *written.lines()]))
