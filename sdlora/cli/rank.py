"""`sdlora spectrum`, `sdlora resize` and `sdlora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from sdlora.rank.spectrum import Spectrum

Source = Annotated[
    Path, typer.Argument(metavar="RUN|LORA", help="A run folder, or a LoRA file of any dialect.")
]
Out = Annotated[Path, typer.Option(help="The file to write.")]
Dialect = Annotated[str, typer.Option(help="diffusers, or kohya for A1111, Forge, ComfyUI.")]
Precision = Annotated[str, typer.Option(help="fp16, bf16 or fp32.")]


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command()(spectrum)
    app.command()(resize)
    app.command()(merge)


def spectrum(
    source: Source,
    modules: Annotated[
        bool, typer.Option("--modules", help="A row for each module, not for each block.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the spectrum into this PNG file.")] = None,
) -> None:
    """Show how much of its rank a LoRA uses, block by block."""
    from rich.console import Console

    from sdlora.cli.values import check_png, note_newest
    from sdlora.export.export import find_adapter
    from sdlora.formats.files import load_adapter
    from sdlora.rank.spectrum import block_of
    from sdlora.rank.spectrum import spectrum as measure

    check_png(plot, "--plot")
    note_newest(source)
    file = find_adapter(source)
    found = measure(load_adapter(file, dtype=None))
    if modules:
        Console(highlight=False, width=max(Console().width, 130)).print(_module_table(found))
    else:
        Console(highlight=False).print(_block_table(found))
    typer.echo("effective rank: exp of the entropy of the singular values; 50 %, 90 %, 99 %: directions that")
    typer.echo("hold so much of a module's energy (the sum of squares), on average over the modules")
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


def _module_table(found: Spectrum) -> Table:
    from rich.table import Table

    table = Table("module", box=None)
    for heading in ("rank", "effective", "50 %", "90 %", "99 %", "largest"):
        table.add_column(heading, justify="right")
    for name, values in found.values.items():
        ranks = (found.rank_for_energy(name, share) for share in (0.5, 0.9, 0.99))
        numbers = (len(values), f"{found.effective_rank(name):.1f}", *ranks, f"{float(values[0]):.3g}")
        table.add_row(name, *map(str, numbers))
    return table


def resize(
    source: Source,
    out: Out,
    rank: Annotated[int | None, typer.Option(help="The same rank for all modules.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep this share of each module's energy, such as 0.99.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Keep directions of this share of a module's largest, such as 0.05.")
    ] = None,
    score: Annotated[
        float | None,
        typer.Option(help="Keep directions of this share of the base weight's norm, such as 0.003."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, for --score.")] = None,
    size_mb: Annotated[float | None, typer.Option(help="The most that fits into so many megabytes.")] = None,
    format: Dialect = "diffusers",
    precision: Precision = "fp16",
) -> None:
    """Write a LoRA with less rank, as near to the old one as can be; say what it lost. Give one rule."""
    from sdlora.cli.values import note_newest
    from sdlora.config import load_config
    from sdlora.errors import ConfigError

    settings = load_config(None, {"export.formats": [format], "export.precision": precision}).export
    if base is not None and score is None:
        raise ConfigError(f"--base {base} has no effect without --score; leave it out")
    from sdlora.export.export import check_out, export_adapter, find_adapter
    from sdlora.export.rewrite import weight_norms
    from sdlora.formats.files import load_adapter
    from sdlora.rank.resize import resize as shrink

    note_newest(source)
    dialect, file = settings.formats[0], find_adapter(source)
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
        precision=settings.precision,
        dialect=dialect,
    )
    del adapter  # a large file, which the smaller one no longer needs
    written = export_adapter(small, out, dialect=dialect, precision=settings.precision)
    for line in (*report.lines(), *written.lines()):
        typer.echo(line)


def merge(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RUN|LORA ...", help="Run folders, or LoRA files of any dialect.")
    ],
    out: Out,
    weights: Annotated[str | None, typer.Option(help="Such as 0.7,0.3.", show_default="1 for each")] = None,
    method: Annotated[
        str, typer.Option(help="concatenate (the exact sum), svd, ties or dare.")
    ] = "concatenate",
    rank: Annotated[
        int | None, typer.Option(help="Of the result, but for concatenate.", show_default="the largest")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="The share of elements that ties and dare keep.", show_default="0.5")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of dare.", show_default="0")] = None,
    format: Dialect = "diffusers",
    precision: Precision = "fp16",
) -> None:
    """Join LoRAs into one file."""
    from sdlora.cli.values import note_newest, parse_numbers
    from sdlora.config import load_config
    from sdlora.errors import ConfigError

    settings = load_config(None, {"export.formats": [format], "export.precision": precision}).export
    factors = parse_numbers(weights, float, "--weights") or [1.0] * len(sources)
    if len(factors) != len(sources):
        raise ConfigError(
            f"--weights {weights} has {len(factors)} numbers for {len(sources)} LoRAs; give as many"
        )
    from sdlora.export.export import check_out, export_adapter, find_adapter
    from sdlora.formats.files import load_adapter
    from sdlora.rank.merge import merge as join

    note_newest(*sources)
    files = [find_adapter(source) for source in sources]
    check_out(out, files)
    adapters = [load_adapter(file, dtype=None) for file in files]
    pairs = list(zip(adapters, factors, strict=True))
    joined, report = join(pairs, method, rank=rank, density=density, seed=seed)  # type: ignore[arg-type]
    written = export_adapter(joined, out, dialect=settings.formats[0], precision=settings.precision)
    for line in (*(report.lines() if report else ()), *written.lines()):
        typer.echo(line)
