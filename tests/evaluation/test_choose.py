"""R-13, R-16, R-45: steps times strengths of a short real run."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

import sdlora
from sdlora.config import load_config
from sdlora.errors import ConfigError, ModelError, RunError
from sdlora.evaluation.choice import Choice
from sdlora.evaluation.choose import choose
from sdlora.evaluation.evaluate import evaluate
from sdlora.evaluation.features import ModelFeatures
from sdlora.evaluation.sweep import check_wanted, plan_sweep
from sdlora.formats.files import load_adapter
from sdlora.training.train import train
from tests.checks import raises
from tests.conftest import WORDS
from tests.evaluation.test_scores import draw

KEYS = {
    "data.resolution": 64,
    "data.trigger": "dotty",
    "lora.rank": 2,
    "train.steps": 4,
    "train.batch_size": 2,
    "train.learning_rate": 2e-2,
    "train.warmup": 0,
    "train.save_every": 1,
    "train.sample_every": 0,
    "train.evaluate_every": 0,
    "sample.steps": 4,
    "sample.prompts": ["{trigger}, a circle", "{trigger}, a square"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, draw_images, sd15_folder):
    folder = tmp_path_factory.mktemp("choose")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDLORA_CACHE", str(folder / "cache"))
        images = draw_images(folder / "circles", ((64, 64),) * 16)
        keys = {**KEYS, "base.source": str(sd15_folder), "data.heldout": 0.5}
        return train(images, config=load_config(None, keys, images=images), out=folder / "run", quiet=True)


def images_of(run) -> set[str]:
    return {file.name for file in run.evaluation_images.glob("*.png")}


def test_only_new_cells_are_drawn(run):
    """A second call with one more strength keeps the images; all scores are there, and what is missing."""
    seen: list[tuple[int, int]] = []
    choose(run, steps=[2, "final"], strengths=[1.0], seeds=[0], progress=lambda *done: seen.append(done))
    first, times = images_of(run), {file: file.stat().st_mtime_ns for file in run.evaluation_images.iterdir()}
    choice = choose(run, steps=[2, "final"], strengths=[0.5, 1.0], seeds=[0])
    assert [(cell.step, cell.strength) for cell in choice.cells] == [
        (2, 0.5),
        (2, 1.0),
        ("final", 0.5),
        ("final", 1.0),
    ]
    assert first < images_of(run)
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    assert seen[-1][0] == seen[-1][1]
    written = json.loads(run.evaluation_file.read_text())["choice"]
    assert len(written["cells"]) == 4
    assert set(written["cells"][0]["by_band"]) == {"0-199", "200-399", "400-599", "600-799", "800-999"}
    assert written["bleed"] is not None
    for one in written["images"]:
        file = run.path / one["file"]
        assert file.is_file()
        # The report shows the base beside each, and may be moved with the run.
        assert file.resolve().is_relative_to(run.path.resolve())
    assert run.evaluation_curve.is_file()
    # The features without weights are not known to be right for this base.
    assert choice.best is None
    assert "--features" in choice.reason


def test_held_out_samples_are_drawn_once(run):
    """R-13: a second call draws only what is new; what is wrongly asked for is refused before any."""
    with raises(RunError, "run.no-step", shows="99"):
        check_wanted(run, steps=[99])
    before = images_of(run)
    evaluate(run)
    first = images_of(run)
    assert first > before
    times = {file: file.stat().st_mtime_ns for file in run.evaluation_images.iterdir()}
    evaluate(run)
    assert images_of(run) == first
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())


def test_what_is_chosen_by_default(run):
    """Up to five saved steps with the final one, several strengths, prompts topped up by captions."""
    sweep = plan_sweep(run, [f"dotty, a circle {number}" for number in range(20)])
    assert sweep.steps == [1, 2, 3, "final"]
    assert sweep.strengths == [0.5, 0.8, 1.0]
    assert sweep.prompts[:2] == ["dotty, a circle", "dotty, a square"]
    assert len(sweep.prompts) == 8
    assert len(set(sweep.prompts)) == 8
    with raises(RunError, "run.no-step", shows="9"):
        plan_sweep(run, [], steps=[9])
    with raises(ConfigError, "option--strengths"):
        plan_sweep(run, [], strengths=[0.0, 1.0])


@pytest.fixture(scope="module", params=["clip", "dinov2"])
def vision_folder(request, tmp_path_factory):
    """CLIP or DINOv2 with random weights, as a local folder."""
    folder = tmp_path_factory.mktemp("vision") / request.param
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 32,
    }
    if request.param == "clip":
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
        config = CLIPConfig(
            text_config=text, vision_config={**small, "intermediate_size": 16}, projection_dim=8
        )
        CLIPModel(config).save_pretrained(folder)
        sides = {"size": {"shortest_edge": 32}, "crop_size": 32}
        CLIPImageProcessor(**sides).save_pretrained(folder)
    else:
        Dinov2Model(Dinov2Config(**small)).save_pretrained(folder)
        BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def test_a_vision_model_from_a_folder(vision_folder):
    """Equal images have equal features, different ones do not; the batch makes no difference."""
    features = ModelFeatures(vision_folder)
    images = [draw(number) for number in range(3)]
    for describe in (features.style, features.content):
        rows = describe([*images, images[0]])
        assert rows.shape[0] == 4
        assert rows[0] == pytest.approx(rows[3], rel=1e-4)
        assert abs(rows[0] - rows[1]).max() > 1e-6


def test_a_vision_model_decides_if_it_can_tell(run, vision_folder, monkeypatch):
    """R-13: random weights are refused, by what they get wrong on the run's own images."""
    prompts = [f"dotty, a circle {number}" for number in range(4)]
    cells = {"steps": ["final"], "strengths": [0.5], "prompts": prompts, "seeds": [0, 1]}
    choice = choose(run, features=str(vision_folder), **cells)
    assert choice.facts.features == str(vision_folder)
    assert "--features" in choice.missing
    assert choice.best is None
    assert choice.to_json()["features_right"] == asdict(choice.facts.accuracy)
    monkeypatch.setattr("sdlora.evaluation.scores.MIN_STYLE_ACCURACY", 0.0)
    monkeypatch.setattr("sdlora.evaluation.scores.MIN_CONTENT_ACCURACY", 0.0)
    assert choice.missing == ""


