"""Fetching from a hub: its HTTP interface on this machine, spoken to by huggingface_hub itself."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from safetensors.torch import load_file, save_file

from sdlora.models.folder import BUILTIN

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "someone/small-base"
STEM = "diffusion_pytorch_model"


class Hub(BaseHTTPRequestHandler):
    """One repository, at one commit."""

    def __init__(self, folder: Path, asked: list[tuple[str, str | None]], *parts: object) -> None:
        self.folder, self.asked = folder, asked
        super().__init__(*parts)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        path = path.removeprefix("datasets/").replace("api/datasets/", "api/models/")
        files = {
            str(file.relative_to(self.folder)): file for file in self.folder.rglob("*") if file.is_file()
        }
        if path == f"api/models/{ID}/revision/main":
            content = json.dumps(
                {"id": ID, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            )
            return self._send(content.encode(), body=body)
        if path == f"api/models/{ID}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)}
                for name, file in files.items()
            ]
            return self._send(json.dumps(tree).encode(), body=body)
        name = path.removeprefix(f"{ID}/resolve/{COMMIT}/")
        if name not in files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if name != path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if body:
            self.asked.append((name, self.headers.get("authorization")))
        return self._send(files[name].read_bytes(), body=body, etag=_etag(files[name]))

    def _send(self, content: bytes, *, body: bool, etag: str = "x") -> None:
        self.send_response(200)
        for name, value in {
            "ETag": f'"{etag}"',
            "X-Repo-Commit": COMMIT,
            "Content-Length": len(content),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(copy_folder: Callable[..., Path], tmp_path: Path) -> Iterator[tuple[Path, Callable[..., list[str]]]]:
    """A repository's folder, and what inspecting it as a base fetches; the cache starts empty."""
    folder = copy_folder(BUILTIN, "repository")
    asked: list[tuple[str, str | None]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_secret",
    }

    def fetch(**settings: str) -> list[str]:
        asked.clear()
        code = (
            "from sdlora.config import BaseSection; from sdlora.models.info import inspect_base;"
            f"print(inspect_base(BaseSection(source={ID!r}, **{settings!r})).path)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith(COMMIT)
        assert {token for _, token in asked} <= {"Bearer hf_secret"}
        return [name for name, _ in asked]

    yield folder, fetch
    server.shutdown()
    server.server_close()


def test_plain_files_are_fetched_once(hub: tuple[Path, Callable[..., list[str]]]) -> None:
    """R-40: no other precision, no other framework, with the user's token; the second time nothing."""
    folder, fetch = hub
    for name in (f"unet/{STEM}.fp16.safetensors", f"vae/{STEM}.bin", "README.md", "base.safetensors"):
        (folder / name).write_bytes(b"not to be fetched")
    fetched = fetch()
    assert sorted(name for name in fetched if name.endswith(".safetensors")) == [
        "text_encoder/model.safetensors",
        f"unet/{STEM}.safetensors",
        f"vae/{STEM}.safetensors",
    ]
    assert all(name.endswith((".json", ".txt", ".safetensors")) for name in fetched)
    assert fetch() == []


def test_the_precision_that_is_there_or_asked_for(hub: tuple[Path, Callable[..., list[str]]]) -> None:
    """R-40: of each part what the hub has; base.variant comes first."""
    folder, fetch = hub
    plain = folder / f"unet/{STEM}.safetensors"
    plain.rename(plain.with_suffix(".fp16.safetensors"))
    (folder / f"unet/{STEM}.bf16.safetensors").symlink_to(plain.with_suffix(".fp16.safetensors").resolve())
    # With other bytes, or the hub's cache would know them.
    save_file(
        load_file(folder / f"vae/{STEM}.safetensors"), folder / f"vae/{STEM}.fp16.safetensors", {"a": "b"}
    )
    assert sorted(name for name in fetch(variant="bf16") if name.endswith(".safetensors")) == [
        "text_encoder/model.safetensors",
        f"unet/{STEM}.bf16.safetensors",
        f"vae/{STEM}.safetensors",
    ]
    # Plain files in the cache are no reason to leave what was asked for on the hub.
    assert f"vae/{STEM}.fp16.safetensors" in fetch(variant="fp16")
