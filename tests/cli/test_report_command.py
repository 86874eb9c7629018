"""`miles-submit report`, and the page that is kept fresh while a run goes on."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from demo_run import begin_attempt, demo_run, empty_run, record_step

from miles.cli.report import report
from miles.config.exits import UserError
from miles.report.refresh import EVERY_SECONDS, Refresher


def test_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = demo_run(tmp_path / "run", rollouts=2)
    assert report(run.path, False) == 0
    assert capsys.readouterr().out == f"report: {run.report / 'index.html'}\nrollout against training: bitwise: every token has the same bits on both sides\n"
    assert report(run.path, True) == 0
    told = json.loads(capsys.readouterr().out)
    assert Path(told["report"]).stat().st_size == told["bytes"]
    with pytest.raises(UserError):
        report(tmp_path, False)


def wait_until(done: object, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_refresher_makes_the_page_again_when_a_step_was_recorded(tmp_path: Path) -> None:
    run = empty_run(tmp_path / "run")
    epoch = begin_attempt(run)
    refresher = Refresher(run.path, every=0.05)
    try:
        refresher.poke()
        wait_until(lambda: refresher.made == 1)
        record_step(run, epoch, 1, "sft", time.time(), **{"train/loss": 2.5})
        wait_until(lambda: refresher.poke() or refresher.made == 2)
        for _ in range(20):
            refresher.poke()
            time.sleep(0.02)
        assert refresher.made == 2, "nothing new, nothing made"
    finally:
        refresher.close()
    assert "Warm-start loss" in (run.report / "index.html").read_text()


def test_refresher_outlives_a_page_that_can_not_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = empty_run(tmp_path / "run")
    epoch = begin_attempt(run)
    run.report.write_text("a file in the way")
    refresher = Refresher(run.path, every=0.05)
    try:
        refresher.poke()
        wait_until(lambda: "the report was not made" in caplog.text)
        run.report.unlink()
        record_step(run, epoch, 1, "sft", time.time(), **{"train/loss": 2.5})
        wait_until(lambda: refresher.poke() or refresher.made == 1)
    finally:
        refresher.close()


def test_refresher_closes_at_once_without_work(tmp_path: Path) -> None:
    start = time.monotonic()
    Refresher(tmp_path).close()
    assert time.monotonic() - start < EVERY_SECONDS / 2
