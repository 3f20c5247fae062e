"""Commands as people type them: one clear line and exit code 2 for a mistake, nothing written or lost."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.main import get_command

from sdlora.cli import PANELS, app
from sdlora.evaluation.evaluate import evaluate
from sdlora.formats.files import save_adapter
from sdlora.lora.adapter import Adapter
from sdlora.lora.kinds import LowRank
from sdlora.models.info import BUILTIN_DEFAULTS
from sdlora.runs import RunFolder
from tests.checks import HANG_SECONDS

QUICK = [
    "data.resolution=64",
    "lora.rank=2",
    "train.batch_size=2",
    "train.steps=2",
    "train.save_every=0",
    "train.sample_every=0",
    "train.evaluate_every=0",
    "sample.steps=2",
    "sample.seeds=0",
    "sample.strengths=1",
]


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def small_run(sdlora, make_images, tmp_path):
    """A finished run of two steps."""
    code, _, errors = sdlora("train", make_images("drawings"), "--out", tmp_path / "run", *QUICK)
    assert code == 0, errors
    return RunFolder(tmp_path / "run")


def make_lora(path: Path, family: str = "sd1", width: int = 4) -> Path:
    pair = LowRank(torch.ones(1, width), torch.ones(width, 1))
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    return save_adapter(path, Adapter({module: pair}, 1, 1.0, family))


# Arguments, key of the error, and values that the line shows.
MISTAKES = {
    "no folder": (["train", "nowhere"], "data.folder-missing", ["nowhere"]),
    "empty folder": (["train", "{empty}"], "data.no-images", ["{empty}", "empty"]),
    "folder without images": (["train", "{texts}"], "data.no-images", ["1 .md"]),
    "captions missing": (["train", "{bare}"], "data.captions-missing", ["a.png", "data.trigger"]),
    "unknown key": (["train", "{images}", "lora.rnk=4"], "lora.rnk", ["lora.rank"]),
    "wrong type": (["train", "{images}", "train.steps=soon"], "train.steps", ["'soon'"]),
    "rank 0": (["train", "{images}", "lora.rank=0"], "lora.rank", ["0"]),
    "no such config": (["train", "{images}", "--config", "none.toml"], "config.missing", ["none.toml"]),
    "no such base": (["train", "{images}", "--base", "nobase"], "base.missing", ["base.source = nobase"]),
    "a LoRA as base": (["train", "{images}", "--base", "{lora}"], "base.is-lora", ["base.source = {lora}"]),
    "a folder as base": (
        ["train", "{images}", "--base", "{texts}"],
        "base.not-a-base",
        ["base.source = {texts}", "model_index.json"],
    ),
    "no such target": (["train", "{images}", "lora.targets=foo"], "lora.targets", ["'foo'"]),
    "a bad resolution": (["train", "{images}", "data.resolution=100"], "data.resolution", ["100", "8"]),
    "no such tracker": (
        ["train", "{images}", "train.trackers=wandbb"],
        "train.trackers",
        ["'wandbb'", "wandb"],
    ),
    "fp16 on a CPU": (["train", "{images}", "train.precision=fp16"], "train.precision", ["fp16", "bf16"]),
    "a placeholder without a trigger": (
        ["train", "{images}", "sample.prompts=a {{trigger}} cat"],
        "sample.prompts",
        ["'a {{trigger}} cat'", "data.trigger"],
    ),
    "another prediction": (
        ["train", "{images}", "objective.prediction_type=epsilon"],
        "objective.prediction_type",
        ["epsilon", "v_prediction", "objective.force_prediction_type"],
    ),
    "out is a file": (["train", "{images}", "--out", "{text}"], "run.file", ["--out {text}"]),
    "out below a file": (["train", "{images}", "--out", "{text}/run"], "option--out", ["--out {text}/run"]),
    "resume of no run": (["resume", "{empty}"], "run.no-config", ["{empty}", "config.json"]),
    "resume of nothing": (["resume", "nowhere"], "run.missing", ["nowhere"]),
    "sample of nothing": (
        ["sample", "nowhere.safetensors", "--prompt", "a cat"],
        "lora.missing",
        ["nowhere.safetensors"],
    ),
    "sample of a text": (["sample", "{text}", "--prompt", "a cat"], "file.not-safetensors", ["{text}"]),
    "an empty prompt": (["sample", "--prompt", " "], "sample.prompts", []),
    "no prompt": (["sample"], "sample.prompts", ["--prompt"]),
    "strengths that are none": (
        ["sample", "--prompt", "x", "--strengths", "a,b"],
        "option--strengths",
        ["a,b"],
    ),
    "a size that is none": (["sample", "--prompt", "x", "--size", "big"], "option--size", ["big"]),
    "a size of nothing": (["sample", "--prompt", "x", "--size", "0x64"], "option--size", ["0x64"]),
    "no such scheduler": (
        ["sample", "--prompt", "x", "--scheduler", "Eulr"],
        "sample.scheduler",
        ["'Eulr'", "EulerDiscreteScheduler"],
    ),
    "prompts that are none": (["sample", "--prompts", "{text}"], "option--prompts.empty", ["{text}"]),
    "prompts with options": (["sample", "--prompts", "{kohya}"], "option--prompts.options", ["--n"]),
    "a LoRA of another family": (
        ["sample", "{lora2}", "--base", "builtin", "--prompt", "x"],
        "lora.family",
        ["{lora2}", "sd2", "sd1", "--base"],
    ),
    "a LoRA of another shape": (
        ["sample", "{lora}", "--base", "builtin", "--prompt", "x"],
        "lora.other-base",
        ["{lora}", "down_blocks.0"],
    ),
    "a LoRA without a base": (["sample", "{lora}", "--prompt", "x"], "option--base", ["{lora}", "--base"]),
    "info of a truncated file": (["info", "{cut}"], "file.incomplete", ["{cut}"]),
    "info of a text": (["info", "{text}"], "file.not-safetensors", ["{text}"]),
    "info of another kind": (
        ["info", "{weights}"],
        "lora.not-a-lora",
        ["{weights}", "decoder.conv_in.weight"],
    ),
    "a pickle": (["info", "{pickle}"], "file.pickle", ["{pickle}"]),
    "export to nowhere": (["export", "{lora}"], "option--out", ["--push-to-hub"]),
    "export to no dialect": (
        ["export", "{lora}", "--format", "onnx", "--out", "x.safetensors"],
        "export.formats",
        ["'onnx'"],
    ),
    "a name that is too long": (["info", "x" * 3000], "path", ["…", "File name too long"]),
    "a plot below a file": (["spectrum", "{lora}", "--plot", "{text}/x.png"], "path", ["{text}"]),
    "a plot in place of a LoRA": (
        ["spectrum", "{lora}", "--plot", "{lora}"],
        "option--plot",
        ["{lora}", ".png"],
    ),
    "a sheet in place of a text": (
        ["doctor", "{images}", "--contact-sheet", "{text}"],
        "option--contact-sheet",
        ["{text}", ".png"],
    ),
    "a sheet among the images": (
        ["doctor", "{images}", "--contact-sheet", "{images}/0.png"],
        "option--contact-sheet",
        ["{images}/0.png"],
    ),
    "a merged base below a file": (
        ["merge-into-base", "{lora}", "--base", "builtin", "--out", "{text}/x"],
        "option--out",
        ["--out {text}/x"],
    ),
    "a merge of this folder": (["merge-into-base", ".", "--out", "x"], "lora.missing", [". "]),
    "a grid by the name of an image": (
        ["sample", "--base", "builtin", "--prompt", "a cat", "--out", "x/grid.png"],
        "option--out.image",
        ["--out x/grid.png", "folder"],
    ),
    "samples among somebody's images": (
        ["sample", "--base", "builtin", "--prompt", "a cat", "--out", "{images}"],
        "option--out.grid",
        ["--out {images}", "images, such as"],
    ),
    "prompts from a device": (["sample", "--prompts", "/dev/zero"], "option--prompts", ["/dev/zero"]),
    "an empty base": (["sample", "--base", "", "--prompt", "x"], "base.source", ["''"]),
    "an extract of nothing": (
        ["extract", "", "--base", "builtin", "--out", "x.safetensors"],
        "base.source",
        ["''"],
    ),
    "export to no safetensors": (
        ["export", "{lora}", "--out", "x.pt"],
        "option--out",
        ["--out x.pt", ".safetensors"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(sdlora, make_images, tmp_path, name):
    """R-25, R-26, R-30, R-35, R-40, R-41: what, the value, the remedy; exit 2; no file is left behind."""
    arguments, key, shows = MISTAKES[name]
    places = {
        kind: tmp_path / kind
        for kind in ("empty", "texts", "bare", "text", "kohya", "lora", "lora2", "cut", "weights", "pickle")
    }
    places["images"] = make_images("images")
    for kind in ("empty", "texts", "bare"):
        places[kind].mkdir()
    (places["texts"] / "notes.md").write_text("# notes", encoding="utf-8")
    Image.new("RGB", (64, 64)).save(places["bare"] / "a.png")
    places["text"].write_text("# a comment\n", encoding="utf-8")
    places["kohya"].write_text("a cat\na hill --n blurry --w 512\n", encoding="utf-8")
    for kind in ("lora", "lora2", "cut", "weights"):
        places[kind] = places[kind].with_suffix(".safetensors")
    make_lora(places["lora"])
    make_lora(places["lora2"], "sd2")
    places["cut"].write_bytes(places["lora"].read_bytes()[:-9])
    save_file({"decoder.conv_in.weight": torch.ones(2)}, places["weights"])
    places["pickle"] = places["pickle"].with_suffix(".pt")
    places["pickle"].write_bytes(b"PK\x03\x04")
    before = files_below(tmp_path)

    code, _, errors = sdlora(*(argument.format(**places) for argument in arguments))

    assert code == 2, errors
    assert len(errors) == 1, errors
    assert errors[0].startswith("sdlora: ")
    assert key in sdlora.keys
    for value in shows:
        assert value.format(**places) in errors[0]
    assert files_below(tmp_path) == before


def test_a_run_is_never_overwritten(sdlora, small_run, make_images):
    """A folder that holds a run is refused; without --out a free name is taken."""
    before = {path: path.read_bytes() for path in small_run.path.rglob("*") if path.is_file()}
    code, _, errors = sdlora("train", make_images("more"), "--out", small_run.path, *QUICK)
    assert (code, len(errors)) == (2, 1)
    assert str(small_run.path) in errors[0]
    assert {path: path.read_bytes() for path in small_run.path.rglob("*") if path.is_file()} == before


def test_a_trigger_is_caption_enough(sdlora, make_images):
    """R-30: a folder without captions is accepted with --trigger, as the README says, and refused without."""
    images = make_images("bare")
    for caption in images.rglob("*.txt"):
        caption.unlink()
    code, _, errors = sdlora("train", images, "--dry-run")
    assert (code, len(errors)) == (2, 1)
    code, printed, errors = sdlora("train", images, "--trigger", "inkwash style", "--dry-run")
    assert (code, errors) == (0, [])
    assert "from trigger" in printed


def test_default_names(sdlora, make_images):
    """`runs/NAME` after the image folder, `runs/NAME-2` when that is taken; the base's own learning rate."""
    images = make_images("style")
    code, printed, _ = sdlora("train", images, *QUICK, "train.evaluate_every=1")
    assert code == 0
    assert printed.startswith("device    ")
    assert "built-in base" in printed
    assert f"learning rate {BUILTIN_DEFAULTS.learning_rate:g}" in printed
    for step in range(3):
        assert f"\nstep {step} " in printed
    assert "runs/style/webui/style.safetensors (" in printed
    assert "<lora:style:1>" in printed
    assert "pipe.load_lora_weights(" in printed
    code, printed, _ = sdlora("train", images, *QUICK, "train.learning_rate=2e-4")
    assert code == 0
    assert "learning rate 0.0002" in printed
    # The plan says which folder, and why.
    assert re.search(r"^run +runs/style-2, .*runs/style", printed, re.MULTILINE)
    assert files_below(Path("runs"))[0] == "style"
    assert (Path("runs") / "style-2" / "adapters" / "final.safetensors").is_file()


