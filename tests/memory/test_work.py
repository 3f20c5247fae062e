"""The time that a plan promises, the cards that it knows, and what a run really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sdlora.data.cache import cache_folder
from sdlora.errors import ConfigError
from sdlora.memory import monitor as module
from sdlora.memory.cards import CARDS, Card, check_device, find_card
from sdlora.memory.estimate import as_size
from sdlora.memory.monitor import StageMonitor
from sdlora.memory.work import Speed, SpeedMeter, Work, as_time, read_speed, speed_of_card, write_speed
from tests.benchmarks.bases import write_base
from tests.checks import raises


@pytest.mark.parametrize(
    ("text", "name", "has_bf16"),
    [
        ("RTX 3060 12GB", "RTX 3060 12GB", True),
        ("3090", "RTX 3090 24GB", True),
        ("rtx4070ti super", "RTX 4070 Ti Super 16GB", True),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", True),
        ("NVIDIA H100 80GB HBM3", "H100 80GB", True),
        ("Tesla T4", "T4 16GB", False),
        ("cuda:12GB", "GPU with 12 GB", True),
        ("24 gb", "GPU with 24 GB", True),
    ],
)
def test_cards_are_found_by_the_names_that_people_type(text, name, has_bf16):
    """R-11: as torch, shops and forums spell them."""
    card = find_card(text)
    assert (card.name, card.has_bf16) == (name, has_bf16)
    assert str(card.num_bytes // 10**9) in name


def test_a_card_that_is_not_known_and_one_that_should_train():
    """R-35: exit 2, with what to type."""
    for text in ("", "9999", "cuda", "0GB", "mps"):
        with raises(ConfigError, "option--device", shows="RTX 3060 12GB"):
            find_card(text)
    with raises(ConfigError, "option--device.dry-run", shows="add --dry-run"):
        check_device("RTX 3060", dry_run=False)
    check_device("RTX 3060", dry_run=True)
    assert len({find_card(name).name for name in CARDS}) == len(CARDS)


def test_two_published_measurements_agree_with_the_estimate():
    """SD 1.5 and SDXL with guidance on an A100: 32 and 110 ms a step, by those who measured it."""
    speed = speed_of_card(find_card("A100"))
    for tflop, seconds in ((2 * 0.81, 0.032), (2 * 5.98, 0.110)):
        assert speed.seconds({"sampling": Work(tflop * 1e12, 1)})["sampling"] == pytest.approx(
            seconds, rel=0.2
        )
    assert speed_of_card(Card("GPU with 12 GB", 12 * 10**9)) is None


def test_a_speed_is_kept_with_the_cache():
    """R-45: for each device and base; a file that is damaged is no speed, and no failure."""
    assert read_speed("cpu, base") is None
    write_speed("cpu, base", Speed({"training": 3.14159e9}, 7.0, ""))
    write_speed("cpu, other", Speed({"training": 1e9}, 1.0, ""))
    known = read_speed("cpu, base")
    assert (known.rates, known.rest) == ({"training": 3.14e9}, 7.0)
    # A stage that was never measured has the speed of the others.
    assert known.seconds({"sampling": Work(3.14e9, 10)}) == {"sampling": pytest.approx(1.0)}
    file = cache_folder() / "speed.json"
    for text in ("[]", "{", '{"cpu, base": {"rates": {"training": 0}, "rest": 1}}', '{"cpu, base": 1}'):
        file.write_text(text, encoding="utf-8")
        assert read_speed("cpu, base") is None
    write_speed("cpu, base", Speed({"training": 2e9}, 1.0, ""))
    assert read_speed("cpu, base").rates == {"training": 2e9}


def test_the_first_step_does_not_count(monkeypatch):
    """R-45: 10 units in a first step of 60 s, then 10 a second; a stage not begun keeps what was known."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    watch = StageMonitor()
    pace = SpeedMeter(
        Speed({"sampling": 5.0}, 3.0, ""), watch, {"training": Work(100, 10), "sampling": Work(50, 1)}
    )

    def left(training):
        return {"training": Work(training, 1), "sampling": Work(50, 1)}

    with watch.stage("training"):
        now[0] = 60.0
        pace.warm_up(left(90))
        now[0] = 62.0
        speed = pace.speed(left(70))
        assert speed.rates == {"sampling": 5.0, "training": 10.0}
        assert speed.seconds(left(70)) == {"training": 7.0, "sampling": 10.0}
    pace.keep("here", left(70))
    assert read_speed("here").rates == {"sampling": 5.0, "training": 10.0}
    assert SpeedMeter(None, StageMonitor(), left(1)).speed(left(1)) is None


def test_a_watch_sees_the_peak_of_each_stage():
    """R-18: also of a block that is gone by the end, or in a stage inside another; draws nothing."""
    before = torch.get_rng_state()
    watch = StageMonitor()
    with watch.stage("outer"):
        block = torch.ones(40 * 2**20)
        with watch.stage("inner"):
            time.sleep(0.1)
        del block
    start = watch.of("outer") - 160 * 2**20
    with watch.stage("later"):
        time.sleep(0.05)
    assert watch.of("inner") > start + 100 * 2**20
    assert watch.of("later") < watch.of("inner") - 100 * 2**20
    assert 0.1 < watch.seconds("inner") <= watch.total_seconds
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (125, "2 min"), (5990, "1 h 40 min")]
)
def test_times_in_words(seconds, text):
    assert as_time(seconds) == text


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("base", ["builtin", "quarter"])
def test_memory_told_is_memory_used(base, tmp_path, make_images):
    """R-18: a whole run on a CPU within 15 % of its plan, and within 30 % without Python and torch."""
    images, run = make_images(sizes=((256, 256),) * 2), tmp_path / "run"
    source = base if base == "builtin" else str(write_base(base, tmp_path / base))
    small = ["train.steps=3", "train.evaluate_every=0", "train.sample_every=3", "sample.steps=1"]
    small += ["export.formats=diffusers", "sample.seeds=[0]", "sample.prompts=['a fox', 'a boat']"]
    command = [sys.executable, "-m", "sdlora", "train", str(images), "--base", source, "--out", str(run)]
    done = subprocess.run(
        [*command, *small],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    memory = next(event for event in events if event["event"] == "plan")["memory"]
    usage = next(event for event in events if event["event"] == "usage")
    print(base, usage["stages"], usage["planned"], memory["baseline"])
    assert 0.85 < memory["needs"] / usage["peak"] < 1.15
    assert 0.7 < memory["peak"] / (usage["peak"] - memory["baseline"]) < 1.3
    assert f"planned {as_size(memory['needs'])}" in done.stdout
