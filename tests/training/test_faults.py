"""A run that is killed, starved or stopped loses only the steps since the last checkpoint.

| fault | where it is injected | outcome | steps lost |
|---|---|---|---|
| killed | before each operation on a file of the run or the cache | `resume`: the same bits | <= save_every |
| killed | inside each write: half of the file or line is there | the same | <= save_every |
| killed | after any amount of work, at random | the same | <= save_every |
| SIGINT, SIGTERM, SIGUSR1 | in a step | finishes it, saves; exit 130, 143, 143 | 0 |
| the same | while a grid is made | saves, leaves the grid to `resume`; the same codes | 0 |
| the same | before the first step | ends at once; exit 130, 143, 143 | 0 |
| a second signal | after the first | ends at once | <= save_every |
| disk full | at a checkpoint (`test_resume.py`) | a warning; the adapter is saved | 0 |
| disk full | at an adapter, a grid, an event | a warning | 0 |
| disk full | at an adapter and its checkpoint | exit 1, one line; `resume` works | <= save_every |
| disk full, read-only folder | at the export | exit 1, one line; `resume` finishes | 0 |
| read-only folder | before the run | exit 2, one line, before anything is loaded | - |
| read-only folder | in mid-run | as a full disk | <= save_every |
| a damaged file of the cache | before the run (`test_encodings.py`) | a warning; encoded again | 0 |
| an image vanishes | in mid-run, encodings cached | no effect | 0 |
| an image vanishes | the same, without a cache (`test_encodings.py`) | exit 2, its name | <= save_every |
| a damaged checkpoint | before `resume` | a warning; the one before is used | <= 2 save_every |
| another base, data, setting | before `resume` (`test_resume.py`) | exit 2, a line for each | 0 |
| NaN, inf: loss, latent, gradient | in a step (`test_numbers.py`) | skips it; many: exit 1 | <= save_every |
| NaN, inf: parameter; losses of 0 | in a step (`test_numbers.py`) | exit 1, one line | <= save_every |
| out of memory | in a grid (`test_batch_size.py`) | a warning; the grid is skipped | 0 |
| out of memory | in a step (`test_batch_size.py`) | exit 1, settings that help | <= save_every |
| a process of several ends | in a step (`test_distributed.py`) | all end, with its reason | <= save_every |
| a host is cut off | in a step (`test_launchers.py`) | ends in train.timeout_seconds | <= save_every |

Victims are forks of the test process. They are killed by SIGKILL at a file operation, or by the unhandled
signal of a timer that counts their CPU time from one operation on: at any instruction, in Rust and C too.
"""

from __future__ import annotations

import bisect
import json
import os
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import sdlora.runs
from sdlora.cli import main
from sdlora.errors import RunError
from sdlora.formats.files import load_adapter
from sdlora.runs import RunFolder
from sdlora.sampling import generate
from sdlora.training import finish
from sdlora.training import train as training
from sdlora.training.checkpoint import read_checkpoint
from sdlora.training.loop import Trainer
from sdlora.training.train import resume, train
from sdlora.writing import to_lines
from tests.checks import raises

WRITING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}


SHORT = {
    "train__steps": 2,
    "train__save_every": 1,
    "train__sample_every": 2,
    "train__evaluate_every": 0,
    "data__heldout": 0,
}


class Bench:
    """Kills runs, and compares each after `resume` with the same run that was not killed."""

    def __init__(self, images, config, folder, fork, check_same):
        self.images, self.config, self.folder = images, config, folder
        self.fork, self.check_same = fork, check_same
        self.number = 0
        # Loads the base, which every fork then has.
        train(images, config=config, out=folder / "warm", quiet=True)
        self.reference = RunFolder(folder / "reference")
        self.run_whole(self.reference)

    def run_whole(self, run):
        child = self.start(run, lambda: None)
        assert child.wait() == 0, child.printed

    def start(self, run, arm):
        """Forks a victim; `arm` sets in it when it is killed."""

        def victim():
            arm()
            train(self.images, config=self.config, out=run.path, quiet=True)

        return self.fork(victim, SDLORA_CACHE=str(run.path) + "-cache")

    def kill(self, arm):
        """Kills a run, checks its files, resumes it, and compares; False if it was not killed."""
        self.number += 1
        run = RunFolder(self.folder / f"killed-{self.number}")
        code = self.start(run, arm).wait()
        assert code in (0, -signal.SIGKILL, -signal.SIGPROF)
        check_whole(run, self.reference, self.config.train.save_every)
        child = self.fork(lambda: self.go_on(run), SDLORA_CACHE=str(run.path) + "-cache")
        assert child.wait() == 0, child.printed
        assert files_of(run) == files_of(self.reference)
        self.check_same(self.reference, run)
        return code != 0

    def go_on(self, run):
        if run.config_file.exists():
            resume(run.path, quiet=True)
        else:
            with raises(RunError):
                resume(run.path, quiet=True)
            train(self.images, config=self.config, out=run.path, quiet=True)