def test_clip_reads_prompts(run, tmp_path):
    """R-13: as transformers compares images and texts; each cell tells whose own prompt is the nearest."""
    tokenizer = CLIPTokenizer.from_pretrained(WORDS)
    tokenizer.save_pretrained(tmp_path)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {**small, "patch_size": 8, "image_size": 32}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    processor.save_pretrained(tmp_path)
    images, texts = [draw(number) for number in range(3)], ["a red circle", "a cat"]
    pixels = processor(images=images, return_tensors="pt")
    with torch.no_grad():
        told = model(**tokenizer(texts, padding=True, return_tensors="pt"), **pixels).logits_per_image
    likeness = ModelFeatures(tmp_path).likeness(images, texts)
    assert likeness == pytest.approx((told / model.logit_scale.exp()).detach().numpy(), abs=1e-5)
    # More words than it reads are cut, also where the tokenizer does not say how many it reads.
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / file).unlink(missing_ok=True)
    assert ModelFeatures(tmp_path).likeness(images, ["a cat " * 100]).shape == (3, 1)
    choice = choose(run, features=str(tmp_path), steps=["final"], strengths=[0.5], seeds=[0])
    [cell] = choice.to_json()["cells"]
    assert 0 <= cell["prompts_found"]["value"] <= 1
    assert any("prompts found" in line for line in choice.lines())
    # Without its files, transformers makes a tokenizer of two words.
    for file in [*tmp_path.glob("tokenizer*"), *tmp_path.glob("vocab*"), *tmp_path.glob("merges*")]:
        file.unlink()
    assert ModelFeatures(tmp_path).likeness(images, texts) is None


@pytest.mark.parametrize("vision_folder", ["clip"], indirect=True)
def test_compare_scores_as_evaluate(run, vision_folder, tmp_path):
    """R-13: the same scores for the same images, above their columns; and why some are missing."""
    features, prompts = str(vision_folder), [f"dotty, a circle {number}" for number in range(4)]
    [cell] = choose(run, features=features, steps=["final"], strengths=[0.5], prompts=prompts).cells
    ask = {"prompts": prompts, "seeds": [0, 1], "strengths": [0.5], "out": tmp_path / "out"}
    sources = [run, f"{run.adapter}:0.5+{run.adapter}:0.5"]
    result = sdlora.compare(sources, features=features, **ask)
    one, both = result.scores
    assert one.style.value == pytest.approx(cell.style.value, abs=0.02)
    assert one.content.value == pytest.approx(cell.content.value, abs=0.02)
    assert (both.style, both.content is None) == (None, False)
    assert any("no style score of" in note for note in result.notes)
    # Random weights are not to be trusted.
    assert any(str(features) in note for note in result.notes)
    written = json.loads((tmp_path / "out" / "compare.json").read_text())["scores"]
    assert written[0]["style"] == asdict(one.style)
    height = Image.open(result.grids[0]).height
    plain = sdlora.compare(sources, scores=True, **ask)
    assert plain.scores == []
    assert "--features" in plain.notes[-1]
    assert Image.open(plain.grids[0]).height < height


def test_a_recommendation_is_exported_with_its_strength(run, monkeypatch):
    """`best` at strength 1 is the step at the chosen strength; random weights choose nothing themselves."""
    monkeypatch.setattr(Choice, "best", property(lambda choice: choice.cells[0]))
    choice = choose(run, export=True, steps=["final"], strengths=[0.5], seeds=[0])
    assert choice.exported == run.best_adapter
    best, final = load_adapter(run.best_adapter), load_adapter(run.adapter)
    name = next(iter(final.modules))
    whole, half = (one.modules[name] for one in (final, best))
    assert half.up @ half.down == pytest.approx(0.5 * (whole.up @ whole.down), rel=1e-2, abs=1e-5)
    assert best.notes["sdlora.recommended"] == choice.cells[0].name
    assert run.saved_adapter("best") == run.best_adapter


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_features_that_cannot_be_loaded(tmp_path, kind):
    folder = tmp_path / "vision"
    if kind == "empty":
        folder.mkdir()
    with raises(ModelError, "option--features", shows=str(folder)):
        ModelFeatures(folder)


def test_features_are_loaded_before_the_base(run, sdlora, tmp_path):
    """R-35: a mistake in `--features` does not cost the losses of a large base."""
    run.evaluation_file.unlink(missing_ok=True)
    assert sdlora("evaluate", run.path, "--features", tmp_path / "gone")[0] == 2
    assert sdlora.keys == ("option--features",)
    assert not run.evaluation_file.exists()
