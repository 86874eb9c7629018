"""An older attempt adds nothing to any growing file: after the newer one began, every append raises Fenced and the bytes stay."""

from __future__ import annotations

import pytest

from miles.data.store.epoch import Fence, Fenced, new_epoch
from miles.data.store.events import Events
from miles.data.store.journal import Journal
from miles.data.store.metrics import Metrics


def everything(run_dir):
    return {str(path): path.read_bytes() for path in run_dir.path.rglob("*") if path.is_file()}


@pytest.fixture
def writers(run_dir, make_sample):
    """The growing files of attempt 1, each with something in it, and what would add to them."""
    fence = Fence(run_dir, new_epoch(run_dir))
    metrics = Metrics(run_dir.metrics, fence)
    journal, events = Journal(run_dir.journal_file(0, 1), fence=fence), Events(run_dir, "worker", 0, 1)

    def phase():
        with events.phase("train", 1):
            pass

    def new_journal():
        Journal(run_dir.journal_file(1, 1), fence=fence)

    found = {
        "journal": lambda: journal.append([make_sample(0, 0)], {"step": 1}),
        "journal compaction": lambda: journal.compact(lambda *_: True),
        "events": lambda: events.append("seal", 1, 0.0, 1.0),
        "phase": phase,
        "metrics": lambda: metrics.append({"step": 1, "kind": "rollout"}),
        "metrics cut back": lambda: metrics.cut_back(0),
        "another journal": new_journal,
    }
    for name, write in found.items():
        if name != "another journal":
            write()
    metrics.append({"step": 1, "kind": "rollout"})
    yield found
    journal.close()


NAMES = ("journal", "journal compaction", "events", "phase", "metrics", "metrics cut back", "another journal")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_added_once_a_newer_attempt_exists(run_dir, writers, name):
    new_epoch(run_dir)
    before = everything(run_dir)
    with pytest.raises(Fenced, match=r"attempt 1 .* superseded by attempt 2"):
        writers[name]()
    assert everything(run_dir) == before


def test_a_fenced_writer_that_failed_says_that_it_was_fenced(run_dir):
    """A phase that raises in a superseded attempt ends with 75, whatever it raised: the newer attempt has the word."""
    events = Events(run_dir, "trainer", 0, new_epoch(run_dir))
    new_epoch(run_dir)
    with pytest.raises(Fenced), events.phase("train", 1):
        raise RuntimeError("of no interest any more")


def test_all_names_are_tried(writers):
    assert tuple(writers) == NAMES
