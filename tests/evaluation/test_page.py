"""The report of a run: one page, whatever strangers wrote into captions."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from sdlora.config import load_config
from sdlora.evaluation.page import write_report
from sdlora.runs import RunFolder
from sdlora.sampling.images import SampledImage, write_image
from tests.browser import PHONE, width_beyond

EVIL = """</td><script>alert(1)</script><img src=http://evil.example/x onerror="alert(2)">{{ 7 * 7 }}&'"""


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def bare(make_images, tmp_path):
    """A run as its files say, without a model: a few events, captions of a stranger."""
    images = make_images()
    (images / "00.txt").write_text(EVIL, encoding="utf-8")
    keys = {"lora.rank": 5, "sample.prompts": [EVIL], "data.trigger": "<b>ink"}
    config = load_config(None, keys, images=images)
    run = RunFolder.create(tmp_path / "run <i>", config, {"versions": {"torch": "9.8.7"}, "device": EVIL})
    run.adapters.mkdir(exist_ok=True)
    run.final_adapter("diffusers").write_bytes(b"x")
    run.final_adapter("kohya").write_bytes(b"y")
    run.append("plan", 0, memory={"stages": {"training": 97_000_000}}, base_digest="abc")
    run.append("prepared", 0)
    run.append("step", 1, loss=0.5, steps_per_second=2.0, memory_mb=123.4)
    return run


@pytest.fixture
def run(bare):
    """The run with two large grids, and no single images."""
    for step in (10, 20):
        folder = bare.sample_folder(step)
        folder.mkdir(parents=True)
        Image.effect_noise((3000, 2000), 90).save(folder / "grid.png")
    return bare


def test_one_page_with_everything(run):
    """R-13, R-45: samples of every step, captions, changed settings, versions, costs, and three programs."""
    file = write_report(run)
    assert file == run.path / "report.html"
    assert file.stat().st_size < 10e6
    page = Page(file.read_text(encoding="utf-8"))
    for part in ("Step 10", "Step 20", "lora.rank", "9.8.7", "123 MB", "97 MB", "a circle number 1", "abc"):
        assert part in page.text
    assert "data.flip" not in page.text
    assert {"diffusers", "A1111 and Forge", "ComfyUI"} <= set(page.text.splitlines())
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 3
    assert all(attributes["alt"] for attributes in pictures)


