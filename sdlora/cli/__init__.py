"""The command line: parse, call, print."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import typer
from typer.core import TyperGroup

from sdlora.cli.mistakes import describe_usage
from sdlora.cli.options import say
from sdlora.cli.processes import STOP_SECONDS, speaks_for_host, wait_for_first
from sdlora.errors import ProcessLost, RunStopped, SdloraError, shorten

# The help lists commands in this order, under these titles.
PANELS = {
    "Train": ("train", "resume", "doctor", "caption", "settings", "cache"),
    "Look and choose": ("sample", "compare", "evaluate", "advise-rank", "report", "studio"),
    "LoRA files": ("info", "export", "merge", "merge-into-base", "resize", "spectrum", "extract", "tree"),
}


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [name for names in PANELS.values() for name in names]

    def get_command(self, ctx: Any, name: str) -> Any:
        command: Any = super().get_command(ctx, name)
        for title, names in PANELS.items():
            if name in names:
                command.rich_help_panel = title
        return command


app = typer.Typer(
    name="sdlora",
    cls=_Commands,
    help="Train style LoRAs for Stable Diffusion from an image folder.",
    epilog="Mistakes are reported in one line, with exit code 2; add --debug for the traceback.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        say(f"sdlora {version('sdlora')}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None: ...


# The modules of this folder add their commands to `app`.
for module in iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")


STOPPED = 130  # what Typer returns after Ctrl-C
# Typer exports one of its usage errors; this is their common parent.
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


def _call(arguments: list[str]) -> int | None:
    """Runs a command; a path that the system refuses counts as a mistake of the user."""
    try:
        code: int | None = app(arguments, prog_name="sdlora", standalone_mode=False)
    except OSError as error:
        if error.filename is None:
            raise
        path = shorten(os.fsdecode(error.filename2 or error.filename))
        raise SdloraError(f"cannot use {path}: {error.strerror}; use another path", key="path") from error
    return code


def main() -> None:
    """Entry point of the command `sdlora`.

    Exit codes: 0 done, 1 failed, 2 a mistake in the command or its input, 130 or 143 stopped by a signal.
    """
    # For torch, on Linux: large tensors in huge pages, so that new memory costs a CPU less.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        code = _call([argument for argument in arguments if argument != "--debug"])
        if code == STOPPED:
            say("sdlora: stopped", err=True)
        raise SystemExit(code or 0)
    except USAGE_ERROR as error:
        if debug:
            raise
        if text := describe_usage(error, arguments):
            say(f"sdlora: {text}", err=True)
        raise SystemExit(2) from None
    except SdloraError as error:
        if debug:
            raise
        if isinstance(error, RunStopped) and not speaks_for_host():
            # Every process raises this; one prints it.
            wait_for_first(error.exit_code, STOP_SECONDS)
            raise SystemExit(error.exit_code) from None
        if not (isinstance(error, ProcessLost) and not error.is_explained):
            wait_for_first(error.exit_code)
        for line in str(error).splitlines():
            say(f"sdlora: {line}", err=True)
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, typer.Abort):
        # Typer turns the end of the input, where it asks something, into the second.
        if debug:
            raise
        say("sdlora: stopped", err=True)
        raise SystemExit(STOPPED) from None
