"""Runs started, stopped and continued from the page."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from sdlora.config import RunConfig, load_config
from sdlora.errors import ConfigError, RunError
from sdlora.runs import RunFolder
from sdlora.studio.launch import MAIN, Launcher, list_settings
from sdlora.studio.library import Library, name_folder
from tests.checks import HANG_SECONDS, raises
from tests.studio.conftest import draw_grid


@pytest.fixture
def launcher(runs, make_images):
    return Launcher(Library(runs, [make_images()]))


def wait(condition):
    for _ in range(HANG_SECONDS * 20):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it did not happen")


def test_every_setting_has_a_field(client):
    """R-35: the form is made from the schema; those used most come first."""
    keys = [setting.key for setting in list_settings()]
    sections = {name: value for name, value in RunConfig().model_dump().items() if isinstance(value, dict)}
    assert set(keys) == {f"{section}.{key}" for section, values in sections.items() for key in values}
    assert tuple(keys[: len(MAIN)]) == MAIN
    page = client().get("/new").text
    assert all(f'name="{key}"' in page for key in keys)


def test_a_form_becomes_a_command(launcher, tmp_path):
    """Text is text, whatever it looks like; numbers, lists and tables are read as TOML."""
    images = tmp_path / "pictures"
    form = {
        "images": name_folder(images),
        "preset": "sd15",
        "data.trigger": "1",
        "lora.rank": " 8 ",
        "lora.targets": '["attn2"]',
        "train.batch_size": "auto",
        "train.accumulate": "4",
        "data.flip": "true",
        "sample.prompts": 'a "big" fox\r\nzwei Füchse',
        "base.source": "--base",
        "train.seed": "",
        "name": "x",
        "sample.strengths": "0.5, 1",
        "train.trackers": "tensorboard, wandb",
    }
    folder, *rest = launcher.arguments(form)
    assert folder == str(images)
    assert rest[:2] == ["--preset", "sd15"]
    config = load_config(overrides=rest[2:])
    assert (config.data.trigger, config.lora.rank, config.lora.targets) == ("1", 8, ["attn2"])
    assert (config.train.batch_size, config.data.flip, config.base.source) == ("auto", True, "--base")
    assert config.sample.prompts == ['a "big" fox', "zwei Füchse"]
    # A list may be typed as on the command line.
    assert (config.sample.strengths, config.train.trackers) == ([0.5, 1.0], ["tensorboard", "wandb"])
    assert "seed" not in config.given()["train"]
    for images in ("", str(tmp_path), "../x"):
        with raises(ConfigError, "images"):
            launcher.arguments({**form, "images": images})
    with raises(ConfigError, "option--preset"):
        launcher.arguments({**form, "preset": "../secret"})


def test_a_form_comes_back(launcher, make_run, tmp_path):
    """R-45: the settings of a run that are not the defaults fill a form, which makes the same settings."""
    values = {
        "data.trigger": "ink",
        "lora.rank": 4,
        "sample.prompts": ["a", "b"],
        "sample.strengths": [0.5, 1.0],
    }
    values["lora.rank_pattern"] = {"attn1": 8}
    values["data.sets"] = [{"folder": "more", "repeats": 2, "trigger": 'a "b"'}]
    run = RunFolder.create(
        launcher.library.folder / "old", load_config(images=tmp_path / "pictures", overrides=values), {}
    )
    form = launcher.form_of(run)
    expected = {
        "images": name_folder(tmp_path / "pictures"),
        "name": "old",
        "data.trigger": "ink",
        "lora.rank": "4",
        "sample.prompts": "a\nb",
        "sample.strengths": "[0.5, 1.0]",
    }
    assert expected.items() <= form.items()
    images, *overrides = launcher.arguments(form)
    assert load_config(images=images, overrides=overrides).model_dump() == run.read_config().model_dump()


def test_no_run_is_continued_to_where_it_is(launcher, make_run):
    """R-45: nor to what is no step."""
    run = make_run()
    for steps in ("10", "3", "x"):
        with raises(RunError, "run.steps", shows=steps):
            launcher.resume(run, steps)


def test_a_wrong_setting_is_shown_before_the_start(client, make_images):
    """The command's own line, beside the form."""
    images = make_images()
    form = {"images": name_folder(images), "lora.rank": "0", "train.steps": "<i>"}
    page = client(images).post("/plan", data=form).text
    assert "lora.rank = 0" in page
    assert "train.steps" in page
    assert "<i>" not in page
    assert "/start" not in page


def test_a_run_that_cannot_start_is_failed(launcher, runs, tmp_path):
    """Its name is a safe one inside the folder; its last words are shown, and it can be told from others."""
    form = {"images": name_folder(tmp_path / "pictures"), "lora.rank": "0", "name": "../my run/../x"}
    run = launcher.start(form)
    assert run.path.parent == runs
    wait(lambda: run.process is None)
    seen = launcher.library.overview(run)
    assert (seen.state, seen.step) == ("failed", 0)
    assert "lora.rank = 0" in seen.problem
    assert launcher.start(form).path == run.path.with_name(f"{run.name}-2")


