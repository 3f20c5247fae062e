"""`sdlora evaluate`, `sdlora advise-rank` and `sdlora report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdlora.cli import app, options

SavedSteps = Annotated[
    list[str] | None,
    typer.Option(help="Saved steps to choose from: 50,100,final; repeatable.", show_default="up to five"),
]
Strengths = Annotated[
    str | None, typer.Option(help="Strengths to choose from: 0.5,0.8,1.", show_default="the run's")
]
Export = Annotated[
    bool, typer.Option("--export", help="Write the recommended adapter as adapters/best.safetensors.")
]


@app.command()
def evaluate(
    run: options.Run,
    full_base: Annotated[
        bool, typer.Option("--full-base", help="Measure the loss on the full base too, after base.quantize.")
    ] = False,
    step: SavedSteps = None,
    strengths: Strengths = None,
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    seeds: options.Seeds = None,
    features: options.Features = None,
    export: Export = False,
    as_json: options.Json = False,
) -> None:
    """Measure a run on held-out images, and recommend a saved step and a strength."""
    from sdlora.runs import RunFolder

    saved, chosen = options.parse_steps(step), options.parse_numbers(strengths, float, "--strengths") or []
    texts = options.sample_settings(prompt, prompts, seeds)
    folder = RunFolder.open(run)
    options.find_adapters(run)
    from sdlora.errors import RunError
    from sdlora.evaluation.choose import choose
    from sdlora.evaluation.evaluate import evaluate as measure
    from sdlora.evaluation.features import load_features
    from sdlora.evaluation.page import write_report
    from sdlora.evaluation.sweep import check_wanted
    from sdlora.report.terminal import Terminal
    from sdlora.sampling.session import choose_device

    wanted = {"steps": saved, "strengths": chosen, "prompts": texts.get("prompts", [])}
    check_wanted(folder, **wanted)
    scorer = load_features(features, choose_device())
    terminal, lines = Terminal(quiet=as_json), []
    try:
        with terminal.progress("evaluating", 1) as meter:
            lines = measure(run, full_base=full_base, progress=meter.show).lines()
    except RunError as error:
        # Without held-out images, there is still a choice.
        if "data.heldout" not in error.keys or full_base:
            raise
    with terminal.progress("sampling", 1) as meter:
        choice = choose(
            run,
            features=scorer,
            export=export,
            progress=meter.show,
            seeds=texts.get("seeds", []),
            **wanted,
        )
    if as_json:
        typer.echo(folder.evaluation_file.read_text(encoding="utf-8"), nl=False)
    else:
        options.say("\n".join([*lines, *choice.lines()]))
    if folder.report.is_file():
        # It was written when the run ended, and shows the recommendation.
        write_report(folder)


@app.command()
def advise_rank(
    run: options.Run,
    keep: Annotated[float, typer.Option(help="Fraction of the improvement that is enough.")] = 0.99,
    ranks: Annotated[str | None, typer.Option(help="Ranks to try: 2,4,8; default: powers of two.")] = None,
    features: options.Features = None,
) -> None:
    """Measure a run's adapter at smaller ranks, without training; write the smallest that is enough."""
    from sdlora.runs import RunFolder

    tried = options.parse_numbers(ranks, int, "--ranks") or ()
    RunFolder.open(run)
    options.find_adapters(run)
    from sdlora.evaluation.advise import advise_rank as advise
    from sdlora.report.terminal import Terminal

    with Terminal().progress("measuring", 1) as meter:
        advice = advise(run, keep=keep, ranks=tried, features=features, progress=meter.show)
    options.say("\n".join(advice.lines()))


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

    options.say(f"report    {write_report(folders, out=out)}")
