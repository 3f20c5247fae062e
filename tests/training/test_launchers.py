"""Several processes as users start them: torchrun, accelerate launch, two hosts (R-17, R-23).

Each process imports everything again, so these tests are few; `test_distributed.py` has the others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdlora.runs import RunFolder
from sdlora.training.train import resume
from tests.checks import HANG_SECONDS

RUN = [
    "data.resolution=32",
    "lora.rank=2",
    "lora.targets=*.attn2.to_v",
    "export.formats=diffusers",
    "train.batch_size=1",
    "train.save_every=2",
    "train.sample_every=0",
    "train.evaluate_every=0",
]


@pytest.fixture
def launch():
    """Starts a launcher as a Python module, and ends it after the test."""
    started = []

    def start(*command, prefix=(), **environment):
        child = subprocess.Popen(
            [*prefix, sys.executable, "-m", *map(str, command)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def torchrun(*arguments):
    return ["torch.distributed.run", *arguments, "-m", "sdlora"]


TWO = torchrun("--standalone", "--nproc-per-node", 2)


@pytest.mark.slow
def test_torchrun(launch, make_images, tmp_path):
    """R-16, R-17: the plan is printed once, with the bytes exchanged; the files are those of one run."""
    run = RunFolder(tmp_path / "run")
    child = launch(*TWO, "train", make_images(), "--out", run.path, *RUN, "train.steps=3")
    printed, _ = child.communicate(timeout=HANG_SECONDS)
    assert child.returncode == 0, printed
    assert printed.count("2 processes = global batch 2") == 1
    assert printed.count("MB of gradients a step between 2 processes") == 1
    assert printed.count("load it   pipe.load_lora_weights") == 1
    assert [event["step"] for event in run.events("step")] == [1, 2, 3]
    assert run.read_environment()["num_processes"] == 2
    assert run.checkpoint_steps() == [2, 3]
    assert run.adapter == run.final_adapter()


def wait_for_step(run, step, child):
    end = time.monotonic() + HANG_SECONDS
    while max((event["step"] for event in run.events("step")), default=0) < step:
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


def workers_of(child):
    """Process ids of the launcher's processes, in the order of their numbers."""
    listed = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, listed.stdout.split()))


@pytest.mark.slow
def test_a_signal_to_torchrun_saves(launch, make_images, tmp_path):
    """R-23: the launcher forwards the signal; all processes finish the step, and one saves."""
    run = RunFolder(tmp_path / "run")
    handled = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
    two = torchrun("--standalone", "--nproc-per-node", 2, *handled)
    child = launch(*two, "train", make_images(), "--out", run.path, *RUN, "train.steps=100000")
    wait_for_step(run, 3, child)
    os.kill(child.pid, signal.SIGUSR1)
    printed, _ = child.communicate(timeout=HANG_SECONDS)
    last = [event["step"] for event in run.events("step")][-1]
    assert printed.count(f"sdlora: stopped at step {last} of 100000") == printed.count("sdlora: ") == 1
    assert run.checkpoint_steps()[-1] == last
    assert list(run.events("failed")) == []


@pytest.mark.slow
def test_a_killed_process_ends_the_run(launch, make_images, tmp_path):
    """R-23: all end with one line, without waiting for train.timeout_seconds (600)."""
    run = RunFolder(tmp_path / "run")
    child = launch(*TWO, "train", make_images(), "--out", run.path, *RUN, "train.steps=100000")
    wait_for_step(run, 5, child)
    workers = workers_of(child)
    os.kill(workers[1], signal.SIGKILL)
    printed, _ = child.communicate(timeout=HANG_SECONDS)
    assert child.returncode != 0
    assert "sdlora: another process ended or does not answer" in printed
    assert f"`sdlora resume {run.path}`" in printed
    [failed] = run.events("failed")
    assert failed["step"] - run.checkpoint_steps()[-1] <= 2
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@dataclass
class Host:
    """One of two hosts: a network namespace, its address, and its end of the cable."""

    name: str
    address: str
    cable: str


HOSTS = ((1, "a"), (2, "b"))


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them, and a way to pull it out."""
    hosts = [Host(f"sdlora{os.getpid()}{end}", f"10.77.0.{number}", f"sdl{end}") for number, end in HOSTS]
    one, other = hosts
    try:
        for host in hosts:
            ip("netns", "add", host.name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine makes no network namespaces")
    try:
        ip(*f"link add {one.cable} netns {one.name} type veth peer {other.cable} netns {other.name}".split())
        for host in hosts:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.cable)
            for interface in ("lo", host.cable):
                ip("-n", host.name, "link", "set", interface, "up")
        yield hosts, lambda: ip("-n", other.name, "link", "set", other.cable, "down")
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)


@pytest.mark.slow
def test_a_host_that_is_cut_off(launch, two_hosts, make_images, tmp_path):
    """R-17, R-23: one run on two hosts; when the cable is pulled both end with a line, and the run resumes.

    A pulled cable closes no connection: only the timeout ends the wait.
    """
    (one, other), pull_cable = two_hosts
    run, images = RunFolder(tmp_path / "run"), make_images()
    settings = [*RUN, "train.steps=100000", "train.timeout_seconds=20"]
    started = [
        launch(
            *torchrun("--nnodes", 2, "--node-rank", number, "--nproc-per-node", 1, *meeting_at(one)),
            *("train", images, "--out", run.path, *settings),
            prefix=["ip", "netns", "exec", host.name],
            GLOO_SOCKET_IFNAME=host.cable,
            TP_SOCKET_IFNAME=host.cable,
        )
        for number, host in enumerate((one, other))
    ]
    wait_for_step(run, 5, started[0])
    pull_cable()
    printed = [child.communicate(timeout=HANG_SECONDS)[0] for child in started]
    for child, text in zip(started, printed, strict=True):
        assert child.returncode != 0
        assert "sdlora: another process ended or does not answer" in text, text
        assert f"`sdlora resume {run.path}`" in text
    [failed] = run.events("failed")
    assert failed["step"] - run.checkpoint_steps()[-1] <= 2
    last = run.checkpoint_steps()[-1]
    resume(run.path, [f"train.steps={last + 2}"], quiet=True)
    assert [event["step"] for event in run.events("step")] == list(range(1, last + 3))


def meeting_at(host):
    return ["--master-addr", host.address, "--master-port", 29517]


@pytest.mark.slow
def test_accelerate_launch(launch, make_images, tmp_path):
    """R-11, R-17: on a CPU it starts one process; its exports (precision `no`, threads) are not settings."""
    run = RunFolder(tmp_path / "run")
    command = ["accelerate.commands.launch", "--cpu", "--num_processes", 1, "--num_machines", 1]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "sdlora"]
    child = launch(*command, "train", make_images(), "--out", run.path, *RUN, "train.steps=2")
    printed, _ = child.communicate(timeout=HANG_SECONDS)
    assert child.returncode == 0, printed
    assert run.read_environment()["compute_dtype"] == "fp32"
    assert [event["step"] for event in run.events("step")] == [1, 2]
