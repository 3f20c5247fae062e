"""`sdlora evaluate`, `sdlora advise-rank` and `sdlora report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdlora.cli import app, options


@app.command()
def evaluate(
    run: options.Run,
    full_base: Annotated[
        bool, typer.Option("--full-base", help="Measure the loss on the full base too, after base.quantize.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure a run: validation (held-out) loss, and the distance of its samples to the held-out images."""
    from sdlora.runs import RunFolder

    RunFolder.open(run)
    options.find_adapters(run)
    from sdlora.evaluation.evaluate import evaluate as measure
    from sdlora.report.terminal import Terminal

    with Terminal(quiet=as_json).progress("evaluating", 1) as meter:
        result = measure(run, full_base=full_base, progress=meter.show)
    if as_json:
        typer.echo(RunFolder(run).evaluation_file.read_text(encoding="utf-8"), nl=False)
    else:
        typer.echo("\n".join(result.lines()))


@app.command()
def advise_rank(
    run: options.Run,
    keep: Annotated[float, typer.Option(help="Fraction of the improvement that is enough.")] = 0.99,
    ranks: Annotated[str | None, typer.Option(help="Ranks to try: 2,4,8; default: powers of two.")] = None,
) -> None:
    """Measure a run's adapter at smaller ranks, without training; write the smallest that is enough."""
    from sdlora.runs import RunFolder

    tried = options.parse_numbers(ranks, int, "--ranks") or ()
    RunFolder.open(run)
    options.find_adapters(run)
    from sdlora.evaluation.advise import advise_rank as advise
    from sdlora.report.terminal import Terminal

    with Terminal().progress("measuring", 1) as meter:
        advice = advise(run, keep=keep, ranks=tried, progress=meter.show)
    typer.echo("\n".join(advice.lines()))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    out: Annotated[
        Path | None, typer.Option(help="Output file.", show_default="RUN/report.html, or report.html")
    ] = None,
) -> None:
    """Write one HTML file about a run, or about several side by side: samples, losses, images, settings."""
    from sdlora.runs import RunFolder

    folders = [RunFolder.open(run) for run in runs]
    from sdlora.evaluation.page import write_report

    typer.echo(f"report    {write_report(folders, out=out)}")