def test_dry_run(sdlora, make_images):
    """R-16: the plan is printed, no weight is loaded, nothing is written."""
    code, printed, _ = sdlora("train", make_images("style", ((64, 64),) * 5), "--dry-run", *QUICK)
    assert code == 0
    for part in ("5 images", "global batch 2", "modules", "rank 2", "disk"):
        assert part in printed
    assert printed.splitlines()[-1].startswith("dry run:")
    assert files_below(Path()) == []


def test_sample_verb(sdlora, small_run, tmp_path):
    """prompts × strengths × seeds, base first; each --step; never over an older grid; the base alone."""
    out = tmp_path / "grids"
    code, _, errors = sdlora(
        "sample",
        small_run.path,
        "--prompt",
        "a red circle",
        "--prompt",
        "a dog",
        "--strengths",
        "0,0.5,1",
        "--seeds",
        "3",
        "--steps",
        2,
        "--out",
        out,
        "--size",
        "64x96",
    )
    assert code == 0, errors
    assert files_below(out) == [*(f"{n:02d}.png" for n in range(6)), "grid.png"]
    with Image.open(out / "05.png") as image:
        assert image.size == (64, 96)
        assert image.text["parameters"].startswith("a dog")
        assert "Seed: 3" in image.text["parameters"]
    code, _, errors = sdlora("sample", small_run.path, "--prompt", "x", "--out", out)
    assert (code, str(out) in errors[0]) == (2, True)
    quick = ("--prompt", "a dog", "--strengths", "0.5,1", "--seeds", 3, "--steps", 2, "--size", "64x64")
    both = tmp_path / "both"
    code, _, errors = sdlora(
        "sample", small_run.path, "--step", "2", "--step", "final", *quick, "--out", both
    )
    assert code == 0, errors
    described = [json.loads(Image.open(both / f"{n:02d}.png").text["sdlora"]) for n in range(5)]
    assert [(one["strength"], one["adapter"]) for one in described[1:]] == [
        (0.5, "step 2"), (1.0, "step 2"), (0.5, "final"), (1.0, "final"),
    ]  # fmt: skip
    assert described[0]["strength"] == 0
    assert sdlora("sample", small_run.path, "--step", "2,final", *quick, "--out", tmp_path / "list")[0] == 0
    assert (tmp_path / "list" / "grid.png").read_bytes() == (both / "grid.png").read_bytes()
    for wrong in (("2,soon",), ("2", "--step", "7")):
        assert sdlora("sample", small_run.path, "--step", *wrong)[0] == 2
    code, _, errors = sdlora("sample", "--step", 2, *quick)
    assert (code, sdlora.keys) == (2, ("option--step",))
    code, _, errors = sdlora("sample", small_run.path, "--step", 7)
    assert code == 2
    assert {"7", "2"} <= set(re.findall(r"[0-9]+", errors[0]))
    code, _, errors = sdlora("sample", "--prompt", "a cat", "--seeds", "0", "--steps", 2, "--size", "64x64")
    assert code == 0, errors
    assert files_below(Path("samples/base")) == ["00.png", "grid.png"]
    code, _, errors = sdlora("sample", small_run.adapter, "--prompt", "a cat", "--steps", 2, "--seeds", 0)
    assert code == 0, errors
    assert files_below(Path("samples/final")) == ["00.png", "01.png", "02.png", "03.png", "grid.png"]


