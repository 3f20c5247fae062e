"""`sdlora export`, `sdlora extract` and `sdlora merge-into-base`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdlora.cli import app, options
from sdlora.errors import ConfigError


@app.command()
def export(
    source: options.Source,
    out: Annotated[Path | None, typer.Option(help="Output file.")] = None,
    format: options.Dialect = "diffusers",
    precision: options.Precision = "fp16",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload a run's adapters and model card.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load the file into a fresh diffusers pipeline and compare.")
    ] = False,
    base: Annotated[str | None, options.base_option("the one named in the file")] = None,
    step: Annotated[
        int | None, typer.Option(help="A saved step of the run.", show_default="the final one")
    ] = None,
) -> None:
    """Convert a LoRA to another dialect or precision, or upload it to the Hugging Face Hub."""
    dialect, dtype = options.export_settings(format, precision)
    if out is None and push_to_hub is None and not verify:
        problem = "--out FILE, --push-to-hub REPO or --verify is required; pass at least one"
        raise ConfigError(problem, key="option--out")
    if base is not None and not verify:
        raise ConfigError(f"--base {base} has no effect without --verify; remove it", key="option--base")
    if step is not None and out is None:
        raise ConfigError(f"--step {step} requires --out FILE; pass both", key="option--step")
    if step is None:
        options.find_adapters(source)
    from sdlora.export.export import export_adapter, push_run
    from sdlora.formats.files import resolve_adapter

    if out is not None:
        report = export_adapter(source, out, dialect=dialect, precision=dtype, step=step)
        options.say("\n".join(report.lines()))
    if verify:
        from sdlora.export.postflight import verify_export

        saved = source if step is None else resolve_adapter(source, step).file
        options.say(f"verified  {verify_export(saved, out, base)}")
    if push_to_hub is not None:
        options.say(f"uploaded  {push_run(source, push_to_hub)}")


@app.command()
def extract(
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="A fine-tuned model: a folder, a file, a Hugging Face id.")
    ],
    out: options.Out,
    base: Annotated[str, typer.Option(help="The base model that it was fine-tuned from.")],
    rank: Annotated[int, typer.Option(help="Rank of each module; `sdlora resize` reduces it later.")] = 32,
    targets: Annotated[
        str, typer.Option(help="attention, all-linear, all, or module patterns, separated by commas.")
    ] = "all-linear",
    text_encoder: Annotated[bool, typer.Option("--text-encoder", help="Also the text encoders.")] = False,
    format: options.Dialect = "diffusers",
    precision: options.Precision = "fp16",
) -> None:
    """Extract a LoRA from a fine-tuned model: the closest of a rank to the change in its weights."""
    from sdlora.config import load_config

    dialect, dtype = options.export_settings(format, precision)
    lora = load_config(None, {"lora.rank": rank, "lora.targets": targets.split(",")}).lora
    from sdlora.export.export import check_out, export_adapter
    from sdlora.export.extract import extract as find
    from sdlora.report.terminal import Terminal

    check_out(out, [Path(tuned), Path(base)])
    with Terminal().progress("modules", 1) as meter:
        adapter, report = find(
            tuned, base, rank=lora.rank, targets=lora.targets, text_encoder=text_encoder, progress=meter.show
        )
    written = export_adapter(adapter, out, dialect=dialect, precision=dtype)
    options.say("\n".join([*report.lines(), *written.lines()]))


@app.command()
def merge_into_base(
    source: options.Source,
    out: Annotated[Path, typer.Option(help="Output folder, or file if the base is a file.")],
    base: Annotated[str | None, options.base_option("the run's, or the one named in the file")] = None,
    strength: Annotated[float, typer.Option(help="Strength of the LoRA.")] = 1.0,
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32; default: that of the base.")] = None,
    force: options.Force = False,
) -> None:
    """Merge a LoRA and its parents into a copy of the base."""
    if dtype is not None:
        _, dtype = options.export_settings("diffusers", dtype)
    from sdlora.dtypes import DTYPES
    from sdlora.export.merge_into_base import merge_into_base as write
    from sdlora.report.terminal import Terminal
    from sdlora.runs import RunFolder
    from sdlora.sampling.session import base_of
    from sdlora.tree.lineage import load_path

    options.find_adapters(source)
    if base is None and (run := RunFolder(source)).exists:
        base = run.read_config().base.source
    warn = Terminal().warn
    *below, top = load_path(source, force=force, warn=warn)
    stack = [*((step.adapter, step.ancestor.strength) for step in below), (top.adapter, strength)]
    name = base or base_of(top.file, top.adapter.notes)
    options.say(f"wrote     {write(stack, name, out, dtype=DTYPES[dtype] if dtype else None, warn=warn)}")
