"""`sdlora info`."""

from __future__ import annotations

import typer

from sdlora.cli.options import Source


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(info)


def info(file: Source) -> None:
    """Describe a LoRA file (family, rank, alpha, targets, metadata) or the state of a run."""
    from contextlib import suppress

    from sdlora.errors import AdapterError
    from sdlora.formats.files import inspect_adapter
    from sdlora.report.summary import describe_state
    from sdlora.runs import RunFolder
    from sdlora.tree.lineage import read_lineage

    if (run := RunFolder(file)).exists:
        for line in describe_state(run):
            typer.echo(line)
    found = inspect_adapter(file)
    for line in found.lines():
        typer.echo(line)
    with suppress(AdapterError):
        if above := read_lineage(found.metadata):
            typer.echo(f"parents   {' > '.join(map(str, above))}")
