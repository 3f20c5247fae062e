"""`sdlora doctor`, `sdlora info` and `sdlora cache`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdlora.cli import app, options

if TYPE_CHECKING:
    from sdlora.data.doctor import Checkup


@app.command()
def doctor(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="A folder of images, a zip or a Hub data set.")
    ],
    overrides: options.Overrides = None,
    base: Annotated[str | None, options.base_option("builtin")] = None,
    preset: options.Preset = None,
    config: options.Config = None,
    trigger: Annotated[str | None, typer.Option(help="Trigger words, as for `sdlora train`.")] = None,
    contact_sheet: Annotated[
        Path | None, typer.Option(help="Draw the crops that the model will see into this PNG file.")
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Move copies aside and remove style words from captions.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --fix, do not ask.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Undo the last --fix.")] = False,
    as_json: options.Json = False,
) -> None:
    """Check an image folder without training; exit code 1 if it has errors."""
    from sdlora.config import load_config
    from sdlora.errors import ConfigError

    options.check_png(contact_sheet, "--contact-sheet")
    arguments = {"base.source": base, "data.trigger": trigger}
    settings = load_config(config, overrides or [], images=images, preset=preset, arguments=arguments)
    if (fix or undo) and not images.is_dir():
        raise ConfigError(f"{images} is not a folder; unpack it, and repair that", key="option--fix")
    if undo:
        from sdlora.data.repairs import undo_repairs

        options.say(f"files restored: {undo_repairs(images)}")
        return
    from sdlora.training.preflight import check_folder

    checkup = check_folder(settings, contact_sheet)
    if as_json:
        options.print_json(checkup.as_json())
    else:
        options.say("\n".join(checkup.lines()))
    if fix:
        _fix(checkup, yes, quiet=as_json)
    if checkup.has_errors:
        raise typer.Exit(1)


def _fix(checkup: Checkup, is_agreed: bool, *, quiet: bool) -> None:
    """Shows what would be done, and does it once that is agreed; `quiet`: on stderr, beside JSON."""
    from sdlora.data.repairs import plan_repairs

    repairs = plan_repairs(checkup.index, checkup.findings)
    if not (lines := repairs.lines()):
        options.say("nothing to fix", err=quiet)
        return
    options.say("\n".join(lines), err=quiet)
    try:
        is_agreed = is_agreed or typer.confirm(
            f"{len(lines)} changes, which --undo takes back. Go on?", err=quiet
        )
    except typer.Abort:
        if not sys.stdin.isatty():
            options.say("\nnothing was changed, since nobody could answer; --yes agrees", err=True)
        raise
    if is_agreed:
        options.say(f"done; moved files and the old captions are in {repairs.apply()}", err=quiet)


@app.command()
def info(
    file: options.Source,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show all metadata.")] = False,
    as_json: options.Json = False,
) -> None:
    """Describe a LoRA file (family, rank, alpha, targets, metadata) or the state of a run."""
    from contextlib import suppress
    from dataclasses import asdict

    from sdlora.errors import AdapterError
    from sdlora.formats.files import inspect_adapter
    from sdlora.report.summary import describe_state
    from sdlora.runs import RunFolder
    from sdlora.tree.lineage import read_lineage

    state = describe_state(run) if (run := RunFolder(file)).exists else []
    if state and not as_json:
        options.say("\n".join(state))
    found, parents = inspect_adapter(file), []
    with suppress(AdapterError):
        parents = list(map(str, read_lineage(found.metadata)))
    if as_json:
        options.print_json({**asdict(found), "parents": parents, "run": state})
        return
    options.say("\n".join(found.lines(with_metadata=verbose)))
    if parents:
        options.say(f"parents   {' > '.join(parents)}")


@app.command()
def cache(clear: Annotated[bool, typer.Option("--clear", help="Delete all cached files.")] = False) -> None:
    """Show the location and size of the cache.

    It has latents, text states, images of the base, measures of images (looks), and unpacked archives.
    """
    from sdlora.data.cache import cache_folder, clear_cache, measure_cache

    folder = cache_folder()
    options.say(f"cache     {folder}")
    for kind, files, size in measure_cache(folder):
        options.say(f"{kind:<9} {files} files, {size / 1e6:.1f} MB")
    if clear:
        options.say(f"cleared   {clear_cache(folder) / 1e6:.1f} MB")
