"""The pages of the studio and their addresses.

Starlette, uvicorn and Jinja, since they are small, long-lived and easily tested: each page is HTML that the
server renders, a script of one file keeps it fresh, and nothing comes from another host. Pages ask again
every second while they are seen: a stream would hold, per tab, one of the six connections of a browser.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from sdlora.errors import ConfigError, DataError, SdloraError
from sdlora.evaluation.tiles import describe_ratings, read_choice
from sdlora.export.webui import webui_prompt
from sdlora.runs import RunFolder
from sdlora.studio.captions import ImageFolder
from sdlora.studio.guard import Guard
from sdlora.studio.launch import Launcher, address_of, presets
from sdlora.studio.library import Library, list_grids, read_end, read_object
from sdlora.studio.pages import (
    Form,
    check_inside,
    draw_strip,
    encode_image,
    go,
    posted,
    render,
    send_image,
    send_png,
    show_error,
)
from sdlora.studio.progress import Progress
from sdlora.studio.sample_pages import SamplePages

MAX_FOLLOWED = 32
LOG_LINES = 40
MAX_STRENGTH = 100
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
)


def create_app(folder: Path, images: Sequence[Path] = (), token: str | None = None) -> Starlette:
    """The studio of the runs below a folder, as an ASGI application.

    Args:
        folder: The runs; new ones are started here.
        images: Image folders to offer beside those that the runs use.
        token: Asked of every visitor; None where only this machine can connect.
    """
    studio = Studio(Library(folder, images))
    app = Starlette(routes=studio.routes(), exception_handlers={SdloraError: show_error})
    app.add_middleware(Guard, token=token)
    return app


class Studio:
    """What answers requests."""

    def __init__(self, library: Library) -> None:
        self.library, self.launcher = library, Launcher(library)
        self._followed: OrderedDict[Path, Progress] = OrderedDict()

    def routes(self) -> list[Route | Mount]:
        samples = SamplePages(self.library)
        pages = {"/": self.runs, "/run/{name:path}": self.run, "/grid/{name:path}": self.grid}
        pages |= {"/scores/{name:path}": self.scores, "/strip/{name:path}": self.strip}
        pages |= {"/new": self.new, "/images": self.image_folders}
        pages |= {
            "/images/{folder}": self.images,
            "/thumb/{folder}/{name:path}": self.thumb,
            **samples.pages(),
        }
        pages |= {"/report/{name:path}": self.report, "/lora/{name:path}": self.lora}
        forms = {"/plan": self.plan, "/start": self.start, "/stop/{name:path}": self.stop}
        forms |= {f"/{what}/{{name:path}}": partial(self.ask, what) for what in ("save", "sample")}
        forms |= {"/resume/{name:path}": self.resume, "/prune/{name:path}": self.prune}
        forms |= {
            "/captions/{folder}": self.write_captions,
            "/undo/{folder}": self.undo,
            **samples.forms(),
        }
        static = StaticFiles(directory=Path(__file__).parent / "static")
        return [
            *(Route(path, handler, methods=["GET"]) for path, handler in pages.items()),
            *(Route(path, posted(handler), methods=["POST"]) for path, handler in forms.items()),
            Mount("/static", static),
        ]

    def runs(self, request: Request) -> Response:
        self.launcher.reap()
        return render(request, "runs.html", runs=self.library.list_runs(), folder=self.library.folder)

    def run(self, request: Request) -> Response:
        run = self.library.run(request.path_params["name"])
        seen, progress = self.library.overview(run), self._follow(run)
        config = read_object(run.config_file)
        # Past this size, the log is read from its end.
        is_told = run.log_file.is_file() and not (seen.problem and run.output_file.is_file())
        log = read_end(run.log_file if is_told else run.output_file)
        grids = list_grids(run)
        wanted = request.query_params.get("grid", "")
        chosen = int(wanted) if wanted.isdecimal() and int(wanted) in grids else next(iter(grids), None)
        return render(
            request,
            "run.html",
            run=seen,
            is_stopping=self.launcher.is_stopping(run),
            asked=self.launcher.asked(run),
            again=urlencode(self.launcher.form_of(run)) if seen.state != "running" else "",
            lora=_describe_lora(run),
            is_builtin=isinstance(base := config.get("base"), dict) and base.get("source") == "builtin",
            progress=progress,
            eta=progress.eta_seconds(seen.steps) if seen.state == "running" and seen.step else None,
            grids=grids,
            grid=chosen,
            log="\n".join(log.splitlines()[-LOG_LINES:]),
            images=address_of(seen.images),
            disk=sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file()),
            checkpoints=run.checkpoint_steps(),
            checkpoint_bytes=sum(f.stat().st_size for f in run.checkpoints.rglob("*") if f.is_file()),
            saved=run.saved_steps(),
            choice=read_choice(run),
            ratings=describe_ratings(run),
            has_scores=run.evaluation_curve.is_file(),
            config=config,
        )

    def _follow(self, run: RunFolder) -> Progress:
        """The progress of a run, of which only what is new is read."""
        progress = self._followed.pop(run.path, None) or Progress(run.events_file)
        self._followed[run.path] = progress
        while len(self._followed) > MAX_FOLLOWED:
            self._followed.popitem(last=False)
        return progress.update()

    def grid(self, request: Request) -> Response:
        run, step = self.library.run(request.path_params["name"]), request.query_params.get("step", "")
        return send_png(request, run, run.sample_folder(int(step) if step.isdecimal() else 0) / "grid.png")

    def scores(self, request: Request) -> Response:
        run = self.library.run(request.path_params["name"])
        return send_png(request, run, run.evaluation_curve)

    def report(self, request: Request) -> Response:
        run = self.library.run(request.path_params["name"])
        file = check_inside(run, run.report)
        # One file with its own style and script, shut off from all else.
        return FileResponse(file, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})

    def lora(self, request: Request) -> Response:
        """The file for other programs, to download."""
        run = self.library.run(request.path_params["name"])
        file = next(iter(sorted(run.webui.glob("*.safetensors"))), run.webui / "nothing")
        return FileResponse(check_inside(run, file), filename=file.name)

    def strip(self, request: Request) -> Response:
        run = self.library.run(request.path_params["name"])
        step, grid = next(iter(list_grids(run).items()), (0, None))
        strip = draw_strip(run.path, step, grid.stat().st_mtime_ns) if grid else None
        return Response(status_code=404) if strip is None else send_image(request, strip)

    def new(self, request: Request) -> Response:
        values = dict(request.query_params)
        return render(
            request,
            "new.html",
            folders=self.library.image_folders(),
            settings=list(self.launcher.settings.values()),
            presets=presets(),
            values=values,
        )

    def plan(self, request: Request, form: Form) -> Response:
        try:
            plan = self.launcher.plan(form)
        except ConfigError as error:
            return render(request, "plan.html", 200, problems=error.problems, form=form)
        return render(request, "plan.html", plan=plan, form=form)

    def start(self, request: Request, form: Form) -> Response:
        return self._go_to(self.launcher.start(form))

    def stop(self, request: Request, form: Form) -> Response:
        run = self.library.run(request.path_params["name"])
        self.launcher.stop(run)
        return self._go_to(run)

    def ask(self, what: str, request: Request, form: Form) -> Response:
        run = self.library.run(request.path_params["name"])
        self.launcher.ask(run, what)
        return self._go_to(run)

    def resume(self, request: Request, form: Form) -> Response:
        run = self.library.run(request.path_params["name"])
        return self._go_to(self.launcher.resume(run, form.get("steps", "")))

    def prune(self, request: Request, form: Form) -> Response:
        run = self.library.run(request.path_params["name"])
        self.launcher.prune(run)
        return self._go_to(run)

    def _go_to(self, run: RunFolder) -> Response:
        return go(f"/run/{quote(self.library.name_of(run.path))}")

    def _image_folder(self, request: Request) -> ImageFolder:
        """The image folder of an address, with the settings of the newest run that uses it."""
        name = request.path_params["folder"]
        if (path := self.library.image_folders().get(name)) is None:
            raise DataError("there is no such image folder", key="data.image-gone")
        same = (
            run.path for run in self.library.list_runs() if run.images and Path(run.images).resolve() == path
        )
        newest = next((run for run in map(RunFolder, same) if run.exists), None)
        changed = newest.config_file.stat().st_mtime_ns if newest else 0
        return _open_folder(
            path, self.library.folder / ".captions" / f"{name}.jsonl", newest and newest.path, changed
        )

    def image_folders(self, request: Request) -> Response:
        return render(request, "folders.html", folders=self.library.image_folders())

    def images(self, request: Request) -> Response:
        """A frame at once; what takes the decoding of every image when the script asks for it."""
        images, name = self._image_folder(request), request.path_params["folder"]
        if "all" not in request.query_params:
            return render(request, "images.html", folder=images.path, name=name)
        checkup, problem = None, ""
        try:
            checkup = images.check()
        except SdloraError as error:
            problem = str(error)
        return render(
            request,
            "image_set.html",
            folder=images.path,
            name=name,
            captions=images.captions(),
            checkup=checkup,
            problem=problem,
            heldout={record.name for record in checkup.index.heldout} if checkup else set(),
            edits=images.num_edits,
        )

    def thumb(self, request: Request) -> Response:
        image = self._image_folder(request).thumbnail(request.path_params["name"])
        return send_image(request, encode_image(image), seconds=600)

    def write_captions(self, request: Request, form: Form) -> Response:
        """Writes captions, given as JSON: by image, the one that was seen and the new one."""
        folder = self._image_folder(request)
        try:
            given = json.loads(form["changes"]).items()
            changes = {str(name): (str(seen), str(text)) for name, (seen, text) in given}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError("these are not captions; reload the page", key="caption.form") from None
        return JSONResponse({"captions": folder.write(changes), "edits": folder.num_edits})

    def undo(self, request: Request, form: Form) -> Response:
        folder = self._image_folder(request)
        captions, kept = folder.undo()
        return JSONResponse({"captions": captions, "edits": folder.num_edits, "kept": kept})


def _describe_lora(run: RunFolder) -> dict[str, Any]:
    """The file for other programs, and what invokes it there; empty without one."""
    file = next(iter(sorted(run.webui.glob("*.safetensors"))), None)
    if file is None:
        return {}
    notes = read_object(file.with_suffix(".json"))
    weight = notes.get("preferred weight")
    # Somebody may have edited the notes.
    strength = float(weight) if isinstance(weight, int | float) and abs(weight) < MAX_STRENGTH else 1.0
    prompt = webui_prompt(file.stem, strength, str(notes.get("activation text") or ""))
    return {"file": file, "prompt": prompt, "has_report": run.report.is_file()}


@lru_cache(maxsize=16)
def _open_folder(path: Path, journal: Path, run: Path | None, changed: int) -> ImageFolder:
    """An image folder; its base is inspected once, which takes a while."""
    if run is not None:
        with suppress(SdloraError):
            return ImageFolder(path, journal, RunFolder(run).read_config())
    return ImageFolder(path, journal)
