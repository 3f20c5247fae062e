"""`sdlora train` and `sdlora resume`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdlora.cli import app, options
from sdlora.cli.processes import heed_schedulers, is_first

if TYPE_CHECKING:
    from sdlora.runs import RunFolder


@app.command()
def train(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="A folder of images, a zip or a Hub data set.")
    ],
    overrides: options.Overrides = None,
    base: Annotated[str | None, options.base_option("builtin")] = None,
    preset: options.Preset = None,
    config: options.Config = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run folder.", show_default="runs/ and the name of IMAGES, with -2 if it is taken"
        ),
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="Trigger words for the style.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the files for UIs.", show_default="that of the run folder")
    ] = None,
    parent: Annotated[
        str | None, typer.Option(metavar="FILE|RUN|NODE", help="A LoRA to train on top of; it stays frozen.")
    ] = None,
    force: options.Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and exit.")] = False,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help='With --dry-run: plan for a GPU such as "RTX 3060 12GB", cuda:12GB.'
        ),
    ] = None,
    quiet: options.Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON and exit.")] = False,
) -> None:
    """Train a style LoRA on an image folder."""
    from sdlora.config import load_config
    from sdlora.memory.cards import check_device
    from sdlora.runs import RunFolder

    if device is not None:
        check_device(device, dry_run=dry_run or as_json)
    heed_schedulers()
    # Settings, output folder, base and images are checked before torch is imported.
    direct = {"base.source": base, "data.trigger": trigger, "lora.parent": parent, "export.name": name}
    settings = load_config(config, overrides or [], images=images, preset=preset, arguments=direct)
    if force:
        settings = settings.replace(lora={"force_parent": True})
    if out is not None:
        RunFolder(out).check_free()
    options.check_folder(settings, options.check_base(settings.base, settings.objective, settings.data))
    from sdlora.training.train import plan_run
    from sdlora.training.train import train as start

    if as_json:
        options.print_json(plan_run(settings, device).as_json())
        return
    run = start(images, base=base, out=out, config=settings, dry_run=dry_run, device=device, quiet=quiet)
    if not (dry_run or quiet):
        _print_result(run)


@app.command()
def resume(
    run: options.Run,
    overrides: options.Overrides = None,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="What may differ from the checkpoint, such as dataset."),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Continue a stopped run, or extend a finished one (with a larger train.steps)."""
    from sdlora.config import load_config
    from sdlora.runs import RunFolder

    heed_schedulers()
    RunFolder.open(run)
    load_config(None, overrides or [])
    from sdlora.training.train import resume as continue_run

    finished = continue_run(run, overrides or [], allow_changed=allow_changed or (), quiet=quiet)
    if not quiet:
        _print_result(finished)


def _print_result(run: RunFolder) -> None:
    from sdlora.export.webui import preferred_strength, webui_prompt

    if not is_first():
        return
    grids = sorted(run.samples.glob("*/grid.png"))
    options.say(f"adapter   {run.adapter}")
    if grids:
        options.say(f"grid      {grids[-1]}")
    if run.loss_curve.is_file():
        options.say(f"loss      {run.loss_curve}")
    if run.report.is_file():
        options.say(f"report    {run.report}")
    if parent := run.read_config().lora.parent:
        options.say(
            f"parent    {parent}, required at inference; `sdlora sample {run.path}` mounts both, "
            "`sdlora tree flatten` merges them into one file"
        )
    else:
        config = run.read_config()
        name = config.export.name or run.name
        if (for_uis := run.webui / f"{name}.safetensors").is_file():
            prompt = webui_prompt(name, preferred_strength(config.sample.strengths), config.data.trigger)
            place = "A1111, Forge, ComfyUI"
            if config.base.source == "builtin":
                # Nothing that they load has its shapes.
                place = f"for the built-in base alone; one of another base works in {place}"
            options.say(f"for UIs   {for_uis} ({place}); prompt: {prompt}")
        options.say(f'load it   pipe.load_lora_weights("{run.adapter}")')
