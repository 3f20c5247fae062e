"""`sdlora train` and `sdlora resume`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdlora.cli.processes import heed_schedulers, is_first
from sdlora.cli.tree import Force

if TYPE_CHECKING:
    from sdlora.runs import RunFolder

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[section.key=value]...", help="Settings, such as lora.rank=8; `sdlora settings` lists them."
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command()(train)
    app.command()(resume)


def train(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A folder of captioned images.")],
    overrides: Overrides = None,
    base: Annotated[
        str | None,
        typer.Option(help="builtin, a folder, a .safetensors file or a hub id.", show_default="builtin"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file; presets are in configs/.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder.", show_default="runs/ and the image folder's name")
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="Words that call the style.")] = None,
    parent: Annotated[
        str | None,
        typer.Option(metavar="FILE|RUN|NODE", help="A LoRA to train on top of, with all it stands on."),
    ] = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Train a style LoRA on an image folder."""
    from sdlora.cli.values import check_base
    from sdlora.config import load_config
    from sdlora.runs import RunFolder

    heed_schedulers()
    # Settings, folder and base are checked before torch is imported.
    settings = load_config(config, overrides or [], images=images)
    if parent is not None:
        settings = settings.replace(lora={"parent": parent})
    if force:
        settings = settings.replace(lora={"force_parent": True})
    if out is not None:
        RunFolder(out).check_free()
    chosen = settings if base is None else settings.replace(base={"source": base})
    check_base(chosen.base, chosen.objective)
    from sdlora.training.train import train as start

    run = start(images, base=base, out=out, trigger=trigger, config=settings, dry_run=dry_run)
    if not dry_run:
        _print_result(run)


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
    overrides: Overrides = None,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="What may be another than in the checkpoint, such as dataset."),
    ] = None,
) -> None:
    """Go on with a run that was stopped, or make a finished one longer."""
    from sdlora.config import load_config
    from sdlora.runs import RunFolder

    heed_schedulers()
    RunFolder.open(run)
    load_config(None, overrides or [])
    from sdlora.training.train import resume as go_on

    _print_result(go_on(run, overrides or [], allow_changed=allow_changed or ()))


def _print_result(run: RunFolder) -> None:
    if not is_first():
        return
    grids = sorted(run.samples.glob("*/grid.png"))
    typer.echo(f"adapter   {run.adapter}")
    if grids:
        typer.echo(f"grid      {grids[-1]}")
    if run.loss_curve.is_file():
        typer.echo(f"losses    {run.loss_curve}")
    if parent := run.read_config().lora.parent:
        typer.echo(
            f"stands on {parent}: `sdlora sample {run.path}` shows both, `sdlora tree flatten` joins them"
        )
    else:
        if (kohya := run.final_adapter("kohya")).is_file():
            typer.echo(f"for UIs   {kohya} (A1111, Forge, ComfyUI)")
        typer.echo(f'load it   pipe.load_lora_weights("{run.adapter}")')
