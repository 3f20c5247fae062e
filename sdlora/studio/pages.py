"""What all pages share: templates, forms, errors and images."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from jinja2 import Environment, PackageLoader
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from sdlora.errors import RunError, SdloraError
from sdlora.runs import RunFolder
from sdlora.studio.ratings import read_samples

STRIP_TILES, STRIP_PX = 4, 96
Form = Mapping[str, str]
Handler = Callable[..., Response]

_templates = Environment(
    loader=PackageLoader("sdlora.studio"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def ago(moment: float) -> str:
    """How long ago a time was, roughly."""
    seconds = max(0.0, time.time() - moment)
    for unit, size in (("day", 86400), ("hour", 3600), ("min", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 and unit != 'min' else ''} ago"
    return "just now"


def duration(seconds: float | None) -> str:
    """A time span as minutes and seconds, or as hours and minutes."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes}:{rest:02}"


_templates.filters |= {"ago": ago, "duration": duration, "path": quote}


def render(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    """A page; 304 if the browser, which asks again every second or so, has it already."""
    body = _templates.get_template(template).render(values, url=request.url).encode()
    return _send(request, body, "text/html", "no-cache", status)


def _send(request: Request, body: bytes, kind: str, cache: str, status: int = 200) -> Response:
    tag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
    headers = {"etag": tag, "cache-control": cache}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, status, headers, kind)


def posted(handler: Handler) -> Callable[[Request], Any]:
    """A handler that gets the fields of a form, outside the event loop."""

    async def answer(request: Request) -> Response:
        text = (await request.body()).decode("utf-8", "replace")
        fields = {key: values[-1] for key, values in parse_qs(text, max_num_fields=1000).items()}
        return await run_in_threadpool(handler, request, fields)

    return answer


def show_error(request: Request, error: Exception) -> Response:
    """An SdloraError as a page, or as JSON for a script."""
    assert isinstance(error, SdloraError)
    status = 404 if "run.missing" in error.keys or "data.image-gone" in error.keys else 409
    if "application/json" in request.headers.get("accept", ""):
        return JSONResponse({"error": str(error)}, status)
    return render(request, "error.html", status, lines=str(error).splitlines())


def go(place: str) -> Response:
    return RedirectResponse(place, 303)


def send_image(request: Request, data: bytes, kind: str = "image/webp", seconds: int = 0) -> Response:
    """Bytes of an image, which the browser keeps until they change; it does not ask for some seconds."""
    return _send(request, data, kind, f"private, max-age={seconds}")


def send_png(request: Request, run: RunFolder, file: Path) -> Response:
    """A PNG file of a run."""
    return send_image(request, check_inside(run, file).read_bytes(), "image/png")


def check_inside(run: RunFolder, file: Path) -> Path:
    """A file of a run, of the ending it is named with; raises a RunError for a link out of it."""
    path = file.resolve()
    if not path.is_relative_to(run.path) or path.suffix != file.suffix or not path.is_file():
        raise RunError(f"{run.name} has no {file.name} there", key="run.missing")
    return path


def encode_image(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), "WEBP", quality=86, method=3)
    return buffer.getvalue()


@lru_cache(maxsize=4096)
def draw_strip(path: Path, step: int, changed: int) -> bytes | None:
    """The first samples of a grid at its largest strength, in a row; None without any."""
    samples = read_samples(RunFolder(path), step)
    strongest = max((sample.strength for sample in samples), default=0.0)
    chosen = [sample for sample in samples if sample.strength == strongest][:STRIP_TILES]
    if not chosen:
        return None
    strip = Image.new("RGB", (STRIP_TILES * STRIP_PX, STRIP_PX), "white")
    for number, sample in enumerate(chosen):
        with Image.open(sample.file, formats=("PNG",)) as image:
            tile = image.convert("RGB").resize((STRIP_PX, STRIP_PX), Image.Resampling.LANCZOS)
        strip.paste(tile, (number * STRIP_PX, 0))
    return encode_image(strip.crop((0, 0, len(chosen) * STRIP_PX, STRIP_PX)))
