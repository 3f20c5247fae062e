"""Runs a reader on many inputs: whatever they are, only our own errors come out, a line each.

By default each reader gets a hundred inputs, the same at every run; `make test-slow` gives a thousand, and
`make fuzz` (SDLORA_FUZZ inputs, 10,000 unless set) new ones at every run.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdlora.errors import SdloraError

FEW, MANY = 100, 1000
ASKED = int(os.environ.get("SDLORA_FUZZ", "0"))
Fuzz = Callable[[st.SearchStrategy[Any], Callable[[Any], object]], None]


@pytest.fixture(params=[pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)])
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    """Calls a reader with many examples; its own errors are checked, any other fails the test."""
    number = ASKED if ASKED and request.param == MANY else request.param

    def run(examples: st.SearchStrategy[Any], read: Callable[[Any], object]) -> None:
        @settings(
            max_examples=number,
            derandomize=not ASKED,
            suppress_health_check=list(HealthCheck),
        )
        @given(examples)
        def check(example: Any) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    read(example)
                except SdloraError as error:
                    refuse_unclear(str(error))

        check()

    return run


def refuse_unclear(message: str) -> None:
    """A message is lines of a length that can be read, and steers no terminal."""
    lines = message.split("\n")
    assert all(line.strip() for line in lines), message
    assert all(len(line) < 2500 for line in lines), message
    assert not any(letter in message for letter in "\x1b\x00\r\x85\u2028"), repr(message)


def damage(content: bytes, seed: int, cuts: int) -> bytes:
    """Flips, cuts, doubles and inserts bytes; the same for the same seed."""
    draws = random.Random(seed)
    data = bytearray(content)
    for _ in range(cuts):
        place = draws.randrange(len(data) + 1)
        length = min(draws.choice((1, 1, 2, 4, 8, 64)), len(data) - place)
        match draws.randrange(6):
            case 0:
                data[place : place + length] = draws.randbytes(length)
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = data[place : place + length]
            case 3:
                data[place:place] = draws.choice((b"\xff", b"\0", b'"', b"[[", b"{", b"9" * 30, b"-1", b"\n"))
            case 4 if length:
                data[place] ^= 1 << draws.randrange(8)
            case 5:
                del data[place + draws.randrange(64) :]
    return bytes(data)


@pytest.fixture(scope="session")
def damaged() -> Callable[[st.SearchStrategy[bytes]], st.SearchStrategy[bytes]]:
    """Sound files, and the same files damaged in a few places."""

    def make(sound: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
        return (
            st.builds(damage, sound, st.integers(0, 2**32), st.integers(0, 6))
            | sound
            | st.binary(max_size=300)
        )

    return make


NAMES = ["a", "lora_alpha", "r", "unet.r", "text", "file_name", "..", "", "\x1b[2J", "\ud800", "ключ"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf"), -0.0])
    | st.text(max_size=20)
    | st.sampled_from(["", "1e999", "nan", "../../etc/passwd", "{trigger}", "\ud800", "a\nb", "0" * 500])
)


ODD = [
    *([], {}, [[]], [1, [2, [3]]], {"a": {"b": [None]}}, {"text": "x"}, {"r": 4, "lora_alpha": -1}),
    *([None] * 9, {"": ""}, {"unet.r": "8"}, [True], ["\ud800"], {"\x1b[2J": "\x07"}, [10**30], {"a": 1e999}),
]


@pytest.fixture(scope="session")
def json_values() -> st.SearchStrategy[Any]:
    """Any JSON value, flat or nested, with names that readers look for."""
    keys = st.sampled_from(NAMES) | st.text(max_size=8)
    flat = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(keys, SCALARS, max_size=3)
    return (
        SCALARS
        | st.sampled_from(ODD)
        | flat
        | st.lists(flat, max_size=2)
        | st.dictionaries(keys, flat, max_size=2)
    )