def test_sample_several(sdlora, small_run, tmp_path):
    """R-13: side by side in one grid, called as the runs are, whatever the files are called."""
    other = tmp_path / "ink.v2" / "adapters" / small_run.adapter.name
    other.parent.mkdir(parents=True)
    shutil.copy(small_run.adapter, other)
    shutil.copy(small_run.config_file, other.parent.parent)
    out = tmp_path / "grids"
    common = ("--prompt", "a cat", "--steps", 2, "--seeds", 0, "--size", "64x64", "--strengths", 1)
    code, _, errors = sdlora("sample", small_run.adapter, other, *common, "--out", out)
    assert code == 0, errors
    described = [json.loads(Image.open(out / f"{n:02d}.png").text["sdlora"]) for n in range(3)]
    assert [one.get("adapter") for one in described] == [None, small_run.name, "ink.v2"]


def test_all_subjects_are_checked_before_the_first_image(sdlora, small_run, tmp_path):
    """A mistake in the second leaves nothing of the first; two of one name have a number."""
    quick = ["--base", "builtin", "--prompt", "x", "--steps", 1, "--seeds", 0, "--size", "64x64"]
    blocked = tmp_path / "blocked"
    blocked.write_text("", encoding="utf-8")
    for sources, out, message in (
        ([small_run.adapter, "nowhere"], "grids", "nowhere"),
        ([small_run.adapter, make_lora(tmp_path / "b.safetensors", "sdxl")], "grids", "sdxl"),
        ([small_run.adapter], blocked, str(blocked)),
        ([small_run.adapter], blocked / "grids", str(blocked / "grids")),
    ):
        code, _, errors = sdlora("sample", *sources, *quick, "--out", tmp_path / out)
        assert (code, len(errors)) == (2, 1)
        assert message in errors[0]
        assert not (tmp_path / "grids").exists()
    twice = [small_run.adapter, small_run.adapter]
    code, _, errors = sdlora("sample", *twice, *quick, "--out", tmp_path / "grids")
    assert code == 0, errors
    described = [json.loads(Image.open(tmp_path / "grids" / f"{n:02d}.png").text["sdlora"]) for n in (1, 4)]
    assert [one["adapter"] for one in described] == ["run", "run (2)"]


