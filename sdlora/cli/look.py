"""`sdlora sample`, `sdlora evaluate` and `sdlora doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sdlora.cli.tree import Force


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command()(sample)
    app.command()(evaluate)
    app.command("advise-rank")(advise_rank)
    app.command()(doctor)


def sample(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN|LORA]...", help="Runs or LoRA files; none: the base alone."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base.", show_default="the run's, or builtin")] = None,
    step: Annotated[int | None, typer.Option(help="The adapter that a run saved at this step.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with a prompt on each line.")] = None,
    strengths: Annotated[str | None, typer.Option(help="Columns beside the base, such as 0.5,1.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, such as 0,1.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the images should not show.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="A diffusers scheduler, such as DDIMScheduler.")
    ] = None,
    safety_checker: Annotated[
        bool | None,
        typer.Option(help="Whether the base's own safety checker, if it has one, may withhold images."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for grid.png and the single images.")] = None,
    force: Force = False,
) -> None:
    """Make a grid: prompts and seeds down, the base and the strengths across."""
    from sdlora.cli.values import check_base, note_newest, parse_numbers, parse_size, sample_settings
    from sdlora.config import load_config

    changes = sample_settings(
        prompt,
        prompts,
        seeds,
        strengths=parse_numbers(strengths, float, "--strengths"),
        negative_prompt=negative_prompt,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        safety_checker=safety_checker,
    )
    pixels = parse_size(size)
    if base is not None:
        check_base(load_config(None, {"base.source": base}).base)
    if step is None:
        note_newest(*(sources or []))
    from sdlora.report.terminal import Terminal
    from sdlora.sampling.session import plan_sample

    terminal = Terminal()
    subjects: list[Path | None] = [*sources] if sources else [None]
    # All are checked before the first image is made.
    plans = [
        plan_sample(
            source,
            base=base,
            step=step,
            out=folder,
            size=pixels,
            force=force,
            warn=terminal.warn,
            **changes,
        )
        for source, folder in zip(subjects, _folders(subjects, out), strict=True)
    ]
    for plan in plans:
        with terminal.progress("sampling", 1) as meter:
            grid = plan.make(meter.show)
        typer.echo(f"grid      {grid}")


def _folders(subjects: Sequence[Path | None], out: Path | None) -> list[Path | None]:
    """`--out`; for several a folder in it for each, called as the run is, with -2 behind for another so."""
    if out is None or len(subjects) < 2:
        return [out] * len(subjects)
    from sdlora.tree.lineage import name_of

    names = [name_of(source) for source in subjects if source]
    counts = [names[:place].count(name) for place, name in enumerate(names, 1)]
    return [out / (f"{name}-{n}" if n > 1 else name) for name, n in zip(names, counts, strict=True)]


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
) -> None:
    """Measure a run: held-out loss, and how far its samples are from the held-out images."""
    from sdlora.cli.values import note_newest
    from sdlora.runs import RunFolder

    RunFolder.open(run)
    note_newest(run)
    from sdlora.evaluation.evaluate import evaluate as measure
    from sdlora.report.terminal import Terminal

    terminal = Terminal()
    with terminal.progress("evaluating", 1) as meter:
        result = measure(run, progress=meter.show)
    for line in result.lines():
        typer.echo(line)


def advise_rank(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
    keep: Annotated[float, typer.Option(help="The share of what was learned that is enough.")] = 0.99,
    ranks: Annotated[
        str | None, typer.Option(help="To try, such as 2,4,8.", show_default="powers of two")
    ] = None,
) -> None:
    """Measure a run's adapter at smaller ranks, without training; write the smallest that is enough."""
    from sdlora.cli.values import note_newest, parse_numbers
    from sdlora.runs import RunFolder

    tried = parse_numbers(ranks, int, "--ranks") or ()
    RunFolder.open(run)
    note_newest(run)
    from sdlora.evaluation.advise import advise_rank as advise
    from sdlora.report.terminal import Terminal

    with Terminal().progress("measuring", 1) as meter:
        advice = advise(run, keep=keep, ranks=tried, progress=meter.show)
    for line in advice.lines():
        typer.echo(line)


def doctor(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A folder of images.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Settings, such as data.trigger=x."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base whose tokenizer and size count.", show_default="builtin")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file; presets are in configs/.")] = None,
    contact_sheet: Annotated[
        Path | None, typer.Option(help="Draw what the model will see into this PNG file.")
    ] = None,
) -> None:
    """Check an image folder without training; exit code 1 if something must be mended."""
    from sdlora.cli.values import check_png
    from sdlora.config import load_config

    check_png(contact_sheet, "--contact-sheet")
    settings = load_config(config, overrides or [], images=images)
    if base is not None:
        settings = settings.replace(base={"source": base})
    from sdlora.training.preflight import check_folder

    checkup = check_folder(settings, contact_sheet)
    for line in checkup.lines():
        typer.echo(line)
    if checkup.has_errors:
        raise typer.Exit(1)
