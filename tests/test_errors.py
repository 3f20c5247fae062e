"""Messages are lines, whatever the names in them hold."""

from __future__ import annotations

import pickle

import pytest

from sdlora.errors import ConfigError, DataError, SdloraError, one_line, shorten, unfit_letters


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\nb\rc", r"a\nb\rc"),
        ("a\u2028b\x85", r"a\u2028b\x85"),
        ("\udcff.png", r"\udcff.png"),
        ("👩‍🎨 猫　é", "👩‍🎨 猫　é"),
        ("a\u00a0b", "a\u00a0b"),
        ("plain", "plain"),
    ],
)
def test_one_line(text, shown):
    """Control characters and broken letters are escaped; joiners, wide spaces and accents stay."""
    assert one_line(text) == shown
    assert not unfit_letters(shown)
    shown.encode("utf-8")


def test_long_values_are_cut():
    """A value of megabytes does not flood the terminal."""
    assert len(shorten("x" * 10**7)) == 201
    assert shorten("x" * 200) == "x" * 200


def test_long_lines_are_cut():
    """Whatever a message quotes, its lines can be read, and there are not thousands of them."""
    assert [len(line) for line in str(DataError("x" * 10**6 + "\nshort")).split("\n")] == [2001, 5]
    error = ConfigError(*(f"mistake {number}" for number in range(9000)))
    assert len(str(error).split("\n")) == len(error.problems) == 41
    assert error.problems[-1] == "and more mistakes, 9,000 or more in all"


def test_errors_steer_no_terminal():
    """An error's text has the lines it was given, and nothing that a terminal obeys."""
    error = ConfigError("one\x1b[31m", "two\x07")
    assert str(error) == "one\\x1b[31m\ntwo\\x07"
    assert error.problems == ("one\x1b[31m", "two\x07")
    assert str(pickle.loads(pickle.dumps(DataError("a\tb")))) == "a\\tb"
    assert isinstance(error, SdloraError)
