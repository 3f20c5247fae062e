"""Samples beside each other, blind choices, and the playground."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from sdlora.evaluation.tiles import count_wins, describe_ratings, read_ratings
from sdlora.studio.ratings import add_rating, choose_pair, list_pairs, read_samples


def test_run_page(client, make_run, make_images):
    run = make_run(grid=10, images=make_images())
    page = client()
    text = page.get(f"/run/{run.name}").text
    assert all(word in text for word in ("finished", "Training loss", "Samples, step 10", "pictures"))
    grid = page.get(f"/grid/{run.name}?step=10")
    assert grid.headers["content-type"] == "image/png"
    assert page.get(f"/strip/{run.name}").headers["content-type"] == "image/webp"
    etag = {"if-none-match": grid.headers["etag"]}
    assert page.get(f"/grid/{run.name}?step=10", headers=etag).status_code == 304
    assert page.get("/run/nothing").status_code == 404


def test_the_recommendation_is_shown(client, make_run):
    """R-45: on the page of the run, and where the playground starts; a damaged file is no error."""
    run, page = make_run(grid=10), client()
    run.adapters.mkdir(exist_ok=True)
    run.step_adapter(10).write_bytes(b"")
    assert f"sdlora evaluate {run.path}" in page.get(f"/run/{run.name}").text
    choice = {"step": 10, "strength": 0.8, "reason": "step 10 at 0.8 & more", "warnings": ["few"]}
    run.evaluation_file.write_text(json.dumps({"choice": choice}), encoding="utf-8")
    Image.new("RGB", (8, 8)).save(run.evaluation_curve)
    text = page.get(f"/run/{run.name}").text
    assert all(part in text for part in ("step 10 at 0.8 &amp; more", ">few<", f"/scores/{run.name}"))
    assert page.get(f"/scores/{run.name}").headers["content-type"] == "image/png"
    text = page.get(f"/playground?run={run.name}").text
    assert f'value="{run.name}@10" selected' in text
    assert 'value="0.8"' in text
    run.evaluation_file.write_text('{"choice": {"reason": 3, "warnings": 7, "step": []}}', encoding="utf-8")
    assert {
        page.get(f"/{place}").status_code for place in (f"run/{run.name}", f"playground?run={run.name}")
    } == {200}


def test_a_finished_run_tells_how_to_use_it(client, make_run, tmp_path):
    """R-45: the file for other programs with its prompt, and the report, shut off from all else."""
    run, page = make_run(), client()
    for place in ("lora", "report"):
        assert page.get(f"/{place}/{run.name}").status_code == 404
    run.webui.mkdir()
    file = run.webui / "style.safetensors"
    file.write_bytes(b"tensors")
    file.with_suffix(".json").write_text('{"preferred weight": 0.8, "activation text": "inky"}')
    run.report.write_text("<h1>style</h1>")
    assert "&lt;lora:style:0.8&gt; inky" in page.get(f"/run/{run.name}").text
    answer = page.get(f"/lora/{run.name}")
    assert answer.content == b"tensors"
    assert "style.safetensors" in answer.headers["content-disposition"]
    report = page.get(f"/report/{run.name}")
    assert report.text == "<h1>style</h1>"
    assert "sandbox allow-scripts; default-src 'none'" in report.headers["content-security-policy"]
    file.unlink()
    (tmp_path / "secret.safetensors").write_bytes(b"")
    file.symlink_to(tmp_path / "secret.safetensors")
    assert page.get(f"/lora/{run.name}").status_code == 404


def test_an_unchanged_page_is_not_sent_again(client, make_run):
    """Many tabs ask every second."""
    run = make_run(done=4)
    page = client()
    etag = {"if-none-match": page.get(f"/run/{run.name}").headers["etag"]}
    assert page.get(f"/run/{run.name}", headers=etag).status_code == 304
    run.append("step", 5, loss=0.1, loss_ema=0.1)
    assert page.get(f"/run/{run.name}", headers=etag).status_code == 200


def test_compare(client, make_run):
    make_run("one", grid=10)
    make_run("two", grid=5)
    page = client()
    text = page.get("/compare?side=one&side=two@5").text
    assert text.count('class="pane"') == 2
    assert page.get("/compare?side=two@7").status_code == 404


def test_a_name_with_a_sign(client, make_run):
    """What follows an @ is a step only if it is a number, and no run has that name."""
    make_run("ink@home", grid=10)
    make_run("ink@2", grid=10)
    assert client().get("/compare", params={"side": "ink@2"}).status_code == 200
    for side in ("ink@home", "ink@home@10"):
        assert client().get("/compare", params={"left": side, "right": side}).status_code == 200


def test_pairs_are_of_one_prompt(make_run):
    """Two strengths of one grid, or one strength of two; the base is not rated."""
    one, two = make_run("one", grid=10), make_run("two", grid=10)
    for _ in range(20):
        (first, second), _ = choose_pair(list_pairs([(one, 10)]), [])
        assert first[2].prompt == second[2].prompt
        assert {first[2].strength, second[2].strength} == {0.5, 1.0}
        (first, second), _ = choose_pair(list_pairs([(one, 10), (two, 10)]), [])
        assert {first[0], second[0]} == {one, two}
        assert (first[2].prompt, first[2].strength) == (second[2].prompt, second[2].strength)
    assert list_pairs([(one, 5)]) == []


def test_what_is_not_rated_comes_first(make_run):
    """R-13: each pair once before any comes again."""
    run = make_run(grid=10)
    pairs = list_pairs([(run, 10)])
    seen = []
    for left in (2, 1, 0):
        pair, found = choose_pair(pairs, read_ratings(run))
        assert found == left
        seen.append(pair[0][2].prompt)
        add_rating(pair, "equal")
    assert set(seen[:2]) == {"a fox", "a cat"}


def test_withheld_samples_are_not_rated(make_run):
    """R-47: what a checker withheld says nothing about a style."""
    run = make_run(grid=10)
    from PIL import Image, PngImagePlugin

    notes = PngImagePlugin.PngInfo()
    notes.add_text("sdlora", json.dumps({"prompt": "a fox", "seed": 0, "strength": 1.0, "withheld": True}))
    Image.new("RGB", (64, 64)).save(run.sample_folder(10) / "02.png", pnginfo=notes)
    assert len(read_samples(run, 10)) == 5


def test_ratings_stay_with_the_run(client, make_run):
    """The page does not tell which is which; an answer counts once."""
    run = make_run(grid=10)
    page = client()
    text = page.get("/rate?side=style").text
    assert "strength" not in text.partition("Answers")[0].partition("<main>")[2]
    pair = re.search(r'name="pair" value="(.+?)"', text)[1]
    assert page.get(f"/pair/{pair}/0").status_code == 200
    assert page.get(f"/pair/{pair}/2").status_code == 404
    answer = page.post("/rate?side=style", data={"pair": pair, "choice": "first"}, follow_redirects=False)
    assert answer.headers["location"] == "/rate?side=style"
    page.post("/rate?side=style", data={"pair": pair, "choice": "first"})
    [row] = [json.loads(line) for line in run.ratings_file.read_text().splitlines()]
    assert (row["choice"], row["prompt"] in ("a fox", "a cat")) == ("first", True)
    wins = {entry["strength"]: entry["wins"] for entry in count_wins(run)}
    assert wins == {row["first"]["strength"]: 1.0, row["second"]["strength"]: 0.0}
    run.ratings_file.write_text("damaged\n[]\n{}\n" + run.ratings_file.read_text())
    assert len(count_wins(run)) == 2


def test_an_eye_decides_between_cells_that_scores_cannot_tell_apart(client, make_run):
    """R-13: the recommended cell and its ties are rated blind; the run's page tells what was preferred."""
    run, page = make_run(grid=10), client()
    choice = {"step": 10, "strength": 0.5, "reason": "x", "ties": [{"step": 10, "strength": 1.0}, 7]}
    run.evaluation_file.write_text(json.dumps({"choice": choice}), encoding="utf-8")
    assert "/rate?tied=style" in page.get("/run/style").text
    for _ in range(5):
        assert describe_ratings(run) == ""
        pair = re.search(r'name="pair" value="(.+?)"', page.get("/rate?tied=style").text)[1]
        sides = [page.get(f"/pair/{pair}/{side}").content for side in (0, 1)]
        full = {file.read_bytes() for file in run.sample_folder(10).glob("*.png") if strength_of(file) == 1.0}
        better = "first" if sides[0] in full else "second"
        page.post("/rate?tied=style", data={"pair": pair, "choice": better}, follow_redirects=False)
    assert "step 10 at 1 was preferred in 5 of 5" in page.get("/run/style").text
    run.evaluation_file.write_text(
        json.dumps({"choice": {"step": [], "ties": [{}, {"step": {}}]}}), encoding="utf-8"
    )
    assert "pair" not in page.get("/rate?tied=style").text.partition("<main>")[2].partition("<form")[0]


def strength_of(file):
    notes = Image.open(file).info.get("sdlora")
    return json.loads(notes)["strength"] if notes else None


@pytest.mark.parametrize(
    "form",
    [
        {"prompt": "x", "run0": "nothing@final"},
        {"prompt": ""},
        {"prompt": "x", "seed": "high"},
        {"prompt": "x", "seed": "1e20"},
    ],
)
def test_a_playground_without_a_run(client, form):
    answer = client().post("/paint", data=form, headers={"accept": "application/json"})
    assert answer.status_code in (404, 409)
    assert answer.json()["error"]
