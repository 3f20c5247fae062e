"""Values of options: read, or one line with what they should be."""

from __future__ import annotations

import pytest

from sdlora.cli.options import parse_numbers, parse_size, parse_strengths
from sdlora.errors import ConfigError
from tests.checks import raises


def test_values():
    """Sizes and lists of numbers as people type them."""
    assert parse_size("768x512") == parse_size("768X512") == (768, 512)
    assert parse_numbers("0,0.5,1", float, "--strengths") == [0.0, 0.5, 1.0]
    assert parse_size(None) is parse_numbers(None, int, "--seeds") is None


@pytest.mark.parametrize("text", ["", "x", "768", "768x", "²x²", "-1x5", "1.5x2", "9" * 5000 + "x1", "7x7x7"])
def test_sizes_that_are_none(text):
    """Digits of other kinds and sizes of thousands of digits are no sizes."""
    with raises(ConfigError, "option--size", shows="768x512"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "²", "9" * 5000])
def test_numbers_that_are_none(text):
    """Texts, and numbers of thousands of digits, are no seeds."""
    with raises(ConfigError, "option--seeds"):
        parse_numbers(text, int, "--seeds")


@pytest.mark.parametrize("text", ["nan", "1,inf", "-inf"])
def test_weights_that_are_none(text):
    """R-06: what is no number would become every value of a file."""
    with raises(ConfigError, "option--weights", shows=text):
        parse_numbers(text, float, "--weights")
    with raises(ConfigError, "option--strengths", shows="NODE=NUMBER"):
        parse_strengths(",".join(f"ink={number}" for number in text.split(",")))
    assert parse_strengths("ink=-0.5,a=b=2") == {"ink": -0.5, "a=b": 2.0}