def files_of(run):
    return sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file())


def check_whole(run, reference, save_every):
    """Checks that the files of a run are complete, and that at most save_every steps are lost."""
    complete = [0]
    for step in run.checkpoint_steps():
        tensors, _, state = read_checkpoint(run.checkpoint(step))
        assert state["counters"]["step"] == step
        if step in reference.checkpoint_steps():
            expected = read_checkpoint(reference.checkpoint(step))[0]
            assert all(torch.equal(expected[name], tensor) for name, tensor in tensors.items())
        complete.append(step)
    done = max((event["step"] for event in run.events("step")), default=0)
    assert done - max(complete) <= save_every
    for file in run.adapters.glob("[!.]*.safetensors"):
        saved, expected = (load_adapter(r.adapters / file.name).modules for r in (run, reference))
        assert all(torch.equal(expected[name].up, pair.up) for name, pair in saved.items())
    for picture in run.path.rglob("[!.]*.png"):
        with Image.open(picture) as image:
            image.verify()
    for file in (run.config_file, run.environment_file):
        assert not file.exists() or json.loads(file.read_text(encoding="utf-8"))
    if run.config_file.exists():
        run.read_config()


@pytest.fixture
def bench(make_images, tiny, tmp_path, fork, check_same, warm):
    """A short run with everything that writes: checkpoints, adapters, grids, losses, a trace, the export."""

    def make(**changes):
        images = make_images(sizes=((32, 32),) * 3 + ((48, 32),) * 2)
        settings = {
            "train__steps": 4,
            "train__save_every": 2,
            "train__keep_checkpoints": 1,
            "train__sample_every": 4,
            "train__evaluate_every": 4,
            "train__ema_decay": 0.5,
            "train__trace": True,
            "data__heldout": 0.2,
            "data__caption_dropout": 0.3,
        }
        config = tiny(images, **{**settings, **changes})
        return Bench(images, config, tmp_path, fork, check_same)

    return make


def kill_at_random(bench, count, seed):
    """Kills `count` runs, each at a random moment of the CPU time that one run takes.

    A moment is the operation on a file that comes before it and the time since then, so that a machine that
    is slower or busier than during the measurement kills a run at the same place. A run that reaches its next
    operation first dies there: none outlives its moment.
    """
    note, run = bench.folder / "times", RunFolder(bench.folder / "measured")
    folders = run.path, f"{run.path}-cache"
    assert bench.start(run, Operations(*folders, note=note).watch).wait() == 0
    times = [float(line) for line in note.read_text(encoding="utf-8").split()]
    draws = random.Random(seed)
    for _ in range(count):
        moment = draws.uniform(0, times[-1])
        number = bisect.bisect_left(times, moment)
        folders = (path := bench.folder / f"killed-{bench.number + 1}"), f"{path}-cache"
        delay = moment - times[number - 1] if number else moment
        assert bench.kill(Operations(*folders, die_before=number + 1, die_after=(number, delay)).watch)


def skip_the_end(monkeypatch):
    """Leaves out the loss curve and postflight: half of a short run's time."""
    monkeypatch.setattr(finish, "draw_loss_curve", lambda run: None)
    monkeypatch.setattr(finish, "postflight", lambda *rest: [])


