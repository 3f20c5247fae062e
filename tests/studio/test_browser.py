"""The pages as a person sees them, in a real browser; `open_page` fails on any request to another host."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time

import pytest

from tests.browser import PHONE, width_beyond
from tests.studio.conftest import add_steps, draw_grid

PLACES = (
    "/",
    "/run/style",
    "/new",
    "/images",
    "/compare?side=style&side=other",
    "/rate?side=style",
    "/playground?run=style",
)


@pytest.fixture
def filled(make_run, make_images, serve):
    """A studio with two runs and an image folder."""
    images = make_images(sizes=((64, 64), (128, 64), (64, 64)))
    for name in ("style", "other"):
        run = make_run(name, grid=10, images=images)
        run.adapters.mkdir()
        run.step_adapter(10).touch()
    return serve(images)


def test_pages_fit_every_window(filled, open_page):
    """R-45: on a phone as on a desk, in both schemes, nothing scrolls sideways; no script, no problem."""
    desk = ((1280, 900), "light", False, PLACES[:3])
    for size, scheme, scripts, places in ((PHONE, "dark", True, PLACES), desk):
        page = open_page(filled, size=size, scheme=scheme, scripts=scripts)
        for place in places:
            page.goto(filled + place)
            assert page.locator("h1").count() == 1, place
            assert width_beyond(page) == 0, place


def test_the_list_is_live(make_run, serve, open_page):
    page = open_page(serve())
    page.get_by_text("There are no runs").wait_for()
    make_run("new-style", done=4)
    page.get_by_role("link", name="new-style").click()
    page.wait_for_url("**/run/new-style")
    assert page.get_by_role("heading", name="new-style").is_visible()


def test_a_run_is_followed(make_run, serve, open_page):
    """R-45: step, loss, curve, samples and log appear while another thread, as if training, writes them."""
    run = make_run(done=2)
    run.name_process(os.getpid())
    page = open_page(f"{serve()}/run/style")
    assert "2 of 10" in page.locator("#figures").inner_text()
    curve = page.locator("#curves path").first.get_attribute("d")

    def train():
        for step in range(3, 10):
            add_steps(run, step, step)
            time.sleep(0.05)
        draw_grid(run, 9)
        run.log_file.write_text("step 9 of 10\n")
        run.append("samples", 9, path="samples/step-000009/grid.png")

    thread = threading.Thread(target=train)
    thread.start()
    page.get_by_role("heading", name="Samples, step 9").wait_for()
    page.get_by_text("step 9 of 10", exact=True).wait_for()
    thread.join()
    assert "9 of 10" in page.locator("#figures").inner_text()
    assert page.locator("#curves path").first.get_attribute("d") != curve
    assert page.get_by_role("button", name="Save and stop").is_visible()
    assert not page.get_by_role("button", name="Sample now").count(), "a run without samples has none"
    page.get_by_role("button", name="Save now").click()
    page.wait_for_load_state()
    assert run.take_requests() == {"save"}
    # Killed: the page says so, and offers to continue.
    run.process_file.unlink()
    page.get_by_role("button", name="Resume").wait_for()
    assert "stopped" in page.locator("#state").inner_text()


def test_a_run_that_is_gone_is_said_to_be(make_run, serve, open_page):
    """R-45: what the page shows last is not taken for what is."""
    run = make_run(done=2)
    run.name_process(os.getpid())
    page = open_page(f"{serve()}/run/{run.name}")
    page.route("**/run/*", lambda route: route.abort())
    page.get_by_text("does not answer").wait_for()
    page.unroute("**/run/*")
    page.get_by_text("does not answer").wait_for(state="detached")
    shutil.rmtree(run.path)
    page.get_by_text("no longer there").wait_for()


def test_hidden_adapters_are_not_drawn(filled, open_page):
    """R-13: one is hidden with that before it."""
    page = open_page(f"{filled}/playground")
    adapters = page.locator("#paint select")
    for number in range(2):
        adapters.nth(number).select_option("style@final")
    adapters.nth(0).select_option("")
    assert not adapters.nth(1).is_visible()
    assert adapters.nth(1).is_disabled()


def test_captions_are_edited(filled, open_page, make_images, tmp_path):
    """Edit, replace in all, undo both; the files follow."""
    page = open_page(f"{filled}/images")
    page.get_by_role("link", name="pictures").click()
    field, file = page.get_by_label("Caption of 01.png"), tmp_path / "pictures" / "01.txt"
    field.fill("a wide, red circle")
    field.press("Enter")
    page.get_by_text("saved", exact=True).wait_for()
    assert file.read_text() == "a wide, red circle\n"
    page.get_by_label("Find").fill("circle")
    page.get_by_label("Replace with").fill("dot")
    page.get_by_role("button", name="Replace").click()
    page.get_by_text("3 captions saved").wait_for()
    assert field.input_value() == "a wide, red dot"
    undo = page.get_by_role("button", name="Undo")
    for shown in ("a wide, red circle", "a circle number 1"):
        undo.click()
        page.wait_for_function(
            "text => document.querySelector('[data-name=\"01.png\"] textarea').value === text", arg=shown
        )
        assert file.read_text().strip() == shown
    assert undo.is_disabled()
    # Another program wins over a page that has not seen its text.
    file.write_text("from an editor")
    field.fill("from the page")
    field.press("Enter")
    page.get_by_text("has changed since").wait_for()
    assert file.read_text() == "from an editor"


def test_captions_wait_for_the_server(filled, open_page, tmp_path):
    """R-05: what it did not hear of is sent with the next one."""
    page = open_page(f"{filled}/images")
    page.get_by_role("link", name="pictures").click()
    first, second = (page.get_by_label(f"Caption of {name}.png") for name in ("00", "01"))
    page.route("**/captions/*", lambda route: route.abort())
    first.fill("a square")
    first.press("Enter")
    page.get_by_text("does not answer").wait_for()
    page.unroute("**/captions/*")
    second.fill("a ring")
    second.press("Enter")
    page.get_by_text("2 captions saved").wait_for()
    texts = [(tmp_path / "pictures" / name).read_text() for name in ("00.txt", "01.txt")]
    assert texts == ["a square\n", "a ring\n"]
    # A replacement as well.
    page.route("**/captions/*", lambda route: route.abort())
    page.get_by_label("Find").fill("square")
    page.get_by_label("Replace with").fill("cube")
    page.get_by_role("button", name="Replace").click()
    page.get_by_text("does not answer").wait_for()
    assert first.input_value() == "a cube"
    page.unroute("**/captions/*")
    page.get_by_label("Find").fill("")
    second.fill("a wheel")
    second.press("Enter")
    page.get_by_text("2 captions saved").wait_for()
    assert (tmp_path / "pictures" / "00.txt").read_text() == "a cube\n"


def test_tags_filter(filled, open_page, tmp_path):
    for name, caption in (("00", "red, a dot"), ("01", "red"), ("02", "blue")):
        (tmp_path / "pictures" / f"{name}.txt").write_text(caption)
    page = open_page(f"{filled}/images")
    page.get_by_role("link", name="pictures").click()
    page.get_by_role("button", name="red 2").click()
    assert page.locator(".card:visible").count() == 2
    page.get_by_role("button", name="red 2").click()
    page.get_by_label("Find").fill("blue")
    assert page.locator(".card:visible").count() == 1


def test_what_a_filter_hides_is_not_replaced(filled, open_page, tmp_path):
    """R-13: the case does not matter, as it does not for what is found; a tag that is gone hides nothing."""
    files = [tmp_path / "pictures" / f"{name}.txt" for name in ("00", "01", "02")]
    for file, caption in zip(files, ("red, a Dot", "red, a dot", "blue, a dot"), strict=True):
        file.write_text(caption)
    page = open_page(f"{filled}/images")
    page.get_by_role("link", name="pictures").click()
    page.get_by_role("button", name="red 2").click()
    page.get_by_label("Find").fill("dot")
    page.get_by_label("Replace with").fill("$& ring")
    page.get_by_role("button", name="Replace").click()
    page.get_by_text("2 captions saved").wait_for()
    assert [file.read_text().strip() for file in files] == ["red, a $& ring", "red, a $& ring", "blue, a dot"]
    page.get_by_label("Find").fill("red, a")
    page.get_by_label("Replace with").fill("one")
    page.get_by_role("button", name="Replace").click()
    page.wait_for_function("() => !document.querySelector('#tags [aria-pressed=true]')")
    page.get_by_label("Find").fill("")
    assert page.locator(".card:visible").count() == len(files)


def test_grids_zoom_together(filled, open_page):
    page = open_page(f"{filled}/compare?side=style&side=other")
    page.locator(".pane").first.focus()
    page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    moved = page.locator(".pane img").evaluate_all("images => images.map(image => image.style.transform)")
    assert moved[0] == moved[1] != ""
    assert "scale(1.25)" in moved[0]


def test_rating_by_keys(filled, open_page, runs):
    page = open_page(f"{filled}/rate?side=style")
    for key, choice in (("ArrowLeft", "first"), ("ArrowRight", "second"), ("ArrowDown", "equal")):
        page.wait_for_load_state()  # the keys are heard then
        pair = page.locator("[name=pair]").get_attribute("value")
        page.keyboard.press(key)
        page.wait_for_function("pair => document.querySelector('[name=pair]').value !== pair", arg=pair)
        assert json.loads((runs / "style" / "ratings.jsonl").read_text().splitlines()[-1])["choice"] == choice


def test_a_preset_shows_what_it_sets(filled, open_page):
    """R-35: the fields show the preset's values as defaults; a mistake is shown below the form."""
    page = open_page(f"{filled}/new")
    page.locator("[name=preset]").select_option("sd15")
    assert page.locator("[name='sample.guidance']").get_attribute("placeholder") == "7.0"
    # What it leaves out depends on the base.
    assert page.locator("[name='train.learning_rate']").get_attribute("placeholder") == "the base's own"
    page.locator("[name='lora.rank']").fill("0")
    page.get_by_role("button", name="Show the plan").click()
    page.get_by_text("lora.rank = 0").wait_for()
    assert page.get_by_role("button", name="Start training").count() == 0


