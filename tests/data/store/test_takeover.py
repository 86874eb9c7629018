"""An attempt that is stopped right after a look at the fence, and goes on when a newer one has begun: it changes nothing any more."""

import contextlib
import os
import signal

import pytest

from miles.data.store.epoch import Fence, Fenced, new_epoch, point_latest
from miles.data.store.files import seal_bytes, seal_json
from miles.data.store.manifest import set_aside
from miles.data.store.metrics import Metrics, read_metrics
from miles.data.store.run_dir import record_attempt


def line(step, **values):
    return {"step": step, "kind": "sft", "time": 0.0, **values}


def tree(run_dir):
    """What lies outside the attempts: bytes of files, targets of links, names of folders."""
    found = {}
    for path in sorted(run_dir.path.rglob("*")):
        if path.relative_to(run_dir.path).parts[0] != "attempts":
            found[str(path)] = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


class Stopped(Fence):
    """Its look number `at` sees no newer attempt; then one begins, resumes and seals, before the caller goes on."""

    def __init__(self, run_dir, epoch, at):
        super().__init__(run_dir, epoch)
        self.at, self.after = at, None

    def check(self):
        super().check()
        self.at -= 1
        if self.at == 0:
            newer = Fence(self.run_dir, new_epoch(self.run_dir))
            Metrics(self.run_dir.metrics, newer).cut_back(1)
            record_attempt(self.run_dir, newer.epoch, newer)
            for name in ("sealed", "folder/content"):
                seal_bytes(self.run_dir.path / name, b"newer", newer)
            self.after = tree(self.run_dir)


def told(run_dir, fence):
    metrics = Metrics(run_dir.metrics, fence)
    metrics.append(line(1))
    metrics.append(line(2))


def resumed(run_dir, fence):
    metrics = Metrics(run_dir.metrics, fence)
    metrics.cut_back(1)
    metrics.append(line(2))


def replaced(run_dir, fence):
    draft = fence.staging / "draft"
    draft.mkdir()
    (draft / "content").write_bytes(b"older")
    fence.replace_folder(draft, run_dir.path / "folder")


ACTIONS = {
    "metrics of a first attempt": told,
    "metrics of a resumed attempt": resumed,
    "a sealed file": lambda run_dir, fence: seal_json(run_dir.path / "sealed", {"epoch": "older"}, fence),
    "a folder": replaced,
    "a deletion": lambda run_dir, fence: fence.discard(run_dir.path / "folder"),
    "a batch set aside": lambda run_dir, fence: set_aside(run_dir.path / "folder", "1", fence),
    "the link latest": lambda run_dir, fence: point_latest(run_dir, fence),
    "provenance": lambda run_dir, fence: record_attempt(run_dir, fence.epoch, fence),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("exists", [False, True])
def test_stopped_after_any_look(tmp_path, run_dir, action, exists):
    """At each look in turn, until the action ends before it is stopped."""
    for at in range(1, 20):
        fresh = type(run_dir)(tmp_path / f"{exists}.{at}")
        fence = Stopped(fresh, new_epoch(fresh), at)
        seal_bytes(fresh.path / "folder/content", b"before")
        if exists:
            Metrics(fresh.metrics).append(line(1))
            Metrics(fresh.metrics).append(line(5))
        with contextlib.suppress(Fenced):
            action(fresh, fence)
        if fence.after is None:
            break
        assert tree(fresh) == fence.after, f"stopped after look {at}"
        assert not [found for found in read_metrics(fresh.metrics) if found["step"] == 2]
    assert 1 < at < 19, "stopped at least once"


@pytest.mark.parametrize("newer_begins", [False, True])
def test_what_is_being_set_aside_is_never_lost(run_dir, monkeypatch, newer_begins):
    """The process dies between the two renames, or a newer attempt begins there: that attempt finds the folder under its new name."""
    fence, rename = Fence(run_dir, new_epoch(run_dir)), os.rename
    for step in (1, 2):
        seal_bytes(run_dir.batch(step) / "content", b"before")

    def stopped(path, target):
        rename(path, target)
        if str(path).endswith("step_000002"):
            if not newer_begins:
                raise KeyboardInterrupt
            new_epoch(run_dir)

    set_aside(run_dir.batch(1), "1", fence)
    with monkeypatch.context() as patch:
        patch.setattr("os.rename", stopped)
        with pytest.raises(Fenced if newer_begins else KeyboardInterrupt):
            set_aside(run_dir.batch(2), "1", fence)
    if not newer_begins:
        new_epoch(run_dir)
    assert sorted(folder.name for folder in run_dir.batches.iterdir()) == ["step_000001.aside.1", "step_000002.aside.1"]
    assert {path.read_bytes() for path in run_dir.batches.glob("*/content")} == {b"before"}
    assert not list(run_dir.attempts.glob("*/staging*/*"))


@pytest.mark.parametrize(("renames", "left"), [(1, b"before"), (2, b"older"), (3, b"older")])
@pytest.mark.parametrize("newer_begins", [False, True])
def test_a_folder_that_is_being_replaced_is_never_lost(run_dir, monkeypatch, renames, left, newer_begins):
    """SIGKILL after any of the renames, or a newer attempt begins there: it finds the old folder or the new one, whole."""
    fence, rename, done = Fence(run_dir, new_epoch(run_dir)), os.rename, []
    seal_bytes(run_dir.path / "folder/content", b"before")

    def stopped(path, target):
        rename(path, target)
        done.append(path)
        if len(done) == renames:
            if not newer_begins:
                os.kill(os.getpid(), signal.SIGKILL)
            new_epoch(run_dir)

    if newer_begins:
        with monkeypatch.context() as patch:
            patch.setattr("os.rename", stopped)
            with pytest.raises(Fenced) if renames == 1 else contextlib.nullcontext():
                replaced(run_dir, fence)
    else:
        process = os.fork()
        if process == 0:
            os.rename = stopped
            replaced(run_dir, fence)
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
        assert (run_dir.path / "folder").exists() == (renames > 1)
        new_epoch(run_dir)
    assert (run_dir.path / "folder/content").read_bytes() == left
    assert not list(run_dir.attempts.glob("*/staging*/*"))


def test_discarded_and_replaced_folders(run_dir):
    fence = Fence(run_dir, new_epoch(run_dir))
    for _ in range(2):
        replaced(run_dir, fence)
        assert (run_dir.path / "folder/content").read_bytes() == b"older"
    fence.discard(run_dir.path / "folder")
    seal_bytes(run_dir.path / "file", b"", fence)
    fence.discard(run_dir.path / "file")
    assert not [path for path in fence.staging.iterdir()]
    with pytest.raises(FileNotFoundError):
        fence.discard(run_dir.path / "file")
    assert sorted(path.name for path in run_dir.path.iterdir()) == ["attempts", "latest"]