@pytest.mark.slow
def test_killed_at_random(bench, sd15_folder, monkeypatch):
    """R-03, R-23, R-24: twenty kills, as many resumes, no divergence; on a tiny base."""
    skip_the_end(monkeypatch)
    changes = {"train__steps": 3, "train__sample_every": 3}
    kill_at_random(bench(base__source=str(sd15_folder), **{**SHORT, **changes}), 20, seed=0)


@pytest.mark.slow
def test_killed_at_random_on_the_builtin_base(bench):
    """R-03, R-23, R-24: as above; KILLS sets the number (`make kill-test`)."""
    count = int(os.environ.get("KILLS", "50"))
    runs = bench(**{**SHORT, "train__steps": 4, "train__save_every": 2})
    kill_at_random(runs, count, seed=int(os.environ.get("SEED", "1")))
    print(f"{count} runs were killed before their end; all were resumed and ended with the same bits")


class Operations:
    """Counts the operations on files below some folders, as audit hooks see them.

    Args:
        folders: Of the run and of its cache.
        die_before: Kills the process before this operation.
        die_after: Kills it once it has worked some seconds of CPU time after this operation; 0 is the start.
        note: Gets a line for each operation: the CPU time since the start.
    """

    def __init__(self, *folders, die_before=None, die_after=None, note=None):
        self.folders = tuple(map(str, folders))
        self.die_before, self.die_after, self.note = die_before, die_after, note
        self.count = 0

    def watch(self):
        self.started = time.process_time()
        self.arm_timer()
        sys.addaudithook(self.hook)

    def arm_timer(self):
        if self.die_after and self.die_after[0] == self.count:
            # No handler for the signal, so nothing is cleaned up.
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, max(self.die_after[1], 1e-6))

    def hook(self, event, values):
        is_writing = event in WRITING or (event == "open" and values[1] and set(str(values[1])) & set("wa+x"))
        if not is_writing or not any(str(value).startswith(self.folders) for value in values[:2]):
            return
        self.count += 1
        if self.count == self.die_before:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.note is not None:
            with self.note.open("a", encoding="utf-8") as file:
                file.write(f"{time.process_time() - self.started}\n")
        self.arm_timer()


