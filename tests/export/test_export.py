"""Export: what the files of a run say, the card, the upload."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from sdlora.config import RunConfig, load_config
from sdlora.errors import AdapterError, RunError
from sdlora.export.export import export_adapter, push_run
from sdlora.export.metadata import TrainingMetadata, run_metadata
from sdlora.export.model_card import write_model_card
from sdlora.formats.files import load_adapter, save_adapter
from sdlora.formats.write import relative_error
from sdlora.runs import RunFolder
from tests.checks import raises
from tests.lora_fixtures import metadata_of

FACTS = TrainingMetadata(
    title="ink",
    base_name="owner/base",
    base_digest="d1" * 32,
    family="sd1",
    kohya_version="sd_v1",
    kohya_v2=False,
    architecture="stable-diffusion-v1",
    prediction_type="v_prediction",
    trigger="inkstyle",
    rank=4,
    alpha=2.0,
    targets=("attention",),
    steps=200,
    images_seen=800,
    repeats={1: 2, 10: 1},
    dataset_digest="ab" * 32,
    resolution=128,
    batch_size=4,
    learning_rate=1e-3,
    optimizer="adamw",
    schedule="constant",
    precision="bf16",
    seed=7,
    date="2026-03-04T05:06:07.123456+00:00",
    versions={"sdlora": "0.1.0", "torch": "2.13.0"},
)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_report_says_what_was_written(tmp_path, make_adapter, dialect):
    """R-36: precision, error and newly-zero share are measured and printed; fp16 is the default."""
    report = export_adapter(make_adapter(), tmp_path / "x.safetensors", dialect=dialect)
    assert report.precision == "fp16"
    assert report.size_bytes == report.path.stat().st_size
    assert 0 < report.rounding.relative_error < 1e-3
    assert {tensor.dtype for tensor in load_file(report.path).values()} == {torch.float16}
    text = "\n".join(report.lines())
    assert "relative error" in text
    assert "newly zero 0.00%" in text
    assert dialect in text


def test_what_fp16_cannot_hold_stays_fp32(tmp_path, make_adapter):
    """R-36: the file is fp32, and the report says why."""
    report = export_adapter(make_adapter(size=1e-7), tmp_path / "x.safetensors")
    assert report.precision == "fp32"
    assert {tensor.dtype for tensor in load_file(report.path).values()} == {torch.float32}
    assert "so it stays fp32" in str(report)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_precision_as_asked(tmp_path, make_adapter, precision):
    """R-36: each precision is written when asked for."""
    report = export_adapter(make_adapter(), tmp_path / "x.safetensors", precision=precision)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert report.precision == precision
    assert {tensor.dtype for tensor in load_file(report.path).values()} == {dtype}


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_exporting_twice_gives_the_same_bytes(tmp_path, make_adapter, dialect):
    """R-42: dates are the run's own."""
    one, two = (
        export_adapter(
            make_adapter(), tmp_path / f"{name}.safetensors", dialect=dialect, metadata=run_metadata(FACTS)
        )
        for name in ("1", "2")
    )
    assert one.path.read_bytes() == two.path.read_bytes()


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_metadata_of_a_run(tmp_path, make_adapter, dialect):
    """R-42 R-02: the keys that tools read, all text, and true of the tensors."""
    path = export_adapter(
        make_adapter(), tmp_path / "x.safetensors", dialect=dialect, metadata=run_metadata(FACTS)
    ).path
    metadata = metadata_of(path)
    expected = {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": "owner/base",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_output_name": "ink",
        "ss_steps": "200",
        "ss_resolution": "(128, 128)",
        "ss_num_train_images": "12",
        "ss_training_started_at": "1772600767.123456",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "ink",
        "modelspec.resolution": "128x128",
        "modelspec.date": "2026-03-04T05:06:07+00:00",
        "modelspec.trigger_phrase": "inkstyle",
        "modelspec.prediction_type": "v",
        "sdlora.family": "sd1",
        "sdlora.base_digest": "d1" * 32,
        "sdlora.dataset_digest": "ab" * 32,
        "sdlora.trained_alpha": "2",
        "sdlora.images_seen": "800",
        "sdlora.trigger": "inkstyle",
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert json.loads(metadata["sdlora.versions"]) == {"sdlora": "0.1.0", "torch": "2.13.0"}
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "images": {"n_repeats": 1, "img_count": 2},
        "10_images": {"n_repeats": 10, "img_count": 1},
    }
    assert json.loads(metadata["ss_network_args"]) == {}
    assert len(metadata["sshs_model_hash"]) == 64
    assert "lora_adapter_metadata" not in metadata