def test_text_of_strangers_stays_text(sampled):
    """Captions, prompts and names are escaped; nothing is loaded or run."""
    text = write_report(sampled).read_text(encoding="utf-8")
    page = Page(text)
    assert EVIL in page.text
    assert {tag for tag, _ in page.tags}.isdisjoint({"iframe", "link", "b", "i"})
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:").startswith("data:image/webp;base64,"[:5])
        assert "href" not in attributes
    [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


def test_a_child_is_merged_with_its_parents_first(run):
    """R-38: loaded alone, it would lack what it was trained on."""
    config = run.read_config()
    run.write_config(config.replace(lora={"parent": "runs/root"}))
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "sdlora tree flatten" in text
    assert "-merged.safetensors" in text
    assert "models/Lora" not in text


def test_a_run_whose_images_are_gone(run, sdlora):
    """What cannot be read is left out, and named; an unfinished run without grids has a page too."""
    config = run.read_config()
    run.write_config(config.model_copy(update={"images": str(run.path / "gone")}))
    for step in (10, 20):
        (run.sample_folder(step) / "grid.png").unlink()
    for dialect in ("diffusers", "kohya"):
        run.final_adapter(dialect).unlink()
    code, printed, _ = sdlora("report", run.path)
    assert (code, printed) == (0, f"report    {run.path / 'report.html'}\n")
    text = Page((run.path / "report.html").read_text(encoding="utf-8")).text
    assert "cannot be shown" in text
    assert "no samples" in text
    assert "sdlora resume" in text
    assert sdlora("report", run.path / "samples")[0] == 2


PROMPT = "<b>ink, a circle number 1"
COLORS = {10: (200, 30, 30), 20: (30, 160, 60)}


@pytest.fixture
def sampled(bare):
    """The run with two steps at two strengths, an evaluation, and a prompt that is a caption."""
    for step, color in COLORS.items():
        for number, strength in enumerate((0.0, 0.5, 1.0)):
            shade = (40, 60, 200) if not strength else tuple(round(value * strength) for value in color)
            image = SampledImage(Image.new("RGB", (64, 64), shade), PROMPT, 0, strength)
            write_image(bare.sample_folder(step) / f"{number:02d}.png", image, {"adapter": "old name"})
    images = [
        {"step": 10, "strength": 0.5, "prompt": EVIL, "seed": 3, "file": "samples/step-000010/01.png"},
        {"step": 10, "strength": 0.5, "prompt": "b", "seed": 3, "file": "../outside.png"},
        {"step": "x", "seed": None},
    ]
    choice = {"step": 10, "strength": 0.5, "reason": f"step 10 {EVIL}", "warnings": ["few"], "images": images}
    bare.evaluation_file.write_text(json.dumps({"choice": choice}), encoding="utf-8")
    Image.new("RGB", (8, 8)).save(bare.path.parent / "outside.png")
    return bare


def test_samples_by_step_and_strength(sampled):
    """R-13: an image for each, the base and the target beside them, what the evaluation recommends."""
    page = Page(write_report(sampled).read_text(encoding="utf-8"))
    figures = [attributes for tag, attributes in page.tags if tag == "figure" and "data-step" in attributes]
    steps = [(figure["data-step"], figure["data-strength"]) for figure in figures]
    assert steps == [("10", "0.5"), ("10", "1.0"), ("20", "0.5"), ("20", "1.0"), ("10", "0.5")]
    for part in ("Recommended", "step 10 ", "Warning: few", "target drawing", "seed 3"):
        assert part in page.text
    assert "Step 10" not in page.text, "the grids would show the same images again"


def test_what_is_shown_and_used_first(sampled):
    """R-13, R-45: the recommended step and strength; without a recommendation, the strength in the middle."""
    sampled.step_adapter(10).write_bytes(b"z")
    text = Page(write_report(sampled).read_text(encoding="utf-8")).text
    assert "step-000010.safetensors" in text
    assert "{'scale': 0.5}" in text
    sampled.evaluation_file.unlink()
    config = sampled.read_config()
    sampled.write_config(config.replace(sample={"strengths": [0, 0.6, 1, 1.4]}))
    page = Page(write_report(sampled).read_text(encoding="utf-8"))
    assert [one["data-strength"] for tag, one in page.tags if one.get("class") == "dials"] == ["1.0"]
    assert "{'scale': 1}" in page.text


@pytest.mark.parametrize("left", ["{", "[]", '{"choice": 3}', '{"choice": {"images": 7, "step": "final"}}'])
def test_an_evaluation_that_cannot_be_read(sampled, left):
    """Another version's, or damaged: the page comes without it."""
    sampled.evaluation_file.write_text(left, encoding="utf-8")
    assert "Recommended" not in write_report(sampled).read_text(encoding="utf-8")


def test_several_runs_are_compared(sampled, make_images, sdlora, tmp_path):
    """R-13: one page, a stage for each run, the settings that differ, and what the losses cannot show."""
    config = load_config(None, {"lora.rank": 9}, images=sampled.read_config().images)
    other = RunFolder.create(tmp_path / "other", config, {})
    other.append("plan", 0, dataset_digest="another")
    code, printed, _ = sdlora("report", sampled.path, other.path)
    assert (code, printed) == (0, "report    report.html\n")
    page = Page((tmp_path / "place" / "report.html").read_text(encoding="utf-8"))
    assert [a["class"] for tag, a in page.tags if tag == "div" and a.get("class") == "stage"] == ["stage"] * 4
    for part in ("Settings that differ", "lora.rank", "different images", "not measured"):
        assert part in page.text


def test_the_page_in_a_browser(sampled, open_page):
    """R-13: sliders and wiper, by keyboard; nothing leaves the host; a phone scrolls one way only."""
    url = write_report(sampled).as_uri()
    page = open_page(url)
    shown = lambda: page.locator(".card").first.locator("figure[data-step]:visible img").get_attribute("alt")
    assert shown() == f"{PROMPT}, step 10, strength 0.5", "the recommended one"
    page.get_by_label("step").press("ArrowRight")
    page.get_by_label("strength").press("End")
    assert shown() == f"{PROMPT}, step 20, strength 1"
    assert page.locator(".card").first.locator(".shown").inner_text() == "step 20, strength 1"
    wiper = page.get_by_label("Base on the left, style on the right").first
    wiper.press("Home")
    before = page.locator(".tiles").first.screenshot()
    wiper.press("End")
    assert page.locator(".tiles").first.screenshot() != before
    assert page.locator(".tiles").first.evaluate("one => one.style.getPropertyValue('--wipe')") == "100%"
    for scheme in ("light", "dark"):
        assert width_beyond(open_page(url, size=PHONE, scheme=scheme)) == 0


def test_the_page_without_scripts(sampled, open_page):
    """R-13: all images are there, each with its step and strength, and no sliders."""
    page = open_page(write_report(sampled).as_uri(), scripts=False)
    assert page.locator("figure[data-step]:visible").count() == 5
    assert page.locator("input:visible").count() == 0
    assert page.get_by_text("step 20, strength 1").is_visible()
