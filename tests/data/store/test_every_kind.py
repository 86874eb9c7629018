"""Every kind of file: another major number or kind is refused by name, a flipped byte is found and named, a torn tail costs one record."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct

import h5py
import msgpack
import pytest
import xxhash
from one_of_each import SEALED, make

from miles.config.exits import UserError
from miles.data.inspect.check import check
from miles.data.inspect.recognise import describe
from miles.data.store.checkpoint import read_complete, read_state
from miles.data.store.files import OtherSchema, read_listing, seal_listing
from miles.data.store.journal import Journal, last_good_end, read_journal, scan_journal
from miles.data.store.manifest import Dropped, Manifest, Policy, find_batch, read_manifest, seal_manifest
from miles.data.store.routes import open_routes
from miles.data.store.run_dir import RunDir, read_provenance
from miles.data.store.shard import open_shard
from miles.data.store.train_record import open_train_record


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def files(made, tmp_path):
    """A fresh copy that may be damaged."""
    shutil.copytree(made["run"], tmp_path / "run", symlinks=True)
    return {name: tmp_path / "run" / path.relative_to(made["run"]) for name, path in made.items()}


def with_schema(path, schema):
    """The same file under another schema, sound in every other way."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            file.attrs["schema"] = schema
    elif path.suffix == ".log":
        record = msgpack.unpackb(path.read_bytes()[12 : 12 + struct.unpack("<I", path.read_bytes()[:4])[0]])
        payload = msgpack.packb({**record, "schema": schema})
        path.write_bytes(struct.pack("<IQ", len(payload), xxhash.xxh3_64_intdigest(payload)) + payload)
    else:
        content = {key: value for key, value in json.loads(path.read_text()).items() if key != "xxh3"}
        path.write_text(json.dumps({**content, "schema": schema}))


READERS = {
    "shard": ("miles.rollout", open_shard),
    "routes": ("miles.routes", open_routes),
    "train": ("miles.train", open_train_record),
    "journal": ("miles.journal", lambda path: list(read_journal(path))),
    "manifest": ("miles.batch", read_manifest),
    "state": ("miles.checkpoint", lambda path: read_state(path.parent)),
    "complete": ("miles.checkpoint", lambda path: read_complete(path.parent)),
    "provenance": ("miles.provenance", lambda path: read_provenance(RunDir(path.parent))),
}
INSPECTED = {**{name: kind for name, (kind, _) in READERS.items()}, "plan": "miles.plan"}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("schema", ["{kind}/2", "{kind}/10.1", "miles.other/1", "nonsense"])
def test_readers_refuse_what_they_do_not_know_by_name(files, name, schema):
    kind, read = READERS[name]
    schema = schema.format(kind=kind)
    with_schema(files[name], schema)
    with pytest.raises(OtherSchema) as caught:
        read(files[name])
    line = str(caught.value)
    assert str(files[name]) in line
    assert "\n" not in line
    assert f"{kind}/1" in line, "what is expected is named"
    if schema.startswith(kind):
        assert f"is {schema}, and this miles reads {kind}/1; use the miles version that wrote it" in line


@pytest.mark.parametrize("name", READERS)
def test_a_minor_number_is_read(files, name):
    kind, read = READERS[name]
    with_schema(files[name], f"{kind}/1.7")
    read(files[name])


@pytest.mark.parametrize("name", INSPECTED)
@pytest.mark.parametrize("schema", ["{kind}/2", "miles.other/1"])
def test_inspection_refuses_the_same(files, name, schema):
    schema = schema.format(kind=INSPECTED[name])
    with_schema(files[name], schema)
    with pytest.raises(OtherSchema, match=schema):
        describe(files[name])


def flips(name, path, count):
    """Positions and bits, seeded; not the name of a listing's own checksum: without it a listing is one of another program."""
    generator, content = random.Random(name), path.read_bytes()
    own = content.rfind(b'"xxh3"')
    safe = [place for place in range(len(content)) if path.name not in ("manifest.json", "COMPLETE") or not own <= place < own + 6]
    return [(place, 1 << generator.randrange(8)) for place in (generator.choice(safe) for _ in range(count))]


@pytest.mark.parametrize("name", SEALED)
def test_a_flipped_bit_is_found_and_named(files, name):
    """In shards, routes, manifests, train records, and every file of a checkpoint."""
    path = files[name]
    content = path.read_bytes()
    for place, bit in flips(name, path, 30):
        damaged = bytearray(content)
        damaged[place] ^= bit
        path.write_bytes(damaged)
        bad = [verdict for verdict in check(files["run"]) if not verdict.good]
        assert [verdict.path for verdict in bad] == [path], f"byte {place}, bit {bit}"
        assert str(path) in bad[0].message
    path.write_bytes(content)
    assert all(verdict.good for verdict in check(files["run"]))


@pytest.mark.parametrize("name", ["shard", "routes", "manifest"])
def test_a_damaged_batch_is_never_trained_on(files, name, caplog):
    run = RunDir(files["run"])
    content = files[name].read_bytes()
    for place, bit in flips(name, files[name], 25):
        damaged = bytearray(content)
        damaged[place] ^= bit
        files[name].write_bytes(damaged)
        caplog.clear()
        assert find_batch(run, 3, "rollout", "abc") is None, f"byte {place}, bit {bit}"
        assert str(files[name]) in caplog.text
        (aside,) = run.batches.glob("step_000003.aside.*")
        aside.rename(run.batch(3))
        files[name].write_bytes(content)
    found = find_batch(run, 3, "rollout", "abc")
    assert found is not None
    assert found.draws == [7, 8, 9]


