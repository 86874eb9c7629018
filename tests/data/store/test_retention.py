import numpy as np
import pytest
from owner import owner

from miles.data.store.epoch import new_epoch
from miles.data.store.journal import Journal
from miles.data.store.manifest import Manifest, Policy, ShardEntry, read_manifest, seal_manifest, verify_batch
from miles.data.store.retention import Bounds, retire_batches, retire_journals
from miles.data.store.routes import write_routes
from miles.data.store.run_dir import steps_in
from miles.data.store.shard import write_shard


@pytest.fixture
def batches(run_dir, make_sample):
    for step in range(6):
        samples = [make_sample(step, 0, routes=np.zeros((4, 1, 2), np.uint8))]
        folder = run_dir.batch(step)
        files = [write_shard(folder / "rollout.0.h5", samples), write_routes(folder / "routes.0.h5", samples)]
        entries = [ShardEntry(name=file.name, bytes=file.bytes, xxh3=file.xxh3, sequences=1, tokens=5) for file in files]
        policy = Policy(weight_version=0, weight_checksum="")
        seal_manifest(folder, Manifest(run_id="r", epoch=1, step=step, kind="rollout", policy=policy, shards=entries[:1], routes=entries[1:], draws=[step]))
        run_dir.train(step).mkdir(parents=True)
        (run_dir.train(step) / "node.h5").touch()


def routes_left(run_dir):
    return [step for step in steps_in(run_dir.batches) if (run_dir.batch(step) / "routes.0.h5").exists()]


def test_a_damaged_checkpoint_makes_nothing_superfluous(run_dir, batches, make_sample):
    """Step 6's is damaged, though COMPLETE: the run went on from step 2 and has just saved step 3. It trains on 4 and 5 again, and makes 6."""
    run_dir.checkpoint(6).mkdir(parents=True)
    (run_dir.checkpoint(6) / "COMPLETE").touch()
    with Journal(run_dir.journal_file("missing", 1)) as journal:
        journal.append([make_sample(60, 0)], {"kind": "rollout", "step": 6})
    with Journal(run_dir.journal_file("sealed", 1)) as journal:
        journal.append([make_sample(4, 0)], {"kind": "rollout", "step": 4})
    assert retire_journals(owner(run_dir, 2), 2) == []
    retire_batches(owner(run_dir), Bounds(count=1), 3)
    assert steps_in(run_dir.batches) == routes_left(run_dir) == [4, 5]


def test_routes_go_first_and_only_up_to_the_checkpoint(run_dir, batches):
    retire_batches(owner(run_dir), Bounds(), 3)
    assert steps_in(run_dir.batches) == [0, 1, 2, 3, 4, 5]
    assert routes_left(run_dir) == [4, 5]
    verify_batch(run_dir, read_manifest(run_dir.batch(0)))  # still a whole batch


@pytest.mark.parametrize(("newest", "keep", "left"), [(3, 4, [2, 3, 4, 5]), (3, 1, [4, 5]), (5, 1, [5]), (1, 1, [2, 3, 4, 5]), (5, 9, [0, 1, 2, 3, 4, 5])])
def test_newest_stay_and_what_a_resume_needs(run_dir, batches, newest, keep, left):
    retire_batches(owner(run_dir), Bounds(count=keep), newest)
    assert steps_in(run_dir.batches) == left
    assert steps_in(run_dir.train_records) == left
    assert all((run_dir.batch(step) / "rollout.0.h5").exists() for step in left)


def test_unfinished_deletion_is_finished(run_dir, batches, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            retire_batches(owner(run_dir), Bounds(count=5), 5)
    assert steps_in(run_dir.batches) == [1, 2, 3, 4, 5]
    assert list(owner(run_dir).staging.iterdir()), "the rest of the deleted folder"
    new_epoch(run_dir)
    assert not [path for path in run_dir.attempts.rglob("*") if path.is_file()]


def test_damaged_old_manifest_stops_nobody(run_dir, batches, caplog):
    (run_dir.batch(1) / "manifest.json").write_text("{")
    retire_batches(owner(run_dir), Bounds(), 5)
    assert routes_left(run_dir) == [1]
    assert "manifest.json: not JSON" in caplog.text


def test_journals_go_when_every_draw_is_under_the_checkpoint(run_dir, batches, make_sample):
    for worker, draws in (("done", [0, 3]), ("newer", [3, 4]), ("unused", [3, 77])):
        with Journal(run_dir.journal_file(worker, 1)) as journal:
            for draw in draws:
                journal.append([make_sample(draw, 0)], {"kind": "rollout", "step": draw})
    with Journal(run_dir.journal_file("present", 2)) as journal:
        journal.append([make_sample(0, 0)], {"kind": "rollout", "step": 0})
    assert retire_journals(owner(run_dir, 2), None) == []
    assert [path.name for path in retire_journals(owner(run_dir, 2), 3)] == ["done.1.log"]
    assert sorted(path.name for path in run_dir.journal.iterdir()) == ["newer.1.log", "present.2.log", "unused.1.log"]