class Tearing:
    """Counts writes, and is killed in the middle of the n-th: half of the file or line is on the disk."""

    def __init__(self, *, die_in=None, note=None):
        self.die_in, self.note = die_in, note
        self.count = 0

    def watch(self):
        fsync, append = os.fsync, sdlora.runs.append_lines

        def tear_file(handle):
            # Every file is synced once it is written, under its temporary name.
            if stat.S_ISREG(os.fstat(handle).st_mode) and self.is_now():
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(handle)

        def tear_line(file, rows):
            if self.is_now():
                line = to_lines(rows).encode()
                with file.open("ab") as handle:
                    handle.write(line[: len(line) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            append(file, rows)

        os.fsync, sdlora.runs.append_lines = tear_file, tear_line

    def is_now(self):
        self.count += 1
        if self.note is not None:
            self.note.write_text(str(self.count), encoding="utf-8")
        return self.count == self.die_in


@pytest.mark.slow
def test_killed_before_every_operation(bench, sd15_folder, tmp_path, monkeypatch):
    """R-23, R-24: killed before each operation, which is also after each one."""
    skip_the_end(monkeypatch)
    runs = bench(base__source=str(sd15_folder), **SHORT)
    note, run = tmp_path / "count", RunFolder(tmp_path / "counted")
    assert runs.start(run, Operations(run.path, f"{run.path}-cache", note=note).watch).wait() == 0
    count = len(note.read_text(encoding="utf-8").split())
    assert count > 80
    for number in range(1, count + 1):
        run = RunFolder(runs.folder / f"killed-{runs.number + 1}")
        assert runs.kill(Operations(run.path, f"{run.path}-cache", die_before=number).watch), number


@pytest.mark.slow
def test_killed_inside_every_write(bench, sd15_folder, tmp_path):
    """R-23, R-24: a partial file never has its final name, and a partial line is not an event."""
    runs = bench(base__source=str(sd15_folder), **SHORT)
    note = tmp_path / "count"
    assert runs.start(RunFolder(tmp_path / "counted"), Tearing(note=note).watch).wait() == 0
    count = int(note.read_text(encoding="utf-8"))
    assert count > 30
    for number in range(1, count + 1):
        assert runs.kill(Tearing(die_in=number).watch), number


@pytest.fixture
def tiny_run(make_images, quick, make_trainer, tmp_path, warm):
    """A configuration and a folder for a run on the tiny base, which is loaded already."""
    images = make_images(sizes=((32, 32),) * 3)
    config = quick(images, train__steps=4, train__save_every=2)
    make_trainer(config, tmp_path / "warm")
    return images, config, RunFolder(tmp_path / "run")


def at_step(step, happen):
    """Calls a function in a run after a step, before it is saved."""
    record = Trainer.record

    def recorded(trainer, result, seconds):
        record(trainer, result, seconds)
        if result.step == step:
            happen(trainer)

    Trainer.record = recorded


def after_saving(step, happen):
    """Calls a function after a step was saved."""
    save = Trainer.save_if_due

    def saved(trainer, *asked):
        save(trainer, *asked)
        if trainer.step == step:
            happen(trainer)

    Trainer.save_if_due = saved


def sdlora_train(argv, *arms):
    """The command as a function for a fork, which is armed first."""

    def start():
        for arm in arms:
            arm()
        sys.argv = argv
        main()

    return start


def send(*numbers):
    def happen(trainer):
        for number in numbers:
            os.kill(os.getpid(), number)

    return happen


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)], ids=str
)
def test_a_signal_saves(tiny_run, fork, command_line, number, code):
    """R-23: the step is finished and saved, the exit code is that of the signal, and `resume` continues."""
    images, config, run = tiny_run
    argv = command_line(images, run, config)
    child = fork(sdlora_train(argv, partial(at_step, 3, send(number))))
    assert child.wait() == code, child.printed
    line = child.printed.splitlines()[-1]
    assert line.startswith("sdlora: ")
    assert all(part in line for part in ("step 3 of 4", f"`sdlora resume {run.path}`"))
    assert run.checkpoint_steps() == [2, 3]
    assert [event["step"] for event in run.events("step")] == [1, 2, 3]


def test_a_signal_while_a_grid_is_made(tiny_run, fork, command_line, monkeypatch):
    """R-23: a grid may take longer than a batch scheduler waits; it is made when the run is resumed."""
    images, config, run = tiny_run
    argv = [*command_line(images, run, config), "train.sample_every=3"]
    denoise, calls = generate._denoise, run.path.with_suffix(".calls")

    def interrupted(*args):
        with calls.open("a", encoding="utf-8") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGTERM)
        return denoise(*args)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "_denoise", interrupted)
        child = fork(sdlora_train(argv))
        assert child.wait() == 143, child.printed
    assert child.printed.splitlines()[-1].endswith("step 3")
    assert calls.read_text(encoding="utf-8") == "x", "the first of two pictures"
    assert run.checkpoint_steps() == [2, 3]
    assert [event for event in run.events("samples", "warning") if event["step"]] == []
    resume(run.path, quiet=True)
    assert [event["step"] for event in run.events("samples")] == [3, 4]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGUSR1, -signal.SIGTERM)],
    ids=str,
)
def test_a_signal_before_the_first_step(tiny_run, fork, command_line, monkeypatch, number, code):
    """R-23: there is nothing to save yet; SIGUSR1 ends the run as SIGTERM does."""
    images, config, run = tiny_run
    monkeypatch.setattr(training, "prepare", lambda *rest: os.kill(os.getpid(), number))
    child = fork(sdlora_train(command_line(images, run, config)))
    assert child.wait() == code, child.printed
    monkeypatch.undo()
    resume(run.path, quiet=True)
    assert run.is_finished(4)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)], ids=str
)
def test_a_second_signal_stops_at_once(tiny_run, fork, command_line, number, code):
    """R-23: a second signal ends the run at once, without saving."""
    images, config, run = tiny_run
    argv = command_line(images, run, config)
    child = fork(sdlora_train(argv, partial(at_step, 3, send(number, number))))
    assert child.wait() == code, child.printed
    assert run.checkpoint_steps() == [2]
    assert "stopped at step" not in child.printed


