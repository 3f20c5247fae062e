"""`sdlora caption --tags` names what a WD tagger sees, and never over what a person wrote (R-05)."""

from __future__ import annotations

import base64
import zlib
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from sdlora.data.records import ImageRecord, Noticed, Size
from sdlora.data.repairs import strip_style
from sdlora.data.style_words import examine_words
from sdlora.errors import ModelError
from sdlora.models import tagger as tagger_module
from sdlora.models.tagger import Tagger
from tests.checks import raises

pytest.importorskip("onnxruntime")
# Scores from the mean (blue, green, red) of an image (N, 8, 8, 3): ReduceMean, MatMul and Add, in opset 13.
MODEL = (
    "c-rIO5Mr=8$i!vI#hRI$n4T)clAD^Cr^FSMno^pa>I-CR@p7>wR-_g?Fgh?TU}V?g=i<mtO)W^t%q^B+Sis1{CBg;P!^K!G#F(qZ=9^gJTbjcq"
    "%*B|?#h4_-R-Bw)lv=FB?3j`w#8Q%(SE-fF!OX!S!05zS?v=m*1dR<1)(jK^TxMu#Laa*iQea?cu!jk!rKN$`_8@xJOi6oV<6`?L1y~q}bBS^="
    "3JG#C3o-g}F>!D}F>{h67t}jK{9L?1C7f_2PApsu0=xjjsxof"
)
# The first is a rating, the second the share of blue, the third that of red; the others are constant.
TABLE = """tag_id,name,category,count
1,general,9,10
2,blue_sky,0,10
3,red_hat,0,10
4,monochrome,0,10
5,>_o,0,10
6,ann_(tales),4,10
7,watercolor_(medium),0,10
8,ink_artist,1,10
"""
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def wd(tmp_path: Path) -> Path:
    """The folder of a tagger."""
    folder = tmp_path / "wd"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(zlib.decompress(base64.b85decode(MODEL)))
    (folder / "selected_tags.csv").write_text(TABLE, encoding="utf-8")
    return folder


def test_what_it_names(wd: Path) -> None:
    """Channels, white margins, thresholds and spelling are those of WD taggers."""
    describe = Tagger(wd / "model.onnx")
    assert describe(Image.new("RGB", (50, 50), RED)) == "red hat, monochrome, watercolor (medium), >_o"
    assert describe(Image.new("RGB", (8, 8), BLUE)).startswith("blue sky, monochrome")
    # Half of the square is white, and blue with it.
    wide = describe(Image.new("RGB", (80, 40), RED)).split(", ")
    assert wide[0] == "red hat"
    assert {"blue sky", ">_o"} < set(wide)
    assert Tagger(wd, 0.95)(Image.new("RGB", (8, 8), RED)) == "red hat"
    assert "ann (tales)" in Tagger(wd, 0.95, has_characters=True)(Image.new("RGB", (8, 8), BLUE))


def test_tags_become_captions(wd: Path, sdlora, make_images) -> None:
    """The trigger first, no tag of a style; what exists stays, and a second time there is nothing to do."""
    root = make_images()
    for name in ("00", "01"):
        (root / f"{name}.txt").unlink()
    kept = (root / "02.txt").read_text(encoding="utf-8")
    code, printed, _ = sdlora("caption", str(root), "--tags", str(wd), "--trigger", "inkwash")
    assert code == 0
    assert "2/2" in printed
    words = (root / "00.txt").read_text(encoding="utf-8").strip().split(", ")
    assert words[0] == "inkwash"
    assert ">_o" in words[1:]
    assert not {"monochrome", "watercolor (medium)", "(medium)", "general", "ink artist"} & set(words)
    assert (root / "02.txt").read_text(encoding="utf-8") == kept
    assert sdlora("caption", str(root), "--tags", "not read")[0] == 0
    assert sdlora("caption", str(root), "--tags", str(wd), "--skeleton")[0] == 2


def test_tags_that_name_a_style() -> None:
    """Whole tags go; a thing of the same word stays."""
    tags = "1girl, ink (medium), Sketch, sketch book, 1990s (style), traditional media, lineart, red hat"
    assert strip_style(tags) == "1girl, sketch book, red hat"
    captions = {
        "a": "1girl, lineart, red hat",
        "b": "a sketch book",
        "c": "Sketch",
        "d": "a boat, a comic book",
    }
    records = [
        ImageRecord(Path(name), name, name, Size(8, 8), text, ".txt") for name, text in captions.items()
    ]
    noticed: Noticed = defaultdict(dict)
    examine_words(records, noticed)
    assert noticed["data.caption-style"] == {"a": "'lineart'"}


@pytest.mark.parametrize("file", ["model.onnx", "selected_tags.csv"])
def test_other_files_are_refused(wd: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line: without a file, with another one, or without the library."""
    whole = (wd / file).read_bytes()
    for data in (b"", b"name,other\n\xff", whole[: len(whole) // 2]):
        (wd / file).write_bytes(data)
        with raises(ModelError, "option--tags", shows=str(wd)) as caught:
            Tagger(wd)
        assert "\n" not in str(caught.value)
    (wd / file).unlink()
    with raises(ModelError, "option--tags", shows=str(wd)):
        Tagger(wd)
    monkeypatch.setattr(tagger_module, "onnxruntime", None)
    with raises(ModelError, "option--tags.package", shows="sdlora[tags]"):
        Tagger(wd)
