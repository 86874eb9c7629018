import json
import logging

import pytest
from pydantic import ValidationError

from miles.data.store.epoch import Fence, Fenced, new_epoch
from miles.data.store.files import Damaged, Sealed
from miles.data.store.manifest import Manifest, Policy, ShardEntry, find_batch, read_manifest, seal_manifest, verify_batch
from miles.data.store.routes import write_routes
from miles.data.store.shard import write_shard


def entry(sealed: Sealed) -> ShardEntry:
    return ShardEntry(name=sealed.name, bytes=sealed.bytes, xxh3=sealed.xxh3, sequences=2, tokens=10)


@pytest.fixture
def make_batch(run_dir, make_sample):
    def make(step=12, kind="rollout", **more):
        import numpy as np

        folder = run_dir.batch_of(kind, step)
        samples = [make_sample(step, 0, routes=np.zeros((4, 1, 2), np.uint8)), make_sample(step, 1)]
        shard = write_shard(folder / "rollout.0.h5", samples)
        routes = write_routes(folder / "routes.0.h5", samples)
        fields = {"parent_checkpoint": "step_000010", **more}
        manifest = Manifest(
            run_id="run", epoch=3, step=step, kind=kind, policy=Policy(weight_version=4, weight_checksum="abc"), shards=[entry(shard)], routes=[entry(routes)],
            draws=[step], next_draw=step + 1, assignment=[[[[(0, 0, 2)], []]]], **fields,
        )  # fmt: skip
        seal_manifest(folder, manifest)
        return manifest

    return make


def unsigned(path):
    """A manifest's content as another program would write it: without the checksum of itself."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "xxh3"}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_round_trip_and_what_the_file_says(run_dir, make_batch):
    manifest = make_batch()
    assert read_manifest(run_dir.batch(12)) == read_manifest(run_dir.batch(12) / "manifest.json") == manifest
    content = json.loads((run_dir.batch(12) / "manifest.json").read_text())
    assert content["schema"] == "miles.batch/1"
    assert content["assignment"] == [[[[[0, 0, 2]], []]]]
    assert content["policy"] == {"weight_version": 4, "weight_checksum": "abc"}
    assert (manifest.sequences, manifest.tokens) == (2, 10)
    with pytest.raises(ValidationError):
        manifest.step = 3


def test_found_again_with_its_lineage(run_dir, make_batch):
    manifest = make_batch()
    assert find_batch(run_dir, 12, "rollout", "abc") == manifest
    assert find_batch(run_dir, 12, "rollout", None) == manifest
    assert find_batch(run_dir, 13, "rollout", "abc") is None
    evaluation = make_batch(kind="eval")
    assert find_batch(run_dir, 12, "eval", "abc") == evaluation


@pytest.mark.parametrize(
    ("kind", "checksum", "why"),
    [("rollout", "xyz", "made by weights abc, not by the present xyz"), ("sft", "abc", "the rollout batch of step 12")],
)
def test_another_lineage_is_set_aside_and_said(run_dir, make_batch, caplog, kind, checksum, why):
    make_batch()
    with caplog.at_level(logging.WARNING):
        assert find_batch(run_dir, 12, kind, checksum) is None
    assert why in caplog.text
    assert "step_000012.aside.3" in caplog.text
    assert not run_dir.batch(12).exists()
    verify = run_dir.batches / "step_000012.aside.3"
    assert read_manifest(verify).step == 12
    make_batch()
    assert find_batch(run_dir, 12, "rollout", "xyz") is None
    assert (run_dir.batches / "step_000012.aside.3.2").is_dir()


def test_damaged_batch_is_set_aside_and_named(run_dir, make_batch, caplog):
    make_batch()
    flip(run_dir.batch(12) / "rollout.0.h5")
    assert find_batch(run_dir, 12, "rollout", "abc") is None
    assert "rollout.0.h5: xxh3" in caplog.text
    make_batch()
    (run_dir.batch(12) / "manifest.json").write_text("{")
    assert find_batch(run_dir, 12, "rollout", "abc") is None
    assert "manifest.json: not JSON" in caplog.text


def test_old_attempt_sets_nothing_aside(run_dir, make_batch):
    old = Fence(run_dir, new_epoch(run_dir))
    make_batch()
    new_epoch(run_dir)
    with pytest.raises(Fenced):
        find_batch(run_dir, 12, "rollout", "xyz", fence=old)
    assert run_dir.batch(12).is_dir()


def test_folder_without_a_manifest_is_no_batch(run_dir, make_batch):
    make_batch()
    (run_dir.batch(12) / "manifest.json").unlink()
    assert find_batch(run_dir, 12, "rollout", "abc") is None
    assert (run_dir.batch(12) / "rollout.0.h5").exists()


def test_verify_names_the_file_and_forgives_retired_routes(run_dir, make_batch):
    manifest = make_batch()
    verify_batch(run_dir, manifest)
    flip(run_dir.batch(12) / "routes.0.h5")
    with pytest.raises(Damaged, match=r"routes\.0\.h5"):
        verify_batch(run_dir, manifest)
    (run_dir.batch(12) / "routes.0.h5").unlink()
    verify_batch(run_dir, manifest)
    (run_dir.batch(12) / "rollout.0.h5").unlink()
    with pytest.raises(Damaged, match=r"rollout\.0\.h5: missing"):
        verify_batch(run_dir, manifest)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"schema": "miles.batch/2"}, ValueError, r"is miles\.batch/2, and this miles reads miles\.batch/1"),
        ({"step": "twelve"}, Damaged, "step: Input should be a valid integer"),
        ({"policy": {"weight_version": 1}}, Damaged, r"policy\.weight_checksum: Field required"),
    ],
)
def test_wrong_content_is_named(run_dir, make_batch, change, error, message):
    make_batch()
    path = run_dir.batch(12) / "manifest.json"
    path.write_text(json.dumps({**unsigned(path), **change}))
    with pytest.raises(error, match=rf"manifest\.json: {message}"):
        read_manifest(path)


def test_later_keys_are_ignored(run_dir, make_batch):
    manifest = make_batch()
    path = run_dir.batch(12) / "manifest.json"
    path.write_text(json.dumps({**unsigned(path), "later": 1}))
    assert read_manifest(path) == manifest


def test_a_manifest_vouches_for_itself(run_dir, make_batch):
    make_batch()
    path = run_dir.batch(12) / "manifest.json"
    path.write_text(path.read_text().replace('"next_draw": 13', '"next_draw": 14'))
    with pytest.raises(Damaged, match=r"manifest\.json: xxh3 [0-9a-f]{16} expected of its content, [0-9a-f]{16} found"):
        read_manifest(path)
