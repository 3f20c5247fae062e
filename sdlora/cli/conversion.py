"""`sdlora extract` and `sdlora merge-into-base`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdlora.cli.tree import Force


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command()(extract)
    app.command("merge-into-base")(merge_into_base)


def extract(
    tuned: Annotated[
        str,
        typer.Argument(metavar="TUNED", help="A fine-tuned base: a folder, a .safetensors file, a hub id."),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    base: Annotated[str, typer.Option(help="The base that it was made of.")],
    rank: Annotated[int, typer.Option(help="Of each module; `sdlora resize` makes it smaller later.")] = 32,
    targets: Annotated[
        str, typer.Option(help="Such as attention, all-linear, all, or patterns; commas between them.")
    ] = "all-linear",
    text_encoder: Annotated[
        bool, typer.Option("--text-encoder", help="What changed in text encoders, too.")
    ] = False,
    format: Annotated[str, typer.Option(help="diffusers, or kohya for A1111, Forge, ComfyUI.")] = "diffusers",
    precision: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
) -> None:
    """Write the LoRA that is nearest to what fine-tuning changed in a base."""
    from sdlora.config import load_config

    keys = {"export.formats": [format], "export.precision": precision}
    config = load_config(None, {**keys, "lora.rank": rank, "lora.targets": targets.split(",")})
    from sdlora.export.export import check_out, export_adapter
    from sdlora.export.extract import extract as find
    from sdlora.report.terminal import Terminal

    check_out(out, [Path(tuned), Path(base)])
    with Terminal().progress("modules", 1) as meter:
        adapter, report = find(
            tuned,
            base,
            rank=config.lora.rank,
            targets=config.lora.targets,
            text_encoder=text_encoder,
            progress=meter.show,
        )
    settings = config.export
    written = export_adapter(adapter, out, dialect=settings.formats[0], precision=settings.precision)
    for line in (*report.lines(), *written.lines()):
        typer.echo(line)


def merge_into_base(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|LORA", help="A run folder, or a LoRA file of any dialect.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; a file where the base is one.")],
    base: Annotated[
        str | None, typer.Option(help="The base.", show_default="the one that the file names")
    ] = None,
    strength: Annotated[float, typer.Option(help="Of the LoRA.")] = 1.0,
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32.", show_default="as the base")] = None,
    force: Force = False,
) -> None:
    """Write a base that draws like a LoRA, with all it stands on; the base itself is only read."""
    from sdlora.cli.values import note_newest
    from sdlora.config import load_config

    if dtype is not None:
        load_config(None, {"export.precision": dtype})
    from sdlora.export.merge_into_base import merge_into_base as write
    from sdlora.models.dtypes import DTYPES
    from sdlora.report.terminal import Terminal
    from sdlora.sampling.session import base_of
    from sdlora.tree.lineage import load_path

    note_newest(source)
    warn = Terminal().warn
    *below, top = load_path(source, force=force, warn=warn)
    stack = [*((step.adapter, step.ancestor.strength) for step in below), (top.adapter, strength)]
    name = base or base_of(top.file, top.adapter.notes)
    place = write(stack, name, out, dtype=DTYPES[dtype] if dtype else None, warn=warn)
    typer.echo(f"wrote     {place}")
