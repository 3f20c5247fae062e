"""The script behind the README's tables of ranks and of bits, and the command lines of all scripts."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from sdlora.builtin.measure_runs import RANKS, complete, measure_bits, measure_rank, rates_of
from sdlora.builtin.measure_styles import prompt_of

SCRIPTS = [file.stem for file in Path("sdlora/builtin").glob("*.py") if "def main(" in file.read_text()]


@pytest.mark.slow
def test_a_base_of_few_bits(make_images, tmp_path):
    """R-48: a row has the bytes that are kept, and the loss where it learnt and where it is used."""
    images = make_images(sizes=((128, 128),) * 12)
    row = {"seed": 0, "steps": 2}
    full, nf4 = (measure_bits(images, row | {"base": base}, tmp_path / base) for base in ("full", "nf4"))
    assert full["trained"] == full["used"]
    assert nf4["trained"] != nf4["used"]
    assert nf4["unet_bytes"] < full["unet_bytes"] / 3
    assert nf4["step_seconds"] > 0


@pytest.mark.slow
def test_a_table_goes_on_where_it_was_stopped(make_images, tmp_path):
    """What the table holds is not run again."""
    images, out = make_images(sizes=((128, 128),) * 12), tmp_path / "ranks.json"
    rows = [{"rank": 2, "learning_rate": rate, "seed": 0, "steps": 1} for rate in (1e-3, 2e-3)]
    complete(out, rows[:1], images, measure_rank)
    first = json.loads(out.read_text(encoding="utf-8"))
    complete(out, rows, images, measure_rank)
    assert [row["learning_rate"] for row in json.loads(out.read_text(encoding="utf-8"))] == [1e-3, 2e-3]
    assert json.loads(out.read_text(encoding="utf-8"))[:1] == first


def test_every_rank_has_rates_on_both_sides():
    """The larger the rank, the lower the lowest."""
    lowest = [rates_of(rank)[0] for rank in RANKS]
    assert lowest == sorted(lowest, reverse=True)
    assert all(len(rates_of(rank)) >= 3 for rank in RANKS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_describe_themselves(name, capsys):
    """Each script has a command line with a description."""
    module = import_module(f"sdlora.builtin.{name}")
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"python -m sdlora.builtin.{name}" in printed
    assert module.__doc__.split()[0] in printed


@pytest.mark.parametrize(
    ("trigger", "position", "prompt"),
    [(None, "start", "a fox"), ("inkwash", "start", "inkwash, a fox"), ("woodcut", "end", "a fox, woodcut")],
)
def test_prompts_have_the_trigger_where_captions_have_it(trigger, position, prompt):
    data = {"trigger": trigger, "trigger_position": position}
    assert prompt_of(data).format("a fox") == prompt
