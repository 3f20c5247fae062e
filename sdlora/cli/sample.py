"""`sdlora sample`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdlora.cli import app, options

if TYPE_CHECKING:
    from sdlora.report.terminal import Terminal
    from sdlora.sampling.session import SamplePlan


@app.command()
def sample(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN|LORA]...", help="Runs or LoRA files.", show_default="the base alone"),
    ] = None,
    base: Annotated[str | None, options.base_option("the run's, or builtin")] = None,
    step: Annotated[
        list[str] | None,
        typer.Option(help="Saved steps of a run, beside each other: 50,100,final; repeatable."),
    ] = None,
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    strengths: Annotated[str | None, typer.Option(help="LoRA strengths, one column each: 0.5,1.")] = None,
    seeds: options.Seeds = None,
    negative_prompt: Annotated[str | None, typer.Option(help="The negative prompt.")] = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    scheduler: Annotated[
        str | None, typer.Option(help="A diffusers scheduler, such as DDIMScheduler.")
    ] = None,
    safety_checker: Annotated[
        bool | None, typer.Option(help="Use the base's own safety checker, if it has one.")
    ] = None,
    size: options.Size = None,
    out: options.ImagesOut = None,
    force: options.Force = False,
) -> None:
    """Draw a grid: one row per prompt and seed, one column for the base and for each strength."""
    from sdlora.config import load_config

    changes = options.sample_settings(
        prompt,
        prompts,
        seeds,
        strengths=options.parse_numbers(strengths, float, "--strengths"),
        negative_prompt=negative_prompt,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        safety_checker=safety_checker,
    )
    pixels, saved = options.parse_size(size), options.parse_steps(step)
    if base is not None:
        options.check_base(load_config(None, {"base.source": base}).base)
    if not saved:
        options.find_adapters(*(sources or []))
    from sdlora.report.terminal import Terminal
    from sdlora.sampling.session import plan_sample

    terminal = Terminal()
    subjects: list[Path | None] = [*sources] if sources else [None]
    # All sources are checked before the first image is drawn.
    plans = [
        plan_sample(
            source, base=base, step=saved, out=folder, size=pixels, force=force, warn=terminal.warn, **changes
        )
        for source, folder in zip(subjects, _folders(subjects, out), strict=True)
    ]
    draw_grids(plans, terminal)


def draw_grids(plans: Sequence[SamplePlan], terminal: Terminal) -> None:
    for plan in plans:
        for note in plan.notes():
            typer.echo(f"note: {note}", err=True)
        with terminal.progress("sampling", 1) as meter:
            grid = plan.make(meter.show)
        typer.echo(f"grid      {grid}")


def _folders(subjects: Sequence[Path | None], out: Path | None) -> list[Path | None]:
    """`--out`, or with several sources a subfolder for each, named after it; duplicates get -2, -3, ..."""
    if out is None or len(subjects) < 2:
        return [out] * len(subjects)
    from sdlora.tree.lineage import adapter_name

    names = [adapter_name(source) for source in subjects if source]
    counts = [names[:place].count(name) for place, name in enumerate(names, 1)]
    return [out / (f"{name}-{n}" if n > 1 else name) for name, n in zip(names, counts, strict=True)]
