"""`sdlora studio`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from sdlora.cli import app, options
from sdlora.errors import ConfigError


@app.command()
def studio(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="The folder of runs.", show_default="runs")
    ] = Path("runs"),
    images: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="An image folder to show and train on; repeatable."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Interface; others than this machine's own need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 7865,
    ask_token: Annotated[
        bool, typer.Option("--token", help="Ask for a token on this machine too, where others use it.")
    ] = False,
    browse: Annotated[bool, typer.Option("--browse", help="Open the page in a browser.")] = False,
) -> None:
    """Show runs in a live page: follow, start, stop and compare them; edit captions; try prompts."""
    import platform
    import secrets
    import webbrowser

    try:
        import uvicorn

        from sdlora.runs import RunFolder
        from sdlora.studio.app import create_app
        from sdlora.studio.guard import is_loopback
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in ("starlette", "uvicorn"):
            raise
        problem = f"the page needs {name}; install it with `pip install 'sdlora[studio]'`"
        raise ConfigError(problem, key="studio.missing") from None
    for path in (folder, *(images or [])):
        if path.is_dir() or (path == folder and not path.exists()):
            continue
        raise ConfigError(f"{path} is not a folder; use a folder of runs or of images", key="studio.folder")
    # The folder around a run shows it, among others.
    folder = folder.absolute().parent if RunFolder(folder).exists else folder
    folder.mkdir(parents=True, exist_ok=True)
    token = secrets.token_urlsafe(24) if ask_token or not is_loopback(host) else None
    with _listen(host, port) as listener:
        shown = {"0.0.0.0": platform.node(), "::": platform.node()}.get(host, host)
        shown = f"[{shown}]" if ":" in shown else shown
        address = f"http://{shown}:{listener.getsockname()[1]}/{f'?token={token}' if token else ''}"
        options.say(f"studio    {address}\nruns      {folder}, Ctrl-C stops the page; runs go on")
        if browse:
            webbrowser.open(address)
        server = uvicorn.Server(
            uvicorn.Config(create_app(folder, images or [], token), log_level="warning", access_log=False)
        )
        server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens already, before its address is printed or opened."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        problem = f"cannot listen on {host}, port {port} ({error.strerror}); use another --port"
        raise ConfigError(problem, key="option--port") from None
    return listener