def test_a_launcher_that_passes_a_signal_on(tiny_run, fork_processes, command_line):
    """R-23: the same Ctrl-C, forwarded by a launcher, is not a second signal."""
    images, config, run = tiny_run
    argv = command_line(images, run, config)
    twice = partial(at_step, 3, send(signal.SIGINT, signal.SIGTERM))
    [child] = fork_processes(1, sdlora_train(argv, twice))
    assert child.wait() == 130, child.printed
    assert run.checkpoint_steps() == [2, 3]


def fill_disk(trainer):
    """Limits the size of files to 100 bytes from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def test_a_disk_that_is_full(tiny_run, fork, command_line):
    """R-24: adapters, samples and events are warnings; if nothing can be saved, exit 1 with one line."""
    images, config, run = tiny_run
    argv = [*command_line(images, run, config), "train.sample_every=3"]
    child = fork(sdlora_train(argv, partial(at_step, 3, fill_disk)))
    assert child.wait() == 1, child.printed
    *told, last = child.printed.splitlines()
    assert last.startswith("sdlora: ")
    assert "step 4" in last
    assert f"`sdlora resume {run.path}` continues from step 2" in last
    for what in ("the event", "the adapter of step 3", "the adapter of step 4", "the checkpoint of step 4"):
        assert any(line.startswith("warning: ") and what in line for line in told), what
    assert run.checkpoint_steps() == [2]
    check_events(run, 3)
    resume(run.path, quiet=True)
    check_events(run, 4)
    assert run.final_adapter().is_file()
    assert not list(run.path.rglob(".*"))


def check_events(run, last):
    """Every line of the events is whole."""
    lines = run.events_file.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines]
    assert [event["step"] for event in run.events("step")] == list(range(1, last + 1))


@pytest.fixture
def open_place():
    """A folder that every user of the machine can reach; pytest's own are private."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def make_read_only(trainer):
    """Nothing is read-only for root, so root becomes nobody."""
    for folder in (trainer.run.path, *trainer.run.path.iterdir()):
        if folder.is_dir():
            folder.chmod(0o555)
    trainer.run.events_file.chmod(0o444)
    if os.geteuid() == 0:
        os.setuid(65534)


@pytest.mark.parametrize(
    ("when", "line", "left"),
    [
        (partial(at_step, 3), "checkpoint of step 4", 2),
        (partial(after_saving, 4), "{}", 4),
    ],
    ids=["in mid-run", "at the export"],
)
def test_a_folder_that_becomes_read_only(tiny_run, open_place, fork, command_line, when, line, left):
    """R-24: handled as a full disk."""
    images, config, _ = tiny_run
    run = RunFolder(open_place / "run")
    child = fork(sdlora_train(command_line(images, run, config), partial(when, make_read_only)))
    assert child.wait() == 1, child.printed
    last = child.printed.splitlines()[-1]
    assert last.startswith("sdlora: ")
    assert line.format(run.final_adapter()) in last
    assert last.endswith(f"from step {left}")
    for folder in (run.path, *run.path.iterdir()):
        folder.chmod(0o755)
    resume(run.path, quiet=True)
    check_events(run, 4)


def test_a_place_that_is_read_only(tiny_run, sd15_folder, open_place, fork, command_line):
    """R-24: found before anything is loaded."""
    images, config, _ = tiny_run
    base = shutil.copytree(sd15_folder, open_place / "base")
    for file in (base, *base.rglob("*")):
        file.chmod(0o755)
    config = config.replace(base={"source": str(base)})
    images = shutil.copytree(images, open_place / "images")
    argv = command_line(images, RunFolder(open_place / "x"), config)
    shut = open_place / "shut"
    shut.mkdir(mode=0o555)
    argv[argv.index("--out") + 1] = str(shut / "run")

    def become_nobody():
        os.environ["SDLORA_CACHE"] = str(shut / "cache")
        if os.geteuid() == 0:
            os.setuid(65534)

    child = fork(sdlora_train(argv, become_nobody))
    assert child.wait() == 2, child.printed
    last = child.printed.splitlines()[-1]
    assert last.startswith("sdlora: ")
    assert f"--out {shut / 'run'}" in last