def test_a_run_that_is_not_finished(sdlora, small_run, tmp_path):
    """Its newest adapter is used, with a note; without any there is one line, and no file."""
    for file in small_run.adapters.glob("final*"):
        file.unlink()
    commands = [
        ("spectrum",),
        ("sample", "--prompt", "x", "--steps", 1, "--seeds", 0, "--out", tmp_path / "grid"),
        ("resize", "--rank", 1, "--out", tmp_path / "small.safetensors"),
        ("merge", "--out", tmp_path / "sum.safetensors"),
        ("export", "--out", tmp_path / "copy.safetensors"),
        ("merge-into-base", "--out", tmp_path / "base"),
    ]
    for verb, *options in commands:
        code, printed, errors = sdlora(verb, small_run.path, *options)
        assert code == 0, errors
        note = printed.splitlines()[0]
        assert note.startswith(f"note: {small_run.path} ")
        assert "step-000002.safetensors" in note
    shutil.rmtree(small_run.adapters)
    before = files_below(tmp_path)
    for verb, *options in [*commands, ("evaluate",), ("advise-rank",), ("info",), ("tree",)]:
        code, _, errors = sdlora(verb, *(["show"] if verb == "tree" else []), small_run.path, *options)
        assert (code, len(errors)) == (2, 1), verb
        assert str(small_run.path) in errors[0]
        assert verb == "tree" or sdlora.keys == ("run.no-adapter",)
    assert files_below(tmp_path) == before


