import os
import threading

import pytest

from miles.data.store.epoch import Fence, Fenced, new_epoch, newest_epoch


def test_epochs_count_from_one_and_latest_follows(run_dir):
    assert newest_epoch(run_dir) == 0
    assert [new_epoch(run_dir) for _ in range(3)] == [1, 2, 3]
    assert os.readlink(run_dir.latest) == "attempts/000003"
    assert sorted(path.name for path in run_dir.path.iterdir()) == ["attempts", "latest"]
    assert newest_epoch(run_dir) == 3


def test_fence_lets_the_newest_pass_and_tells_the_others(run_dir):
    for _ in range(3):
        new_epoch(run_dir)
    Fence(run_dir, 3).check()
    for old in (1, 2):
        with pytest.raises(Fenced) as caught:
            Fence(run_dir, old).check()
        assert caught.value.exit_code == 75


def test_check_is_one_look_however_many_attempts(run_dir, monkeypatch):
    for _ in range(5):
        new_epoch(run_dir)
    monkeypatch.setattr(os, "scandir", lambda *_: pytest.fail("check must not list"))
    monkeypatch.setattr(os, "listdir", lambda *_: pytest.fail("check must not list"))
    Fence(run_dir, 5).check()


def test_attempts_that_begin_at_once_have_different_epochs(run_dir):
    found, barrier = [], threading.Barrier(8)

    def begin():
        barrier.wait()
        try:
            found.append(new_epoch(run_dir))
        except Fenced:
            found.append(None)  # overtaken while beginning: allowed, and told

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    epochs = [epoch for epoch in found if epoch is not None]
    assert len(epochs) == len(set(epochs))
    assert newest_epoch(run_dir) == 8
    alive = [epoch for epoch in range(1, 9) if Fence(run_dir, epoch).staging.is_dir() and _passes(Fence(run_dir, epoch))]
    assert alive == [8]


def test_staging_of_older_attempts_is_gone(run_dir):
    first = Fence(run_dir, new_epoch(run_dir))
    (first.staging / ".left.tmp").touch()
    second = Fence(run_dir, new_epoch(run_dir))
    assert second.staging.is_dir()
    assert list(run_dir.attempt(1).iterdir()) == []


def _passes(fence):
    try:
        fence.check()
    except Fenced:
        return False
    return True


def test_who_goes_on_from_an_attempt_leaves_the_run_to_whoever_was_faster(run_dir):
    assert new_epoch(run_dir) == 1
    assert new_epoch(run_dir, after=1) == 2
    assert new_epoch(run_dir) == 3, "a requeued job goes on from whatever is there"
    with pytest.raises(Fenced, match=r"attempt 2 .* was superseded by attempt 3"):
        new_epoch(run_dir, after=2)
    assert newest_epoch(run_dir) == 3