def test_stop_and_resume(launcher, make_run, client):
    """R-23: a signal asks the process to save and end; nothing is started while one runs."""
    run = make_run(done=4)
    with raises(RunError, "run.not-running"):
        launcher.stop(run)
    with raises(RunError, "run.not-running"):
        launcher.ask(run, "save")
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *a: None); print('up', flush=True)"
    code += "; time.sleep(1000)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"up\n"
        run.name_process(process.pid)
        for refused in (lambda: launcher.resume(run), lambda: launcher.prune(run)):
            with raises(RunError, "run.running"):
                refused()
        assert client().post(f"/resume/{run.name}").status_code == 409
        for request in ("save", "sample"):
            assert client().post(f"/{request}/{run.name}", follow_redirects=False).status_code == 303
        assert run.take_requests() == {"save", "sample"}
        assert run.take_requests() == set()
        text = client().get(f"/run/{run.name}").text
        assert "A grid is drawn" not in text  # another server was asked
        launcher.ask(run, "sample")
        assert launcher.asked(run) == ["sample"]
        draw_grid(run, 4)
        assert launcher.asked(run) == []
        assert not launcher.is_stopping(run)
        launcher.stop(run)
        assert launcher.is_stopping(run)
    finally:
        process.kill()
        process.wait()
    assert not launcher.is_stopping(run)


def test_prune(launcher, make_run):
    """R-24: the newest checkpoint and all that is saved to use stay."""
    run = make_run(done=4)
    for step in (2, 4):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "state.json").write_text("{}")
    run.adapters.mkdir()
    run.step_adapter(2).touch()
    launcher.prune(run)
    assert run.checkpoint_steps() == [4]
    assert run.saved_steps() == [2]


@pytest.mark.slow
def test_a_run_from_form_to_file(client, make_images, runs, shared_cache):
    """R-16, R-23: the plan is shown; the run starts, is followed, and can be made longer."""
    images = make_images()
    form = {"images": name_folder(images), "train.steps": "2", "lora.rank": "2", "train.sample_every": "0"}
    page = client(images)
    planned = page.post("/plan", data=form).text
    assert "of rank 2" in planned
    assert 'action="/start"' in planned
    hidden = dict(re.findall(r'type="hidden" name="(.+?)" value="(.*?)"', planned))
    assert hidden == form
    started = page.post("/start", data=hidden, follow_redirects=False)
    assert started.headers["location"] == "/run/pictures"
    run = RunFolder(runs / "pictures")
    wait(lambda: run.process is None)
    assert run.is_finished(2), run.output_file.read_text()
    assert "finished" in page.get("/run/pictures").text
    page.post("/resume/pictures", data={"steps": "3"})
    wait(lambda: run.process is None)
    assert run.is_finished(3), run.output_file.read_text()
    assert not run.process_file.exists()


@pytest.mark.parametrize("library", ["uvicorn", "starlette"])
def test_without_the_extra(sdlora, monkeypatch, library):
    """R-35: one line that says what to install."""
    for name in [name for name in sys.modules if name.startswith(("sdlora.studio", library))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    code, _, lines = sdlora("studio", "runs")
    assert (code, len(lines)) == (2, 1)
    assert "sdlora[studio]" in lines[0]


def test_mistakes_in_the_command(sdlora, tmp_path):
    """R-35: what is no folder, or a port that is taken, is one line."""
    import socket

    (tmp_path / "file").touch()
    for arguments in ((tmp_path / "file",), ("runs", "--images", tmp_path / "no")):
        assert sdlora("studio", *arguments)[0] == 2
        assert "studio.folder" in sdlora.keys
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert sdlora("studio", "runs", "--port", taken.getsockname()[1])[0] == 2
        assert "option--port" in sdlora.keys


def test_the_command_serves_until_it_is_stopped(runs, make_run):
    """R-23, R-35: it prints its address, with the token; Ctrl-C ends it with 130."""
    make_run()
    command = [sys.executable, "-m", "sdlora", "studio", str(runs / "style"), "--port", "0", "--token"]
    # In the background of a shell, Ctrl-C is ignored from the start.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    )
    try:
        address = server.stdout.readline().split()[-1]
        assert address.startswith("http://127.0.0.1:")
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        assert b"/run/style" in opener.open(address, timeout=HANG_SECONDS).read()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address.partition("?")[0], timeout=HANG_SECONDS)
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=HANG_SECONDS)
        assert (server.returncode, "Traceback" in errors) == (130, False)
    finally:
        server.kill()
