"""The score sheet: one page with every pair, the worst first."""

import base64
import io
import re

import pytest
import torch
from PIL import Image

from milo_latent.files import write_image, write_latents
from milo_latent.score import sheet
from milo_latent.score.pairs import Pair
from milo_latent.score.sheet import THUMBNAIL, write_sheet
from milo_latent.score.table import ScoreRow

HOSTILE = "a<script>alert(1)</script>\"&'.png"


def rows_of(page):
    return re.findall(r"<tr><td>.*?</tr>", page)


def test_pairs_are_sorted_by_error_and_names_are_only_text(tmp_path):
    rows = [ScoreRow("small", 0.1, 4.0), ScoreRow(HOSTILE, 0.9, 1.0), ScoreRow("middle", 0.5, 2.5)]
    write_sheet(tmp_path / "sheet.html", rows, [], title="MILO_I <official>")
    page = (tmp_path / "sheet.html").read_text()
    assert [re.search(r'number">(.*?)<', row)[1] for row in rows_of(page)] == ["0.900000", "0.500000", "0.100000"]
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&amp;" in rows_of(page)[0]
    assert "<h1>MILO_I &lt;official&gt;</h1>" in page
    assert "3 pairs" in page


def test_thumbnails_are_inside_the_page_and_keep_their_proportions(tmp_path):
    image = torch.zeros(1, 3, 300, 600)
    image[:, 0] = 1
    write_image(tmp_path / "ref.png", image)
    write_image(tmp_path / "dist.png", 1 - image)
    pair = Pair("pair", tmp_path / "ref.png", tmp_path / "dist.png")
    write_sheet(tmp_path / "sheet.html", [ScoreRow("pair", 0.5, 2.0)], [pair], title="sheet")
    page = (tmp_path / "sheet.html").read_text()
    assert not re.search(r"""(src|href|url)\W*["'(](?!data:)""", page)  # nothing is fetched
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,(.*?)\"", page)]
    assert [picture.size for picture in pictures] == [(THUMBNAIL, THUMBNAIL // 2)] * 2
    red, cyan = (picture.getpixel((9, 9)) for picture in pictures)
    assert red[0] > 250 > 5 > red[1]
    assert cyan[1] > 250 > 5 > cyan[0]


def test_latents_and_files_that_vanished_are_named_in_place_of_a_picture(tmp_path):
    write_latents(tmp_path / "a&b.npy", torch.zeros(1, 4, 16, 16))
    pair = Pair("pair", tmp_path / "a&b.npy", tmp_path / "gone.png")
    write_sheet(tmp_path / "sheet.html", [ScoreRow("pair", 0.5, 2.0)], [pair], title="sheet")
    (row,) = rows_of((tmp_path / "sheet.html").read_text())
    assert row.endswith("<td>a&amp;b.npy</td><td>gone.png</td></tr>")


def test_a_page_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "sheet.html").write_text("before")
    pairs = [Pair(name, tmp_path / "a.png", tmp_path / "b.png") for name in ("first", "second")]
    rows = [ScoreRow("first", 0.5, 2.0), ScoreRow("second", 0.1, 4.0)]

    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(sheet, "_thumbnail", stop)
    with pytest.raises(KeyboardInterrupt):
        write_sheet(tmp_path / "sheet.html", rows, pairs, title="sheet")
    with pytest.raises(FileNotFoundError, match="Expected a folder"):
        write_sheet(tmp_path / "absent" / "sheet.html", [], [], title="sheet")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.html"]
    assert (tmp_path / "sheet.html").read_text() == "before"


def test_names_that_are_no_text_do_not_stop_the_page(tmp_path):
    write_sheet(tmp_path / "sheet.html", [ScoreRow("b\udcff", 0.5, 2.0)], [], title="sheet")
    assert "<td>b?</td>" in (tmp_path / "sheet.html").read_text()