def test_export_info_cache_doctor(sdlora, small_run, make_images, tmp_path):
    """The verbs that read and convert."""
    out = tmp_path / "mine.safetensors"
    code, printed, _ = sdlora("export", small_run.path, "--format", "kohya", "--out", out)
    assert code == 0
    assert "kohya" in printed
    code, printed, _ = sdlora("info", small_run.path)
    assert code == 0
    assert printed.startswith(f"run       {small_run.path}, finished at step ")
    assert f"file      {small_run.adapter}" in printed
    code, printed, _ = sdlora("info", out)
    assert code == 0
    for part in ("sd1", "kohya", "rank"):
        assert part in printed
    peft = tmp_path / "peft"
    peft.mkdir()
    code, _, errors = sdlora("export", small_run.path, "--out", peft / "adapter_model.safetensors")
    assert code == 0, errors
    code, printed, errors = sdlora("info", peft)
    assert code == 0, errors
    assert "diffusers" in printed
    assert sdlora("export", peft, "--format", "kohya", "--out", out)[0] == 0
    code, printed, _ = sdlora("cache", "--clear")
    assert code == 0
    assert "cleared" in printed
    sheet = tmp_path / "sheet.png"
    code, printed, _ = sdlora("doctor", make_images("folder"), "--contact-sheet", sheet)
    assert code == 0
    assert printed.splitlines()[-1] == "ready to train"
    assert sheet.is_file()
    bad = make_images("bad")
    (bad / "broken.png").write_bytes(b"\x89PNG\r\n")
    code, printed, _ = sdlora("doctor", bad)
    assert code == 1
    assert "broken.png" in printed


