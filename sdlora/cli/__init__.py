"""The command line: parse, call, print."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from sdlora.cli import conversion, files, look, rank, settings, train, tree
from sdlora.cli.processes import STOP_SECONDS, speaks_for_host, wait_for_first
from sdlora.errors import ProcessLost, RunStopped, SdloraError, shorten

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


# Typer exports none of its usage errors but this one; they have one parent.
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


def describe_usage(error: Any) -> str:
    """One line for a command that cannot be parsed; empty where the help was printed instead."""
    from sdlora.config import RunConfig
    from sdlora.problems import guess_key

    option = getattr(error, "option_name", "")
    if guess := guess_key(option, RunConfig):
        return f"{option} is no option; {guess}"
    text = " ".join(error.format_message().split())
    command = error.ctx.command_path if error.ctx else "sdlora"
    return f"{text.rstrip('.')}; see `{command} --help`" if text else ""


def _call(arguments: list[str]) -> int | None:
    """Runs a command; a path that the system refuses is a mistake in what was asked, wherever it is met."""
    try:
        code: int | None = app(arguments, prog_name="sdlora", standalone_mode=False)
    except OSError as error:
        if error.filename is None:
            raise
        path = shorten(os.fsdecode(error.filename2 or error.filename))
        raise SdloraError(f"{path} cannot be used: {error.strerror}; give another path") from error
    return code


def main() -> None:
    """Runs a command; the exit code says how it went."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        code = _call([argument for argument in arguments if argument != "--debug"])
        raise SystemExit(code or 0)
    except USAGE_ERROR as error:
        if debug:
            raise
        if text := describe_usage(error):
            typer.echo(f"sdlora: {text}", err=True)
        raise SystemExit(2) from None
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
