"""The report of a run: one page, whatever strangers wrote into captions."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from sdlora.config import load_config
from sdlora.evaluation.page import write_report
from sdlora.runs import RunFolder

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
def run(make_images, tmp_path):
    """A run as its files say, without a model: two grids, a few events, captions of a stranger."""
    images = make_images()
    (images / "00.txt").write_text(EVIL, encoding="utf-8")
    keys = {"lora.rank": 5, "sample.prompts": [EVIL], "data.trigger": "<b>ink"}
    config = load_config(None, keys, images=images)
    run = RunFolder.create(tmp_path / "run <i>", config, {"versions": {"torch": "9.8.7"}, "device": EVIL})
    for step in (10, 20):
        folder = run.sample_folder(step)
        folder.mkdir(parents=True)
        Image.effect_noise((3000, 2000), 90).save(folder / "grid.png")
    run.adapters.mkdir(exist_ok=True)
    run.final_adapter("diffusers").write_bytes(b"x")
    run.final_adapter("kohya").write_bytes(b"y")
    run.append("plan", 0, memory={"stages": {"training": 97_000_000}}, base_digest="abc")
    run.append("prepared", 0)
    run.append("step", 1, loss=0.5, steps_per_second=2.0, memory_mb=123.4)
    return run


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


def test_text_of_strangers_stays_text(run):
    """Captions, prompts and names are escaped; nothing is loaded or run."""
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert EVIL in page.text
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "link", "b", "i", "form"})
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:").startswith("data:image/webp;base64,"[:5])
        assert "href" not in attributes
    [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


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
