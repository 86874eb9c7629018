"""The page for any tool's result: in a real browser, and as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import dump, screenshot
from markupsafe import Markup
from PIL import Image

from miles.config.exits import UserError
from miles.report.figures import Placed
from miles.report.plain_page import Section, Table, Toned, Verdict, plain_page, write_page
from miles.report.plots import bars, heat_map
from miles.report.svg import Series, line_plot
from miles.report.tiles import Tile

EVIL = "<script>alert(1)</script>"


def page() -> str:
    line = Placed("line", "Line", "Caption.", line_plot("line", "Line", "nats", [Series("one", [0, 1, 2], [1.0, 3.0, 2.0])], x_label="bin", names=["0", "1", "2-3"]))
    drawn = bars("bars", "Bars", "ratio", "tokens", [0, 1, 2, 4], [3, 0, 70000], ticks=[(0, "1"), (2, "100")], marks=[(2, "2"), (9, "beyond")], log=True)
    heat = heat_map("heat", "Heat", "step", "rank", [str(i) for i in range(40)], ["0", EVIL], [[0.1 * i for i in range(40)], [None] * 40], "nats", diagonal=True)
    table = Table(["name", "value", "verdict"], [[EVIL, 0.25, Toned("beyond", "bad")], [Markup("<b>bold</b>"), None, "within"]], title="A table")
    parts = ["Words.", line, Placed("bars", "Bars", "", drawn), Placed("heat", "Heat", "", heat), table, Table(["a"], [[12345]], title="More", folded=True)]
    return plain_page(EVIL, "test", "3 facts", Verdict("broken", "bad", ["k3 is 3"], "stop"), [Section("First", parts, "A note."), Section("Empty", [])], [Tile("k3", "3")], "runs/x")


def test_browser_shows_every_part(tmp_path: Path) -> None:
    write_page(page(), tmp_path / "page.html")
    document = dump((tmp_path / "page.html").as_uri())
    assert document.count("<svg") == 3
    for words in ('<span class="state bad">broken</span>', "<p>k3 is 3</p>", "<b>What to do:</b> stop", "<h2>First</h2>", "<p>Words.</p>", "A note.", "<b>bold</b>", '<td class="words bad">beyond</td>', "<summary>More</summary>"):
        assert words in document, words
    assert "<h2>Empty</h2>" not in document
    assert "beyond</text>" not in document, "a bound that lies beyond the plot"
    for width in (1280, 400):
        picture = Image.open(screenshot((tmp_path / "page.html").as_uri(), tmp_path / "page.png", width, 900)).convert("RGB")
        assert len(picture.getcolors(1 << 24) or []) > 100


def test_words_are_escaped_and_nothing_is_loaded() -> None:
    text = page()
    assert EVIL not in text
    assert text.count("&lt;script&gt;alert(1)") >= 3
    assert "default-src 'none'" in text
    assert " src=" not in text


def test_only_pages_of_our_own_are_replaced(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine.html", tmp_path / "other.html"
    write_page(page(), mine)
    write_page(page(), mine)
    other.write_text("<html>theirs")
    with pytest.raises(UserError, match="no page that miles made"):
        write_page(page(), other)
    assert other.read_text() == "<html>theirs"
    with pytest.raises(UserError, match="there is no folder"):
        write_page(page(), tmp_path / "none/page.html")
    with pytest.raises(UserError, match="is a folder"):
        write_page(page(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html", "other.html"]


def test_log_bars_stand_on_their_decades() -> None:
    drawn = bars("b", "B", "x", "n", [0, 1, 2], [10, 1000], ticks=[], log=True)
    heights = [float(part.split('"')[0]) for part in drawn.split(' height="')[1:]]
    assert heights[1] > heights[0] >= 1.5