def test_evaluate_verb(sdlora, make_images, tmp_path):
    """Held-out loss and style distance, of the base and with the style."""
    images = make_images("eight", ((64, 64),) * 8)
    arguments = ["--trigger", "dotty", "data.heldout=0.25", *QUICK]
    assert sdlora("train", images, "--out", tmp_path / "run", *arguments)[0] == 0
    code, printed, errors = sdlora("evaluate", tmp_path / "run", "--strengths", "1", "--seeds", "0")
    assert code == 0, errors
    assert "held-out loss" in printed
    assert "style distance" in printed
    assert "without trigger" in printed
    assert RunFolder(tmp_path / "run").evaluation_file.is_file()
    _, printed, _ = sdlora("evaluate", tmp_path / "run", "--json", "--strengths", "1", "--seeds", "0")
    assert json.loads(printed)["images"] == 2
    seen: list[tuple[int, int]] = []
    evaluate(tmp_path / "run", progress=lambda *done: seen.append(done))
    assert seen == [], "all of its samples are there"


def test_version_and_help(sdlora):
    """`--version`, and `--help` for every verb."""
    code, printed, _ = sdlora("--version")
    assert (code, printed.split()[0]) == (0, "sdlora")
    for verb in ("train", "resume", "sample", "evaluate", "doctor", "export", "info", "cache"):
        code, printed, _ = sdlora(verb, "--help")
        assert code == 0
        assert "Usage" in printed
        assert sdlora(verb, "-h") == (0, printed, [])
    assert sdlora("tree", "show", "-h")[0] == 0


def test_json_for_programs(sdlora, small_run, make_images):
    """`--json` prints one JSON value and nothing else: plan, doctor, info, evaluate and settings."""
    images, bare = make_images("style", ((64, 64),) * 5), make_images("bare")
    for caption in bare.glob("*.txt"):
        caption.unlink()

    def read(*arguments: object) -> Any:
        code, printed, errors = sdlora(*arguments, "--json")
        assert (code, errors) == (0, [])
        return json.loads(printed)

    plan = read("train", images, "--trigger", "ink", *QUICK)
    assert (plan["steps"], plan["images"], plan["settings"]["data"]["trigger"]) == (2, 5, "ink")
    assert plan["memory"]
    assert not Path("runs").exists()
    assert read("doctor", images)["ready"] is True
    code, printed, _ = sdlora("doctor", bare, "--json")
    report = json.loads(printed)
    assert (code, report["ready"]) == (1, False)
    assert [one["key"] for one in report["findings"] if one["severity"] == "error"] == [
        "data.captions-missing"
    ]
    about = read("info", small_run.path)
    assert (about["family"], about["ranks"]) == ("sd1", {"2": about["ranks"]["2"]})
    assert "finished at step 2" in about["run"][0]
    assert read("settings", "min_snr")["objective"]["min_snr_gamma"]["default"] == 0


def test_quiet(sdlora, make_images):
    """Nothing but errors."""
    assert sdlora("train", make_images("style"), "--quiet", *QUICK) == (0, "", [])
    assert RunFolder("runs/style").adapter.is_file()


@pytest.mark.parametrize(
    ("verb", "default"),
    [
        (("train",), "(builtin)"),
        (("sample",), "(the run's, or builtin)"),
        (("merge",), "(1 each)"),
        (("tree", "flatten"), "(exact)"),
    ],
)
def test_help_says_what_happens_without_an_option(sdlora, verb, default, monkeypatch):
    """Square brackets in a help text are taken for markup and vanish."""
    monkeypatch.setenv("COLUMNS", "200")
    _, printed, _ = sdlora(*verb, "--help")
    assert f"[default: {default}]" in printed


