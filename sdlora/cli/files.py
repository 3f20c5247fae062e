"""`sdlora export`, `sdlora info` and `sdlora cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command()(export)
    app.command()(info)
    app.command()(cache)


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|LORA", help="A run folder, or a LoRA file of any dialect.")
    ],
    out: Annotated[Path | None, typer.Option(help="The file to write.")] = None,
    format: Annotated[str, typer.Option(help="diffusers, or kohya for A1111, Forge, ComfyUI.")] = "diffusers",
    precision: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload a run's adapters and card.")
    ] = None,
) -> None:
    """Write a LoRA in another dialect or precision, or upload it."""
    from sdlora.cli.values import note_newest
    from sdlora.config import load_config
    from sdlora.errors import ConfigError

    settings = load_config(None, {"export.formats": [format], "export.precision": precision}).export
    if out is None and push_to_hub is None:
        raise ConfigError("sdlora export needs --out FILE or --push-to-hub REPO")
    note_newest(source)
    from sdlora.export.export import export as write
    from sdlora.export.export import push_run

    if out is not None:
        report = write(source, out, dialect=settings.formats[0], precision=settings.precision)
        for line in report.lines():
            typer.echo(line)
    if push_to_hub is not None:
        typer.echo(f"uploaded  {push_run(source, push_to_hub)}")


def info(
    file: Annotated[
        Path, typer.Argument(metavar="RUN|LORA", help="A LoRA file of any dialect, or a run folder.")
    ],
) -> None:
    """Say what a LoRA file is (family, rank, alpha, targets, metadata), or how a run went."""
    from contextlib import suppress

    from sdlora.errors import AdapterError
    from sdlora.formats.files import inspect_adapter, lora_file
    from sdlora.report.summary import describe_state
    from sdlora.runs import RunFolder
    from sdlora.tree.lineage import read_lineage

    path = lora_file(file)
    if path.is_dir():
        run = RunFolder.open(path)
        for line in describe_state(run):
            typer.echo(line)
        path = run.adapter
    found = inspect_adapter(path)
    for line in found.lines():
        typer.echo(line)
    with suppress(AdapterError):
        if above := read_lineage(found.metadata):
            typer.echo(f"stands on {' > '.join(map(str, above))}")


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete what is cached.")] = False,
) -> None:
    """Show where latents and text states are cached, and how much."""
    from sdlora.data.cache import cache_folder, clear_cache, measure_cache

    folder = cache_folder()
    typer.echo(f"cache     {folder}")
    for kind, files, size in measure_cache(folder):
        typer.echo(f"{kind:<9} {files} files, {size / 1e6:.1f} MB")
    if clear:
        typer.echo(f"cleared   {clear_cache(folder) / 1e6:.1f} MB")