@pytest.mark.slow
def test_from_the_form_to_the_playground(filled, open_page):
    """R-16: the plan of the form, then a run of its own process, whose page follows it to its end; then its
    adapter draws: the base beside the style, and another strength changes the style alone.
    """
    page = open_page(f"{filled}/new")
    few = {"train.steps": "2", "lora.rank": "2", "train.sample_every": "0", "train.learning_rate": "0.02"}
    for key, value in {**few, "name": "third"}.items():
        page.locator(f"[name='{key}']").fill(value)
    page.get_by_text("All settings").click()
    page.locator("[name='sample.steps']").fill("3")
    page.get_by_role("button", name="Show the plan").click()
    page.get_by_role("button", name="Start training").wait_for()
    assert "of rank 2" in page.locator("#plan").inner_text()
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url("**/run/third")
    page.get_by_role("button", name="Train longer").wait_for()
    page.get_by_role("link", name="Try prompts").click()
    page.get_by_label("Prompt").fill("a fox")
    page.get_by_role("button", name="Draw").click()
    images = page.locator("#painted img")
    images.first.wait_for(state="visible")
    sources = "images => images.map(image => image.src)"
    base, style = images.evaluate_all(sources)
    page.locator("[name=strength0]").fill("0")
    page.wait_for_function("old => document.querySelectorAll('#painted img')[1].src !== old", arg=style)
    assert images.evaluate_all(sources)[0] == base != style
