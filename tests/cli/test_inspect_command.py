"""`miles-submit inspect` on one of every kind of file: what a person reads, what a script gets, and how it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "store"))  # the maker of one of each lives beside the store's tests
sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from demo_run import demo_run
from one_of_each import EVERY, make, samples

from miles.cli.inspect import inspect, printable, size
from miles.config.exits import OK, WRONG, UserError
from miles.data.store.events import Events
from miles.data.store.run_dir import RunDir


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make(tmp_path_factory.mktemp("made") / "run")


def page(path: Path, capsys: pytest.CaptureFixture[str], *, rows: str | None = None, verify: bool = False) -> str:
    assert inspect(path, rows, verify, as_json=False) == OK
    return capsys.readouterr().out


def facts(text: str) -> dict[str, str]:
    """name → value of the lines before the first table."""
    return dict(re.split(r"  +", line, maxsplit=1) for line in text.split("\n\n")[0].splitlines()[1:] if "  " in line)


TOKENS = sum(len(sample.token_id) for sample in samples())
# What stands on the page of each kind: of its facts, and of its tables.
EXPECTED: dict[str, tuple[str, dict[str, str], list[str]]] = {
    "shard": (
        "shard: sequences that one worker made (miles.rollout/1)",
        {"worker": "0", "epoch": "1", "step": "3", "sequences": "6", "tokens": str(TOKENS), "draws": "7 to 9", "status": "3 completed, 3 truncated", "sources": "6 data", "weight versions": "1"},
        [r"reward +6 +1\.25 +0 +1\.25 +2\.5 +0", r"prompt length +6 +2 +2", r"response length +6 +4\.5 +3 +4\.5 +6", r"reward part format +6 +0\.5"],
    ),
    "routes": ("routes: the experts that each token went to (miles.routes/1)", {"sequences": "6", "rows": str(TOKENS - 6), "layers": "3", "top_k": "2", "experts used": "8"}, [r"of those used +8"]),
    "train": ("train record: what training saw on one node (miles.train/1)", {"backend": "fsdp", "threads": "2", "ranks": "0", "used tokens": str(TOKENS)}, [rf"entropy +{TOKENS} +\S+ +−1 +\S+ +1 +0", rf" +2 +{TOKENS} +0$"]),
    "manifest": ("batch (miles.batch/1)", {"weights": "version 2, checksum abc", "parent checkpoint": "step_000002"}, [r"routes +routes\.0\.h5 .* there"]),
    "batch": (
        "batch (miles.batch/1)",
        {
            "run": "one", "kind": "rollout", "step": "3", "attempt": "1", "weights": "version 2, checksum abc", "parent checkpoint": "step_000002", "tokenizer": "t0", "draws": "7 to 9",
            "dropped": "1 all rewards are equal", "next draw": "11", "assignment": "1 ranks × 1 micro-batches", "status": "3 completed, 3 truncated", "guarantee": "exact",
        },
        [r"shard +rollout\.0\.h5 .* there", r"reward +6 +1\.25"],
    ),
    "state": ("state.json of a checkpoint (miles.checkpoint/1)", {"step": "3", "parent": "step_000002", "progress": "trained 3, next_draw 11"}, []),
    "complete": ("COMPLETE of a checkpoint (miles.checkpoint/1)", {"files": "2"}, [r"model +1 +1\.02 KB"]),
    "checkpoint": ("checkpoint (miles.checkpoint/1)", {"step": "3", "files": "2"}, [r"model +1 +1\.02 KB"]),
    "journal": ("journal: finished groups as they finished (miles.journal/1)", {"worker": "0", "epoch": "1", "groups": "3", "samples": "6", "tokens": str(TOKENS)}, [r"rollout +3  abc +3  7 to 9"]),
    "metrics": ("metrics: one line a step", {"lines": "3"}, [r"rollout +3  1 to 3", r"rollout/raw_reward +1\.5"]),
    "events": ("events: phases of one process, for the timeline", {"component": "trainer", "rank": "0", "attempt": "1", "from": "2023-11-14 22:13:20 UTC"}, [r"train +1  3 +3 +0"]),
    "provenance": ("provenance: what ran where", {"attempts": "1", "guarantee": "exact: synchronous"}, [r" +1  .* 2 +2 .* exact"]),
    "plan": ("plan: what the run was to do (miles.plan/1)", {"run": "one of each", "guarantee": "exact"}, []),
    "run.yaml": ("resolved configuration of a run", {"name": "one of each", "num_rollout": "5"}, []),
    "run": ("run directory", {"run": "one of each", "steps trained": "3 of 5", "attempts": "1", "guarantee": "exact: synchronous", "complete checkpoints": "3", "batches with routes": "1"}, [r"batches +3 +1", r"batches/journal +– +1"]),
}  # fmt: skip


def test_every_kind_is_expected_but_a_checkpoints_own_files() -> None:
    assert set(EVERY) - set(EXPECTED) == {"weights"}


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_page_of_every_kind(made, capsys, kind) -> None:
    what, told, tables = EXPECTED[kind]
    text = page(made[kind], capsys)
    assert text.startswith(f"{made[kind]}: {what}")
    found = facts(text)
    assert {name: found.get(name) for name in told} == told
    for table in tables:
        assert re.search(rf"^{table}", text, re.MULTILINE), f"{table} in\n{text}"
    assert inspect(made[kind], None, False, as_json=True) == OK
    answer = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert answer["path"] == str(made[kind])
    assert what.startswith(answer["what"].split(",")[0])
    assert {"schema", "tables", "notes"} <= set(answer)


def test_json_has_numbers_and_names(made, capsys) -> None:
    inspect(made["batch"], None, False, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert (answer["schema"], answer["step"], answer["tokens"], answer["status"]) == ("miles.batch/1", 3, TOKENS, {"completed": 3, "truncated": 3})
    assert answer["tables"]["files"][0]["bytes"] == made["shard"].stat().st_size
    assert answer["tables"]["sequences"][0] == {"value": "reward", "count": 6, "mean": 1.25, "min": 0.0, "median": 1.25, "max": 2.5, "not finite": 0}


def test_large_files_are_read_in_part_and_in_blocks(made, capsys, monkeypatch) -> None:
    """Experts and distributions over all that is read are counted alike, whatever the size of a block."""
    whole, train = page(made["routes"], capsys), page(made["train"], capsys)
    monkeypatch.setattr("miles.data.inspect.sequences.BLOCK", 30)
    assert page(made["routes"], capsys) == whole
    monkeypatch.setattr("miles.data.inspect.sequences.MOST", 60)
    assert "note: experts are counted in the first 2 sequences" in page(made["routes"], capsys)
    monkeypatch.setattr("miles.data.inspect.sequences.MOST", 12)
    part = page(made["train"], capsys)
    assert "note: distributions are of the first 2 sequences" in part
    assert part != train


@pytest.mark.parametrize("kind", ["batch", "manifest", "shard", "journal"])
def test_rows_show_sequences_whole(made, capsys, kind) -> None:
    text = page(made[kind], capsys, rows="3:5")
    expected = samples()[3:5]
    parts = text.split("\nplace ")
    assert len(parts) == 2
    for part, sample in zip(parts, expected, strict=True):
        for name, value in (("draw", sample.draw), ("sample", sample.sample), ("reward", sample.reward), ("status", sample.status.name.lower()), ("seed", sample.seed)):
            assert re.search(rf"^{name} +{re.escape(f'{value:.9g}' if isinstance(value, float) else str(value))}$", part, re.MULTILINE), f"{name} in\n{part}"
        assert f'"answer \\x1b[31m{sample.draw}.{sample.sample}"' in part, "what a response says does nothing to a terminal"
        assert f'"prompt {sample.draw}\\n"' in part
        for index, (token, logprob) in enumerate(zip(sample.token_id.tolist(), sample.rollout_logprob.tolist(), strict=True)):
            shown = "–" if logprob != logprob else f"{logprob:.9g}"
            where = "prompt" if index < 2 else "response"
            assert re.search(rf"^ *{index}  {where} +{token}  .* {re.escape(shown)} +{int(index >= 2)}", part, re.MULTILINE), f"token {index} in\n{part}"


def test_rows_as_json_keep_every_digit(made, capsys) -> None:
    inspect(made["shard"], "-1:", False, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    row, sample = json.loads(line), samples()[-1]
    assert (row["draw"], row["response"], row["reward parts"], row["metadata"]) == (9, sample.response, {"format": 1.0}, '{"place": 9}')
    assert [token["id"] for token in row["tokens"]] == sample.token_id.tolist()
    assert [token["log-prob"] for token in row["tokens"]][2:] == sample.rollout_logprob[2:].tolist()


def test_rows_of_records_and_lines(made, capsys) -> None:
    text = page(made["train"], capsys, rows="1")
    assert re.search(r"^shard row +1$", text, re.MULTILINE)
    assert text.count("\n") > len(samples()[1].token_id)
    assert "rollout/raw_reward  1.5" in page(made["metrics"], capsys, rows="2:")
    assert "wait" in page(made["events"], capsys, rows=":1")


@pytest.mark.parametrize(
    ("kind", "rows", "line"),
    [
        ("shard", "6:9", "no rows 6:9; it has 6, counted from 0"),
        ("shard", "5:3", "no rows 5:3"),
        ("shard", "two", "--rows two: write FIRST:LAST, such as 3:5"),
        ("shard", "", "write FIRST:LAST"),
        ("plan", "0", "this is a plan"),
        ("run", "0", "this is a run"),
    ],
)
def test_rows_that_are_not_there(made, kind, rows, line) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        inspect(made[kind], rows, False, as_json=False)


@pytest.mark.parametrize("kind", ["run", "batch", "manifest", "shard", "routes", "train", "checkpoint", "complete", "journal"])
def test_verify_of_what_is_undamaged(made, capsys, kind) -> None:
    assert re.search(r"^all (1 file is|\d+ files are) as sealed$", page(made[kind], capsys, verify=True), re.MULTILINE)


@pytest.mark.parametrize(("damaged", "asked"), [("shard", "run"), ("shard", "shard"), ("routes", "batch"), ("manifest", "batch"), ("train", "train"), ("weights", "checkpoint"), ("complete", "complete")])
def test_verify_names_the_damaged_file(made, tmp_path, capsys, damaged, asked) -> None:
    shutil.copytree(made["run"], tmp_path / "run", symlinks=True)
    there = {name: tmp_path / "run" / path.relative_to(made["run"]) for name, path in made.items()}
    content = bytearray(there[damaged].read_bytes())
    content[len(content) // 3] ^= 1
    there[damaged].write_bytes(content)
    assert inspect(there[asked], None, True, as_json=False) == WRONG
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged: ")]
    assert str(there[damaged]) in line
    assert inspect(there[asked], None, True, as_json=True) == WRONG
    answer = json.loads(capsys.readouterr().out)
    assert [each["path"] for each in answer["files"] if not each["good"]] == [str(there[damaged])]


def test_a_damaged_batch_that_was_set_aside_is_said_and_harms_nothing(made, tmp_path, capsys) -> None:
    shutil.copytree(made["run"], tmp_path / "run", symlinks=True)
    batch = RunDir(tmp_path / "run").batch(3)
    (batch / "manifest.json").write_text("{")
    batch.rename(batch.with_name("step_000003.aside.damaged"))
    assert "damaged (set aside, so it harms nothing)" in page(tmp_path / "run", capsys, verify=True)


def test_a_torn_tail_is_said(made, tmp_path, capsys) -> None:
    shutil.copytree(made["run"], tmp_path / "run", symlinks=True)
    run = RunDir(tmp_path / "run")
    for path in (run.journal_file(0, 1), run.metrics, run.event_file("trainer", 0, 1)):
        path.write_bytes(path.read_bytes()[:-7])
    assert "note: the last" in (text := page(run.journal_file(0, 1), capsys))
    assert facts(text)["groups"] == "2"
    assert "note: 1 torn line" in page(run.metrics, capsys)
    Events(run, "trainer", 0, 1).append("save", 3, 1.7e9, 1.7e9)
    text = page(run.event_file("trainer", 0, 1), capsys)
    assert "note: 1 torn line" in text
    assert re.search(r"^save +1  3", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("nothing", None, "no such file or folder"),
        ("page.html", b"<html>", "not a file of a run that can be inspected"),
        ("trainer.0.log", b"step 1\n", "a log is read by `miles-submit logs`"),
        ("config.json", b"{}", "carries no schema; expected one of miles.batch/1"),
        ("later.json", b'{"schema": "miles.later/1"}', "is miles.later/1, which this miles doesn't know"),
        ("half.json", b'{"schema": ', "not JSON"),
        ("list.json", b"[1]", "carries no schema"),
        ("cut.h5", b"\x89HDF\r\n\x1a\n", "an HDF5 file expected"),
    ],
)
def test_what_is_not_ours_is_refused_in_one_line(tmp_path, name, content, line) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        inspect(tmp_path / name, None, False, as_json=False)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no run directory, batch or checkpoint"):
        inspect(tmp_path, None, False, as_json=False)


def test_on_a_terminal(made, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "70")
    text = page(made["batch"], capsys)
    assert "\x1b[1m" in text
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in text.splitlines()[1:]) <= 70
    rows = page(made["shard"], capsys, rows="0")
    assert "\x1b[31m" not in rows, "no escape of a response reaches the terminal"


def test_tokens_have_their_text_in_a_run_with_a_tokenizer(tmp_path, capsys) -> None:
    run = demo_run(tmp_path / "run", rollouts=1)
    text = page(run.batch(run_steps(run)[-1]), capsys, rows="0")
    assert re.search(r'^ *0  prompt +\d+  "W', text, re.MULTILINE)
    assert "note: " not in text


def run_steps(run: RunDir) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in run.batches.glob("step_*"))


def test_command_line(made, tmp_path) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "miles.cli", "inspect", *words], capture_output=True, text=True)

    done = command(str(made["journal"]), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["groups"] == 3
    wrong = command(str(tmp_path / "no"))
    assert wrong.returncode == 78
    assert len(wrong.stderr.splitlines()) == 1
    assert "Example: miles-submit inspect runs/quickstart/batches/step_000012 --rows 3:5" in " ".join(command("--help").stdout.split())


def test_words() -> None:
    told: dict[int, Any] = {0: "0 B", 999: "999 B", 1000: "1 KB", 1234: "1.23 KB", 999_999: "1 MB", 64 * 10**9: "64 GB", 10**18: "1e+03 PB"}
    assert {count: size(count) for count in told} == told
    assert printable("a\x1b[2J\n\ud800é😀") == "a\\x1b[2J\\n\\ud800é😀"


def test_steps_that_are_no_numbers_are_passed_over(made, tmp_path, capsys) -> None:
    shutil.copytree(made["run"], tmp_path / "run", symlinks=True)
    run = RunDir(tmp_path / "run")
    before = facts(page(run.metrics, capsys))["lines"]
    with open(run.metrics, "a") as file:
        file.write('{"step": null, "kind": "rollout"}\n{"step": "text", "kind": "rollout"}\n')
    with open(run.event_file("trainer", 0, 1), "a") as file:
        file.write('{"phase": "odd", "step": null, "start": 1795000000.25, "end": 1795000001.5}\n')
    text = page(run.metrics, capsys)
    assert facts(text)["lines"] == before
    assert text.count("note: 2 lines without a step (a whole number) passed over") == 1
    assert re.search(r"^odd +1  – +1\.25 ", page(run.event_file("trainer", 0, 1), capsys), re.MULTILINE)
    row = facts("\n" + page(run.event_file("trainer", 0, 1), capsys, rows="-1:"))
    assert (row["start"], row["end"]) == ("1795000000.250", "1795000001.500")


def test_provenance_of_another_shape_is_named(made, tmp_path) -> None:
    shutil.copytree(made["run"], tmp_path / "run", symlinks=True)
    path = RunDir(tmp_path / "run").provenance
    path.write_text('{"schema": "miles.provenance/1", "attempts": 3}')
    with pytest.raises(UserError, match="attempts: a list of objects with an epoch expected, 3 found"):
        inspect(path, None, False, as_json=False)


@pytest.mark.parametrize(("name", "value"), [("gpus", 3), ("changed", [1]), ("layout", []), ("versions", "text"), ("tier", {}), ("import_roots", "text")])
def test_an_attempt_of_another_shape_is_named(made, tmp_path, name, value) -> None:
    path = tmp_path / "provenance.json"
    path.write_text(json.dumps({"schema": "miles.provenance/1", "attempts": [{"epoch": 4, name: value}]}))
    with pytest.raises(UserError, match=rf"provenance.json: attempt 4: {name}: a \w+ expected, "):
        inspect(path, None, False, as_json=False)


@pytest.mark.parametrize("content", ['{"schema": "miles.plan/1", "summary": 3}', '{"schema": "miles.plan/1", "summary": ["a"]}'])
def test_a_plan_of_another_shape_is_named(tmp_path, content) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan\.json: an object with a summary expected, "):
        inspect(tmp_path / "plan.json", None, False, as_json=False)


def test_huge_numbers_stay_in_their_column(made, tmp_path, capsys) -> None:
    shutil.copytree(made["run"], tmp_path / "run", symlinks=True)
    path = RunDir(tmp_path / "run").metrics
    with open(path, "a") as file:
        file.write(f'{{"step": 9, "kind": "rollout", "time": 1.0, "a": 1.5e300, "b": -1e308, "c": {"9" * 500}, "d": 123456789012345}}\n')
    text = page(path, capsys)
    assert max(map(len, text.splitlines())) < 200
    for row in (r"^a +1\.50e300$", r"^b +−1\.00e308$", r"^c +1\.00e500$", r"^d +123456789012345$"):
        assert re.search(row, text, re.MULTILINE), row


@pytest.mark.parametrize("kind", ["shard", "routes", "train"])
def test_a_flipped_byte_of_hdf5s_own_is_damage_and_no_traceback(made, tmp_path, kind, capsys) -> None:
    shutil.copytree(made["run"], tmp_path / "run", symlinks=True)
    path = tmp_path / "run" / made[kind].relative_to(made["run"])
    whole = path.read_bytes()
    refused: list[str] = []
    for at in {600, *range(0, len(whole), max(len(whole) // 100, 1))}:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
        assert inspect(path, None, True, as_json=False) == WRONG
        for rows in (None, "0:2") if kind != "routes" else (None,):
            try:
                inspect(path, rows, False, as_json=False)
            except UserError as error:
                refused.append(str(error))
    assert len(refused) > 5
    assert [line for line in refused if not line.startswith(str(path)) or "\n" in line] == []