def test_help_is_quick():
    """`sdlora --help` imports typer and what it needs: a tenth of a second, where torch alone takes three."""
    code = (
        "import sys; sys.argv = ['sdlora', '--help']\n"
        "from sdlora.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = done.stdout.splitlines()[-1].split()
    assert not {"torch", "numpy", "PIL", "pydantic", "diffusers", "transformers"} & set(modules)
    assert 100 < len(modules) < 500


@pytest.mark.parametrize("verb", ["train images", "sample --prompt cat"])
def test_a_wrong_base_needs_no_torch(verb, tmp_path):
    """R-25, R-35: half a download is named at once, not after the seconds that torch and diffusers take."""
    file = tmp_path / "half.safetensors"
    file.write_bytes((2**20).to_bytes(8, "little") + b"{")
    refused = refused_without_torch([*verb.split(), "--base", str(file)], tmp_path)
    assert refused.startswith(f"sdlora: {file} is incomplete")


def test_an_image_that_is_not_there_needs_no_torch(tmp_path):
    """R-35: nor does it need a base."""
    arguments = ["sample", "--base", "builtin", "--prompt", "cat", "--image", "none.png"]
    assert "none.png" in refused_without_torch(arguments, tmp_path)


@pytest.mark.parametrize("base", ["builtin", "somebody/model"])
def test_a_mistake_in_a_folder_needs_no_torch(base, make_images, tmp_path):
    """R-05, R-35: in a second, where torch and diffusers take ten; all mistakes of a folder at once."""
    images = make_images()
    (images / "01.txt").unlink()
    (images / "02.png").write_bytes(b"")
    unreadable, partial = refused_without_torch(["train", str(images), "--base", base], tmp_path).splitlines()
    assert "02.png" in unreadable
    assert "01.png" in partial


def refused_without_torch(arguments: list[str], folder: Path) -> str:
    """What a command prints that ends with exit code 2 before torch is imported."""
    code = (
        f"import sys; sys.argv = ['sdlora', *{arguments!r}]\n"
        "from sdlora.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert stop.code == 2 and 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def start_training(images: Path, out: Path, steps: int) -> subprocess.Popen[str]:
    quick = [part for part in QUICK if not part.startswith(("train.steps", "train.save_every"))]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sdlora",
            "train",
            str(images),
            "--out",
            str(out),
            *quick,
            f"train.steps={steps}",
            "train.save_every=2",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_checkpoint(run: RunFolder, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + HANG_SECONDS
    while not run.checkpoint_steps():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["interrupt", pytest.param("kill", marks=pytest.mark.slow)])
def test_stopping_a_process(make_images, tmp_path, how):
    """R-23: Ctrl-C saves and exits 130; kill -9 leaves the last checkpoint; both go on."""
    run = RunFolder(tmp_path / "run")
    process = start_training(make_images("drawings"), run.path, 10_000)
    try:
        wait_for_checkpoint(run, process)
        process.send_signal(signal.SIGINT if how == "interrupt" else signal.SIGKILL)
        _, errors = process.communicate(timeout=HANG_SECONDS)
    finally:
        process.kill()
    steps = run.checkpoint_steps()
    if how == "interrupt":
        assert process.returncode == 130
        assert errors.splitlines()[-1].startswith(
            f"sdlora: stopped at step {steps[-1]} of 10000; `sdlora resume"
        )
        assert run.saved_steps()[-1] == steps[-1]
    assert steps
    from sdlora.training.train import resume

    resume(run.path, {"train.steps": steps[-1] + 1}, quiet=True)
    assert run.adapter.name == "final.safetensors"
    assert [event["step"] for event in run.events("step")] == list(range(1, steps[-1] + 2))


def test_every_command_has_its_place_in_the_help():
    """A new command that no panel names would be missing from `sdlora --help`."""
    listed = [name for names in PANELS.values() for name in names]
    assert sorted(listed) == sorted(get_command(app).commands)


def test_repairs_wait_for_an_answer(sdlora, make_images, monkeypatch):
    """R-15: without one nothing is moved, and there is no traceback; beside JSON they go to stderr."""
    images = make_images()
    (images / "copy.png").write_bytes((images / "00.png").read_bytes())
    (images / "copy.txt").write_text("a copy", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, _, errors = sdlora("doctor", images, "--fix")
    assert (code, errors[-1]) == (130, "sdlora: stopped")
    assert (images / "copy.png").is_file()
    _, printed, errors = sdlora("doctor", images, "--fix", "--yes", "--json")
    assert "findings" in json.loads(printed)
    assert any("copy.png" in line for line in errors)
    assert not (images / "copy.png").exists()