def test_captions_only_by_consent():
    """R-42: without consent the trigger is the only word; with it tags are counted and captions kept."""
    captions = ("inkstyle, a red fox", "inkstyle, a red fox, snow", "inkstyle")
    silent = run_metadata(FACTS)
    assert json.loads(silent["ss_tag_frequency"]) == {"images": {"inkstyle": 3}}
    assert "fox" not in json.dumps(silent)
    open_ = run_metadata(dataclasses.replace(FACTS, captions=captions))
    assert json.loads(open_["ss_tag_frequency"]) == {"images": {"a red fox": 2, "inkstyle": 3, "snow": 1}}
    assert json.loads(open_["sdlora.captions"]) == list(captions)
    nameless = run_metadata(dataclasses.replace(FACTS, trigger=None))
    assert json.loads(nameless["ss_tag_frequency"]) == {}
    assert "modelspec.trigger_phrase" not in nameless


def test_converting_keeps_the_metadata(tmp_path, make_adapter):
    """R-42 R-07: diffusers → kohya → diffusers keeps words and dates, and the bytes."""
    first = export_adapter(make_adapter(), tmp_path / "1.safetensors", metadata=run_metadata(FACTS)).path
    second = export_adapter(first, tmp_path / "2.safetensors", dialect="kohya").path
    third = export_adapter(second, tmp_path / "3.safetensors").path
    assert metadata_of(second)["modelspec.date"] == "2026-03-04T05:06:07+00:00"
    assert metadata_of(second)["sdlora.trained_alpha"] == "2"
    assert third.read_bytes() == first.read_bytes()


def test_exporting_a_run(tmp_path, make_adapter):
    """`sdlora export RUN`: the final adapter, else the newest; a run without one says so."""
    run = RunFolder.create(tmp_path / "run", RunConfig(), {})
    with raises(RunError, "run.no-adapter"):
        export_adapter(run.path, tmp_path / "out.safetensors")
    export_adapter(make_adapter(), run.step_adapter(10))
    report = export_adapter(run.path, tmp_path / "out.safetensors", dialect="kohya", precision="fp32")
    assert report.dialect == "kohya"
    assert report.precision == "fp32"
    assert set(load_adapter(report.path).modules) == set(make_adapter().modules)


@pytest.mark.parametrize("prefix", ["", "average."])
def test_exporting_a_run_starts_from_its_fp32_tensors(tmp_path, make_adapter, prefix):
    """R-36: not from the rounded file; a checkpoint of other weights is not used."""
    trained = make_adapter()
    config = load_config(None, {"lora.rank": trained.rank, "lora.alpha": trained.alpha})
    run = RunFolder.create(tmp_path / "run", config, {})
    export_adapter(trained, run.step_adapter(10))
    run.checkpoint(10).mkdir(parents=True)
    tensors = {key: value.detach() for key, value in trained.named_tensors().items()}
    averages = {prefix + key: value for key, value in tensors.items()}
    noise = {key: value + 1 for key, value in tensors.items()}
    save_file({**(noise if prefix else {}), **averages}, run.checkpoint_adapter(10))
    file = tmp_path / "out.safetensors"
    export_adapter(run.path, file, precision="fp32", step=10)
    assert relative_error(trained, load_adapter(file)) < 1e-6
    rounded = load_adapter(run.step_adapter(10))
    assert relative_error(trained, rounded) > 1e-5
    save_file(noise, run.checkpoint_adapter(10))
    export_adapter(run.path, file, precision="fp32")
    assert relative_error(rounded, load_adapter(file)) < 1e-6


def test_bad_places_and_sources(tmp_path, make_adapter):
    """Bad input: one line, exit code 2, nothing written."""
    with raises(AdapterError, "option--out", shows="x.ckpt"):
        export_adapter(make_adapter(), tmp_path / "x.ckpt")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with raises(AdapterError, "write-failed") as caught:
        export_adapter(make_adapter(), tmp_path / "file" / "x.safetensors")
    assert caught.value.exit_code == 2
    with raises(AdapterError, "lora.missing"):
        export_adapter(tmp_path / "nothing.safetensors", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_never_exported_onto_itself(tmp_path, make_adapter):
    """R-42: the source stays, by whatever path it is named."""
    source = export_adapter(make_adapter(), tmp_path / "x.safetensors", precision="fp32").path
    before = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)
    with raises(AdapterError, "option--out", shows="link.safetensors"):
        export_adapter(source, tmp_path / "link.safetensors", dialect="kohya")
    assert source.read_bytes() == before


