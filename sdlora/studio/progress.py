"""A run as its events tell it, read as they are appended; and its losses as a curve."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdlora.report.summary import SPLITS
from sdlora.studio.library import numbers, parse_events

# Steps over which the speed is measured, saving, validation and grids included.
SPEED_STEPS = 200
MAX_POINTS = 400
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 240, 52, 20, 12, 28
Point = tuple[float, float]


class Progress:
    """The events of one run; `update` reads those that are new, from any thread."""

    def __init__(self, file: Path) -> None:
        self.file, self.lock = file, threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._inode, self._offset = 0, 0
        self.losses: list[Point] = []
        self.means: list[Point] = []
        self.validation: dict[str, list[Point]] = {}
        self.plan: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.peak_mb = 0.0
        self.warnings: list[str] = []
        self._recent: deque[Point] = deque(maxlen=SPEED_STEPS)

    def update(self) -> Progress:
        """Reads on; from the start if a resumed run has written its events anew."""
        with self.lock:
            try:
                with self.file.open("rb") as handle:
                    status = os.fstat(handle.fileno())
                    if status.st_ino != self._inode or status.st_size < self._offset:
                        self._forget()
                        self._inode = status.st_ino
                    handle.seek(self._offset)
                    text = handle.read()
            except OSError:
                self._forget()
                return self
            whole = text.rfind(b"\n") + 1
            self._offset += whole
            for event in parse_events(text[:whole].split(b"\n")):
                self._add(event)
        return self

    def _add(self, event: dict[str, Any]) -> None:
        step, name = event["step"], event["event"]
        if name == "step":
            self.last = event
            self.losses += _point(step, event.get("loss"))
            self.means += _point(step, event.get("loss_ema"))
            self._recent += _point(step, event.get("time"))
            self.peak_mb = max(self.peak_mb, *numbers(event.get("memory_mb")), 0.0)
        elif name == "heldout":
            self.validation.setdefault(str(event.get("split")), []).extend(_point(step, event.get("loss")))
        elif name == "plan":
            self.plan = event
        elif name == "prepared":
            self._recent.clear()
        elif name == "warning":
            self.warnings.append(str(event.get("message")))

    @property
    def seconds_per_step(self) -> float | None:
        """The time of a recent step, with its share of everything between steps."""
        if len(self._recent) < 2:
            return None
        (first, begun), (last, ended) = self._recent[0], self._recent[-1]
        return (ended - begun) / (last - first) if last > first and ended > begun else None

    def eta_seconds(self, steps: int) -> float | None:
        """The time that the remaining steps take at the recent speed."""
        pace = self.seconds_per_step
        return None if pace is None else pace * max(0, steps - self.last["step"])

    def curves(self) -> list[dict[str, Any]]:
        """The training and the validation losses as curves; those without two points are left out."""
        training = {"each step": self.losses, "running mean": self.means}
        validation = {SPLITS.get(split, split): points for split, points in self.validation.items()}
        shown = {"Training loss": training, "Validation loss": validation}
        return [
            draw_curve(title, lines)
            for title, lines in shown.items()
            if any(len(points) > 1 for points in lines.values())
        ]


def _point(step: int, value: Any) -> list[Point]:
    """The point of a finite number, else none."""
    return [(float(step), number) for number in numbers(value)]


def draw_curve(title: str, lines: dict[str, list[Point]]) -> dict[str, Any]:
    """Lines of (step, value) with the ticks of both axes, in the units of an SVG of `WIDTH` × `HEIGHT`."""
    lines = {name: _thin(points) for name, points in lines.items() if points}
    smooth = list(lines.values())[-1]
    everything = [value for points in lines.values() for _, value in points]
    low, high = min(everything), max(everything)
    if len(everything) > MAX_POINTS // 4:  # Single steps may lie far out.
        ranked = sorted(everything)
        low = min(ranked[len(ranked) // 50], *(value for _, value in smooth))
        high = max(ranked[-1 - len(ranked) // 50], *(value for _, value in smooth))
    first = min(points[0][0] for points in lines.values())
    last = max(points[-1][0] for points in lines.values())
    rows, columns = ticks(low, high, 4), ticks(first, last, 5)
    low, high = min(low, rows[0]), max(high, rows[-1])

    def x(step: float) -> float:
        return round(LEFT + (step - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (min(max(value, low), high) - low) / ((high - low) or 1)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    return {
        "title": title,
        "size": (WIDTH, HEIGHT),
        "left": LEFT,
        "foot": HEIGHT - BOTTOM,
        "rows": [(y(value), f"{value:g}") for value in rows],
        "columns": [(x(value), f"{value:g}") for value in columns if first <= value <= last],
        "lines": [
            (name, "M" + "L".join(f"{x(step)} {y(value)}" for step, value in points), points[-1][1])
            for name, points in lines.items()
        ],
        "dots": [
            [(x(step), y(value)) for step, value in points] if len(points) <= 40 else []
            for points in lines.values()
        ],
    }


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from below `low` to above `high`."""
    span = (high - low) or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / count))
    step = next(size * unit for size in (1, 2, 5, 10) if span / (size * unit) <= count)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.6g}") for number in range(start, end + 1)]


def _thin(points: Iterable[Point]) -> list[Point]:
    """At most about `MAX_POINTS` points: the mean of each group of neighbours."""
    points = list(points)
    size = -(-len(points) // MAX_POINTS)
    groups = (points[at : at + size] for at in range(0, len(points), size)) if size > 1 else ()
    means = [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
    return means or points
