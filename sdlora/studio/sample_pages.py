"""Pages to look at samples: grids side by side, a playground, and a blind choice between two."""

from __future__ import annotations

import json
import math
import secrets
import subprocess
import sys
import threading
from collections import OrderedDict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdlora.errors import ConfigError, RunError
from sdlora.evaluation.tiles import count_wins, read_choice, read_ratings
from sdlora.runs import RunFolder
from sdlora.studio.library import Library, list_grids
from sdlora.studio.pages import Form, Handler, go, render, send_png
from sdlora.studio.ratings import CHOICES, Pair, add_rating, choose_pair, list_pairs, list_tied

MAX_PAIRS = 500
MAX_SIDES = 4
MAX_ADAPTERS = 4
MAX_SEED = 2**63


class SamplePages:
    """The pages, the pairs that are shown, and the process that draws."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._pairs: OrderedDict[str, Pair] = OrderedDict()
        self._painter: subprocess.Popen[str] | None = None
        self._painting = threading.Lock()

    def pages(self) -> dict[str, Handler]:
        return {
            "/compare": self.compare,
            "/playground": self.playground,
            "/rate": self.rate,
            "/pair/{pair}/{side:int}": self.pair,
        }

    def forms(self) -> dict[str, Handler]:
        return {"/paint": self.paint, "/rate": self.add_rating}

    def _side(self, text: str) -> tuple[RunFolder, int]:
        """The run and the step of its grid in `NAME@STEP`; the last grid without a step."""
        name, _, step = text.rpartition("@")
        if not step.isdecimal() or any(run.name == text for run in self.library.list_runs()):
            name, step = text, ""
        run = self.library.run(name)
        grids = list_grids(run)
        chosen = int(step) if step.isdecimal() else next(iter(grids), -1)
        if chosen not in grids:
            raise RunError(f"{name} has no grid{f' of step {step}' if step else ' yet'}", key="run.missing")
        return run, chosen

    def _choices(self) -> list[tuple[str, str]]:
        """Every grid of every run: its name in addresses, and for people."""
        return [
            (f"{run.name}@{step}", f"step {step} of {run.name}")
            for run in self.library.list_runs()
            for step in (list_grids(RunFolder(run.path)) if run.grid else ())
        ]

    def compare(self, request: Request) -> Response:
        asked = [side for side in request.query_params.getlist("side") if side][:MAX_SIDES]
        sides = [
            (f"{self.library.name_of(run.path)}@{step}", self.library.name_of(run.path), step)
            for run, step in map(self._side, asked)
        ]
        return render(request, "compare.html", sides=sides, choices=self._choices())

    def rate(self, request: Request) -> Response:
        asked = [side for side in request.query_params.getlist("side") if side][:2]
        sides = list(dict.fromkeys(map(self._side, asked))) if asked else []
        tied = request.query_params.get("tied", "")
        rated = self.library.run(tied) if tied else sides[0][0] if sides else None
        pairs = list_tied(rated) if tied and rated else list_pairs(sides)
        pair, found, left = "", None, 0
        if pairs and rated:
            found, left = choose_pair(pairs, read_ratings(rated))
            self._pairs[pair := secrets.token_urlsafe(9)] = found
            while len(self._pairs) > MAX_PAIRS:
                self._pairs.popitem(last=False)
        return render(
            request,
            "rate.html",
            asked=asked or tied,
            pairs=len(pairs),
            left=left,
            pair=pair,
            prompt=found[0][2].prompt if found else "",
            choices=self._choices(),
            wins=count_wins(rated) if rated else [],
        )

    def pair(self, request: Request) -> Response:
        pair, side = self._pairs.get(request.path_params["pair"]), request.path_params["side"]
        if pair is None or side > 1:
            raise RunError("these samples are shown no more; reload the page", key="run.missing")
        run, _, sample = pair[side]
        return send_png(request, run, sample.file)

    def add_rating(self, request: Request, form: Form) -> Response:
        pair = self._pairs.pop(form.get("pair", ""), None)
        if pair and form.get("choice") in CHOICES:
            add_rating(pair, form["choice"])
        return go(f"/rate?{request.url.query}")

    def playground(self, request: Request) -> Response:
        runs = {run.name: RunFolder(run.path) for run in self.library.list_runs()}
        saved = {name: run.saved_steps() for name, run in runs.items() if run.adapters.is_dir()}
        chosen = request.query_params.get("run", "")
        choice = read_choice(runs[chosen]) if chosen in runs else {}
        return render(
            request,
            "playground.html",
            saved={name: steps for name, steps in saved.items() if steps},
            chosen=f"{chosen}@{choice.get('step') or 'final'}",
            strength=choice.get("strength") or 1,
            count=MAX_ADAPTERS,
        )

    def paint(self, request: Request, form: Form) -> Response:
        """Draws the base and the chosen adapters: one request at a time, by a process that stays."""
        adapters: list[tuple[str, int | str, float]] = []
        for number in range(MAX_ADAPTERS):
            run, _, step = form.get(f"run{number}", "").rpartition("@")
            if run:
                path = str(self.library.run(run).path)
                strength = _number(form.get(f"strength{number}", "1"))
                adapters.append((path, int(step) if step.isdecimal() else "final", strength))
        if not (prompt := form.get("prompt", "").strip()):
            raise ConfigError("write a prompt", key="playground.prompt")
        seed = int(_number(form.get("seed", "0")))
        if not 0 <= seed < MAX_SEED:
            raise ConfigError(f"the seed must be from 0 to {MAX_SEED - 1}", key="playground.seed")
        question = {"prompt": prompt, "seed": seed, "adapters": adapters}
        with self._painting:
            answer = self._ask_painter(question)
        if "error" in answer:
            raise ConfigError(answer["error"], key="playground.failed")
        return JSONResponse({"images": [f"data:image/png;base64,{image}" for image in answer["images"]]})

    def _ask_painter(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._painter is None or self._painter.poll() is not None:
            command = [sys.executable, "-m", "sdlora.studio.painter"]
            self._painter = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
        assert self._painter.stdin is not None
        assert self._painter.stdout is not None
        try:
            self._painter.stdin.write(json.dumps(question) + "\n")
            self._painter.stdin.flush()
            line = self._painter.stdout.readline()
            answer: dict[str, Any] = json.loads(line)
        except (OSError, ValueError):
            self._painter = None
            return {"error": "the process that draws has ended; try again"}
        return answer


def _number(text: str) -> float:
    """A number of a form; raises a ConfigError for other text."""
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise ConfigError(f"{text!r:.40} is not a number", key="playground.number")
