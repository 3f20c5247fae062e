"""The command line: parse, call, print."""

from __future__ import annotations

import sys

import typer

from sdlora.cli import conversion, files, look, rank, settings, train, tree
from sdlora.cli.processes import STOP_SECONDS, speaks_for_host, wait_for_first
from sdlora.errors import ProcessLost, RunStopped, SdloraError

app = typer.Typer(
    name="sdlora",
    help="Train style LoRAs for Stable Diffusion from an image folder.",
    epilog="Every command: --help. A mistake is one line and exit code 2; add --debug for the trace.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"sdlora {version('sdlora')}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
    ),
) -> None: ...


train.register(app)
settings.register(app)
look.register(app)
files.register(app)
rank.register(app)
tree.register(app)
conversion.register(app)


def main() -> None:
    """Runs a command; the exit code says how it went."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app([argument for argument in arguments if argument != "--debug"], prog_name="sdlora")
    except SdloraError as error:
        if debug:
            raise
        if isinstance(error, RunStopped) and not speaks_for_host():
            # All have met this, so one tells it.
            wait_for_first(error.exit_code, STOP_SECONDS)
            raise SystemExit(error.exit_code) from None
        if not (isinstance(error, ProcessLost) and not error.is_told):
            wait_for_first(error.exit_code)
        for line in str(error).splitlines():
            typer.echo(f"sdlora: {line}", err=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if debug:
            raise
        typer.echo("sdlora: stopped", err=True)
        raise SystemExit(130) from None
