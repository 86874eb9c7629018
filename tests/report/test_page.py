"""The report page: in a real browser, and as text."""

from __future__ import annotations

import http.server
import re
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import dump, screenshot
from demo_run import CONFIG, begin_attempt, demo_run, empty_run, end_attempt, record_step
from PIL import Image

from miles.config.exits import UserError
from miles.data.store.run_dir import RunDir
from miles.report.build import build_report


class Page(HTMLParser):
    """Tags, visible text by section, and everything that points elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def having(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag and all(found.get(key) == value for key, value in attributes.items())]


def page_of(run: RunDir) -> tuple[str, Page]:
    text = build_report(run.path).read_text()
    return text, Page(text)


def test_browser_renders_every_part(finished: RunDir, tmp_path: Path) -> None:
    page = build_report(finished.path)
    document = Page(dump(page.as_uri()))
    assert document.having("h1")
    assert "arithmetic-demo" in document.text
    figures = {figure["id"] for figure in document.having("figure")}
    assert figures >= {"reward", "accuracy", "length", "entropy", "mismatch", "grad_norm", "loss", "phases"}
    assert len([tag for tag, _ in document.tags if tag == "svg"]) == len(figures) + 1
    assert len(document.having("article", **{"class": "sample"})) >= 12
    picture = Image.open(screenshot(page.as_uri(), tmp_path / "page.png", 1280, 1600)).convert("RGB")
    assert picture.size == (1280, 1600)
    colours = picture.getcolors(maxcolors=1 << 24)
    assert len(colours) > 500, "a page with plots has many colours"
    assert max(count for count, _ in colours) < 0.95 * 1280 * 1600, "not blank"


@pytest.fixture
def server(finished: RunDir, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The report and a page that frames it at 480 px, from loopback; and the list of what was asked for."""
    asked: list[str] = []
    files = {
        "/report.html": build_report(finished.path).read_bytes(),
        "/frame.html": b"""<!DOCTYPE html><title>wait</title><iframe id=f width=480 height=900 src=report.html></iframe>
            <script>addEventListener('load', () => { const d = document.getElementById('f').contentDocument.documentElement;
            document.title = 'width ' + d.scrollWidth + ' of ' + d.clientWidth; });</script>""",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = files.get(self.path)
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{one.server_address[1]}", asked
        one.shutdown()
        thread.join()


def test_narrow_page_needs_no_sideways_scrolling_and_asks_for_nothing_else(server: tuple[str, list[str]]) -> None:
    url, asked = server
    document = dump(f"{url}/frame.html")
    title = re.search(r"<title>width (\d+) of (\d+)</title>", document)
    assert title, document[:500]
    assert int(title.group(2)) <= 480
    assert int(title.group(1)) <= int(title.group(2))
    assert set(asked) <= {"/frame.html", "/report.html", "/favicon.ico"}, "the frame's own icon is the browser's idea"


def test_page_is_self_contained(noisy: RunDir) -> None:
    text, page = page_of(noisy)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base"), tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"):
                assert value is not None
                assert value.startswith(("data:", "#")), (tag, name, value)
            assert not name.startswith("on"), "no handlers"
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style


def test_plots_are_named_for_those_who_do_not_see_them(finished: RunDir) -> None:
    _, page = page_of(finished)
    identifiers = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(identifiers) == len(set(identifiers))
    for svg in page.having("svg"):
        assert svg["role"] == "img"
        assert all(name in identifiers for name in (svg["aria-labelledby"] or "").split())
    assert "mean reward: reward from " in page.text


def test_verdict_of_equal_bits(finished: RunDir) -> None:
    _, page = page_of(finished)
    assert "exactly 0 trainer and engine agree to the bit over 40 steps" in page.text
    assert "exactly 0 at every step" in page.text.lower()
    assert "compared tokens here are exactly equal" in page.text
    assert not [1 for _, attributes in page.tags if re.search(r"\b[un][1-5]\b", attributes.get("class") or "")], "no token is coloured"


def test_verdict_of_differing_bits_while_running(noisy: RunDir) -> None:
    _, page = page_of(noisy)
    assert "exactly 0 at every step" not in page.text.lower()
    assert "running" in page.text
    assert "42 of 52 steps (12 warm start, 30 rollouts)" in page.text
    assert [1 for _, attributes in page.tags if re.search(r"\bt u[1-5]\b|\bt p[1-5] u[1-5]\b", attributes.get("class") or "")]
    assert "1 restart; last because: worker 0 was killed by SIGKILL" in page.text


def test_text_of_strangers_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    run = demo_run(tmp_path / "run", rollouts=2, restarts=0)
    run.run_yaml.write_text(run.run_yaml.read_text().replace("arithmetic-demo", "'" + evil.replace("'", "''") + "'"))
    end_attempt(run, 1, 1, evil)
    record_step(run, 1, 15, "rollout", 1.8e9, **{evil: 1.0})
    text, page = page_of(run)
    assert evil in page.text
    assert not page.having("script")
    assert not page.having("img")
    assert "<b>sum" not in text, "the samples' own markup"
    assert ">&lt;</span>" in text


def test_run_without_a_step_says_so(tmp_path: Path) -> None:
    run = empty_run(tmp_path / "run")
    _, page = page_of(run)
    assert "No step has been recorded yet" in page.text
    assert not page.having("figure")
    begin_attempt(run)
    _, page = page_of(run)
    assert "starting" in page.text


def test_warm_start_alone_has_no_evaluation_yet(tmp_path: Path) -> None:
    run = empty_run(tmp_path / "run")
    epoch = begin_attempt(run)
    record_step(run, epoch, 1, "sft", time.time(), **{"train/loss": 3.0, "train/grad_norm": float("nan")})
    _, page = page_of(run)
    assert "no evaluation yet" in page.text
    assert "no rollout yet" in page.text
    assert {figure["id"] for figure in page.having("figure")} == {"grad_norm", "sft_loss"}


def test_damaged_batch_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = demo_run(tmp_path / "run", rollouts=8)
    shard = run.batch(20) / "rollout.0.h5"
    shard.write_bytes(shard.read_bytes()[:1000])
    _, page = page_of(run)
    assert str(shard) in page.text
    assert "Rollout of step 13, the first" in page.text
    assert "Rollout of step 20" not in page.text


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        build_report(tmp_path / "missing")
    with pytest.raises(UserError, match=r"it has no run\.yaml"):
        build_report(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_five_hundred_steps_take_two_seconds_and_four_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import miles.report.transcripts as module

    run = demo_run(tmp_path / "run", rollouts=500, noise=1e-3)
    opened = []
    real = module.open_shard
    monkeypatch.setattr(module, "open_shard", lambda path: opened.append(path) or real(path))
    build_report(run.path)
    start = time.process_time()
    page = build_report(run.path)
    assert time.process_time() - start < 2.0
    assert len({path.parent for path in opened}) == 4, "of five hundred batches and their evaluations"
    assert len(opened) == 2 * len(set(opened)), "each shard once a page"
    assert page.stat().st_size < 3e6
    assert CONFIG["num_rollout"] != 500


def test_page_is_replaced_and_nothing_is_left_behind(finished: RunDir) -> None:
    first = build_report(finished.path)
    assert build_report(finished.path) == first == finished.report / "index.html"
    assert [path.name for path in finished.report.iterdir()] == ["index.html"]