def read_front_matter(path):
    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_model_card(tmp_path):
    """R-42: front matter that Hugging Face reads: base, trigger, widget prompts with a grid."""
    prompts = ['inkstyle, a "fox": 50% | red', "inkstyle, Füße"]
    facts = dataclasses.replace(FACTS, heldout_loss=0.123456)
    path = write_model_card(tmp_path / "README.md", facts, prompts=prompts, grid="grid.png")
    front, body = read_front_matter(path)
    (measured,) = ModelCard.load(path).data.eval_results
    assert (measured.metric_type, measured.metric_value) == ("loss", 0.1235)
    assert front["base_model"] == "owner/base"
    assert front["instance_prompt"] == "inkstyle"
    assert set(front["tags"]) >= {"lora", "diffusers", "stable-diffusion", "text-to-image"}
    assert front["pipeline_tag"] == "text-to-image"
    assert [entry["text"] for entry in front["widget"]] == prompts
    assert front["widget"][0]["output"]["url"] == "grid.png"
    assert 'from_pretrained("owner/base")' in body
    assert 'weight_name="final.safetensors"' in body
    assert "![base beside style](grid.png)" in body
    assert "| rank, alpha | 4, 2 |" in body


def test_model_card_of_the_builtin_base(tmp_path):
    """The built-in base is no hub id: no `base_model` that Hugging Face would refuse; no trigger, no grid."""
    facts = dataclasses.replace(FACTS, base_name="builtin", trigger=None)
    front, body = read_front_matter(write_model_card(tmp_path / "README.md", facts, prompts=["a fox"]))
    assert not {"base_model", "model-index"} & front.keys()
    assert "instance_prompt" not in front
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "sdlora.__file__" in code
    assert "![" not in body


class StubApi:
    """Records what the hub's client is asked to do."""

    def __init__(self, error=None):
        self.error = error
        self.repo, self.uploaded = "", {}

    def create_repo(self, repo_id, *, exist_ok):
        if self.error:
            raise self.error
        assert exist_ok
        self.repo = repo_id
        return f"https://hub.invalid/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        from pathlib import Path

        assert repo_id == self.repo
        assert commit_message
        self.uploaded = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


def test_push_of_a_run(tmp_path, make_adapter):
    """`export --push-to-hub`: both dialects, card and newest grid, in one folder; no network."""
    run = RunFolder.create(tmp_path / "run", RunConfig(), {})
    for dialect in ("diffusers", "kohya"):
        export_adapter(make_adapter(), run.final_adapter(dialect), dialect=dialect)
    export_adapter(make_adapter(), run.step_adapter(10))
    write_model_card(run.model_card, FACTS, prompts=["x"], grid="grid.png")
    for step in (10, 20):
        run.sample_folder(step).mkdir(parents=True)
        (run.sample_folder(step) / "grid.png").write_bytes(str(step).encode())
    api = StubApi()
    assert push_run(run.path, "me/ink", api=api) == "https://hub.invalid/me/ink"
    assert set(api.uploaded) == {"final.safetensors", "final.kohya.safetensors", "README.md", "grid.png"}
    assert api.uploaded["grid.png"] == b"20"
    assert api.uploaded["final.safetensors"] == run.final_adapter().read_bytes()


def test_push_of_a_file(tmp_path, make_adapter):
    """`export LORA --push-to-hub`: the file alone; what is no LoRA is not uploaded."""
    api, path = StubApi(), save_adapter(tmp_path / "ink.safetensors", make_adapter())
    push_run(path, "me/ink", api=api)
    assert set(api.uploaded) == {"ink.safetensors"}
    (tmp_path / "bad.safetensors").write_bytes(b"")
    api = StubApi()
    with raises(AdapterError, "file.empty"):
        push_run(tmp_path / "bad.safetensors", "me/ink", api=api)
    assert api.repo == ""


@pytest.mark.parametrize(
    "error",
    [OSError("no network\nsecond line"), ValueError("Repo id must be"), RuntimeError("401 Unauthorized")],
)
def test_push_that_fails_is_one_line(tmp_path, make_adapter, error):
    """No token, no network, no such name: one clear line, exit code 1."""
    path = save_adapter(tmp_path / "ink.safetensors", make_adapter())
    with raises(AdapterError, "upload-failed", shows=("me/ink", "hf auth login")) as caught:
        push_run(path, "me/ink", api=StubApi(error))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_push_without_network_uses_the_real_client(tmp_path, make_adapter):
    """R-39: the hub's own client, offline, ends in the same one line."""
    with raises(AdapterError, "upload-failed", shows="me/ink"):
        push_run(save_adapter(tmp_path / "ink.safetensors", make_adapter()), "me/ink")
