"""Runs as training leaves them, and the studio of a folder: in this process, and as a server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image, PngImagePlugin
from starlette.testclient import TestClient

from sdlora.config import load_config
from sdlora.runs import RunFolder
from sdlora.studio.app import create_app
from tests.checks import HANG_SECONDS

OWN = {"origin": "http://localhost"}


def add_steps(run: RunFolder, first: int, last: int) -> None:
    """Events of training steps, whose loss falls."""
    for step in range(first, last + 1):
        loss = 0.5 / step
        run.append("step", step, loss=loss, loss_ema=loss + 0.1, learning_rate=1e-4, memory_mb=700.0)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """An empty folder of runs."""
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def make_run(runs: Path) -> Callable[..., RunFolder]:
    """Makes a run of 10 steps as training leaves it: `make_run("name", done=10, grid=10, images=folder)`."""

    def make(name: str = "style", done: int = 10, grid: int = 0, images: Path | str = "") -> RunFolder:
        config = load_config(images=images, overrides={"train.steps": 10})
        run = RunFolder.create(runs / name, config, {"base_dtype": "fp32"})
        run.append("plan", 0, steps=10, steps_per_epoch=4, global_batch=1, images=4, heldout_images=0)
        add_steps(run, 1, done)
        if done == 10:
            run.append("done", 10, loss_ema=0.1)
        if grid:
            draw_grid(run, grid)
        return run

    return make


def draw_grid(run: RunFolder, step: int) -> None:
    """A grid of two prompts at strengths 0, 0.5 and 1."""
    folder = run.sample_folder(step)
    folder.mkdir(parents=True)
    cells = [(prompt, strength) for prompt in ("a fox", "a cat") for strength in (0.0, 0.5, 1.0)]
    for number, (prompt, strength) in enumerate(cells):
        notes = PngImagePlugin.PngInfo()
        notes.add_text("sdlora", json.dumps({"prompt": prompt, "seed": 0, "strength": strength}))
        image = Image.new("RGB", (64, 64), (40 * number, 120, round(200 * strength)))
        image.save(folder / f"{number:02d}.png", pnginfo=notes)
    Image.new("RGB", (400, 200), "white").save(folder / "grid.png")


@pytest.fixture
def client(runs: Path) -> Callable[..., TestClient]:
    """A browser without scripts, on localhost."""

    def open_studio(*images: Path, token: str | None = None) -> TestClient:
        return TestClient(
            create_app(runs, images, token), "http://localhost", headers=OWN, raise_server_exceptions=True
        )

    return open_studio


@pytest.fixture
def serve(runs: Path) -> Iterator[Callable[..., str]]:
    """Serves the studio on a free port of this machine; returns its address."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(*images: Path) -> str:
        app: Any = create_app(runs, images)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        for _ in range(HANG_SECONDS * 20):
            if server.started:
                break
            time.sleep(0.05)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.should_exit = server.force_exit = True
        thread.join()
