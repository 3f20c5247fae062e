"""`sdlora sample` and `sdlora compare`."""

from __future__ import annotations

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
        list[str] | None,
        typer.Argument(metavar="[RUN|LORA]...", help=options.SOURCES, show_default="the base alone"),
    ] = None,
    base: Annotated[str | None, options.base_option("the run's, or builtin")] = None,
    step: options.SavedSteps = None,
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    strengths: options.Strengths = None,
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
    image: options.StartImage = None,
    denoise: options.Denoise = None,
    out: options.ImagesOut = None,
    force: options.Force = False,
) -> None:
    """Draw a grid: one row per prompt and seed, one column for the base and for each LoRA and strength."""
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
    start = options.parse_start(image, denoise)
    options.check_sources(sources or [], base=base, has_steps=bool(saved))
    from sdlora.report.terminal import Terminal
    from sdlora.sampling.session import SampleRequest, plan_sample

    terminal = Terminal()
    request = SampleRequest(base, saved, out, pixels, force, terminal.warn, changes, image=start)
    draw_grid(plan_sample(sources, request).checked(request), terminal)


def draw_grid(plan: SamplePlan, terminal: Terminal) -> None:
    for note in plan.notes():
        options.say(f"note: {note}", err=True)
    with terminal.progress("sampling", 1) as meter:
        grid = plan.make(meter.show)
    options.say(f"grid      {grid}")


@app.command()
def compare(
    sources: Annotated[list[str], typer.Argument(metavar="RUN|LORA...", help=options.SOURCES)],
    base: Annotated[str | None, options.base_option("the first run's, or the one named in the file")] = None,
    step: options.SavedSteps = None,
    strengths: options.Strengths = None,
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    seeds: options.Seeds = None,
    steps: Annotated[str | None, typer.Option(help="Sampling steps, such as 15,25.")] = None,
    guidance: Annotated[str | None, typer.Option(help="Guidance scales (CFG), such as 5,7.5.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="diffusers schedulers, such as DDIMScheduler,EulerDiscreteScheduler.")
    ] = None,
    size: options.Size = None,
    image: options.StartImage = None,
    denoise: options.Denoise = None,
    scores: Annotated[
        bool, typer.Option("--scores", help="Score each column: style gained, and content kept.")
    ] = False,
    features: options.Features = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output folder; images that it already has are not drawn again.",
            show_default="samples/compare- and the names",
        ),
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Draw runs, saved steps, LoRA files and settings in one grid, and list and plot their losses."""
    weights = options.parse_numbers(strengths, float, "--strengths")
    settings = options.sample_settings(prompt, prompts, seeds, strengths=weights)
    given = {
        "steps": options.parse_numbers(steps, int, "--steps"),
        "guidance": options.parse_numbers(guidance, float, "--guidance"),
        "scheduler": scheduler and [name.strip() for name in scheduler.split(",")],
    }
    axes = {name: list(dict.fromkeys(values)) for name, values in given.items() if values}
    for name, values in axes.items():
        for value in values:
            options.sample_settings(None, None, None, **{name: value})
    pixels, saved = options.parse_size(size), options.parse_steps(step)
    start = options.parse_start(image, denoise)
    options.check_sources(sources, base=base, has_steps=bool(saved))
    from sdlora.evaluation.compare import draw_comparison, plan_comparison
    from sdlora.report.terminal import Terminal
    from sdlora.sampling.session import SampleRequest

    terminal = Terminal(quiet=as_json)
    request = SampleRequest(base, saved, out, pixels, force, terminal.warn, settings, axes, start)
    plan = plan_comparison(sources, request)
    for note in plan.notes():
        options.say(f"note: {note}", err=True)
    with terminal.progress("sampling", 1) as meter:
        result = draw_comparison(plan, meter.show, scores=scores or features is not None, features=features)
    if as_json:
        options.print_json(result.to_json())
    else:
        options.say("\n".join(result.lines()))