def test_a_file_of_another_size_and_a_missing_one_are_named(files):
    files["weights"].write_bytes(b"short")
    files["shard"].unlink()
    files["routes"].unlink()  # retention may have
    bad = {verdict.path: verdict.message for verdict in check(files["run"]) if not verdict.good}
    assert set(bad) == {files["weights"], files["shard"]}
    assert "1024 bytes expected, 5 found" in bad[files["weights"]]
    assert "missing" in bad[files["shard"]]


def test_a_journal_cut_at_every_byte_of_its_last_two_records(files):
    """Read, continued and verified: only whole records count, and a torn tail is no damage."""
    path = files["journal"]
    whole = path.read_bytes()
    starts = [position for position, _, _ in scan_journal(path)]
    ends = [*starts[1:], len(whole)]
    for cut in range(starts[-2], len(whole) + 1):
        path.write_bytes(whole[:cut])
        good = sum(end <= cut for end in ends)
        assert [group[0].draw for _, group in read_journal(path)] == [7, 8, 9][:good]
        assert last_good_end(path) == (ends[good - 1] if good else 0)
        (verdict,) = check(path)
        assert verdict.good, f"cut at {cut}: {verdict.message}"
        assert ("after the last whole record" in verdict.message) == (cut not in ends)
        note = "\n".join(describe(path).notes)
        assert ("no complete record" in note) == (cut not in ends)
        if cut % 37 == 0:
            with Journal(path) as journal:
                assert path.stat().st_size == journal.bytes == last_good_end(path), "what is torn is cut off before more is written"


def test_a_damaged_record_in_the_middle_of_a_journal_is_named(files):
    path = files["journal"]
    starts = [position for position, _, _ in scan_journal(path)]
    content = bytearray(path.read_bytes())
    content[starts[1] + 50] ^= 4
    path.write_bytes(content)
    (verdict,) = check(path)
    assert not verdict.good
    assert f"{path}: the record at byte {starts[1]} doesn't have its checksum" in verdict.message
    assert [group[0].draw for _, group in read_journal(path)] == [7]


def test_a_listing_without_its_own_checksum_is_read(files):
    """Another program may write one."""
    path = files["manifest"]
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "xxh3"}
    path.write_text(json.dumps(content))
    assert read_manifest(path).draws == [7, 8, 9]
    assert read_listing(path) == content


@pytest.mark.parametrize(
    ("batches", "wrong"),
    [
        ([([0, 1], [], 2), ([2, 4], [3], 5), ([5], [], 6)], None),
        ([([0, 1], [], 2), ([3, 4], [], 5)], "step_000002.*lost: draws 2$"),
        ([([0, 1], [], 2), ([1, 2, 3], [], 4)], "step_000002.*used twice: draws 1$"),
        ([([0, 1], [1], 2)], "step_000001.*used twice: draws 1$"),
        ([([0, 3], [], 4)], "step_000001.*lost: draws 1 to 2$"),
        ([([0, 1, 2], [], 2)], "draws up to 2, and the next is 2"),
        ([([0, 1], [], 2), None, ([7, 8], [], 9)], None),  # retention took the one between
    ],
)
@pytest.mark.parametrize("rollouts_alone", [False, True])
def test_every_draw_is_accounted_for(tmp_path, batches, wrong, rollouts_alone):
    run = RunDir(tmp_path / "run")
    run.attempts.mkdir(parents=True)
    for step, batch in enumerate(batches, 1):
        if batch is not None:
            draws, dropped, following = batch
            policy = Policy(weight_version=step, weight_checksum="a")
            fates = [Dropped(draw=draw, why="equal rewards") for draw in dropped]
            seal_manifest(run.batch(step), Manifest(run_id="r", epoch=1, step=step, kind="rollout", policy=policy, shards=[], draws=draws, dropped=fates, next_draw=following))
    run.run_yaml.write_text("debug: {}")
    found = list(check(run.path))
    assert all(verdict.good for verdict in found), "nothing has been trained on for good"
    assert re.fullmatch(r"draws of \d batch(es)? not judged: no checkpoint is complete", found[-1].message)
    if rollouts_alone:
        run.run_yaml.write_text("debug: {rollout_only: true}")
    else:
        run.checkpoint(len(batches)).mkdir(parents=True)
        seal_listing(run.checkpoint(len(batches)) / "COMPLETE", {"schema": "miles.checkpoint/1", "files": []})
    assert not any("not judged" in verdict.message for verdict in check(run.path))
    bad = [verdict.message for verdict in check(run.path) if not verdict.good]
    if wrong is None:
        assert bad == []
    else:
        (message,) = bad
        assert re.search(wrong, message), message


def test_nothing_vouches_for_a_line_of_metrics(files):
    with pytest.raises(UserError, match="nothing vouches for a metrics file"):
        list(check(files["metrics"]))
