"""compare_runs against json and h5py on runs of the store's writers: means, first differences in bits, settings; and what is no comparison."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from exported import lines_of
from script import script
from shard_rows import rows_of

sys.path.append(str(Path(__file__).resolve().parents[1] / "report"))
from demo_run import demo_run

from miles.analysis.compare_runs import compare, differs, flatten
from miles.config.exits import UserError
from miles.data.importers.jsonl import import_jsonl

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(ROOT / "tools/analyze/compare_runs.py")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A run, one whose trainer differs by noise and whose settings do, and one with the first one's bits."""
    folder = tmp_path_factory.mktemp("compared")
    for name, noise in (("first", 0.0), ("noisy", 1e-3), ("again", 0.0)):
        demo_run(folder / name, rollouts=8, noise=noise, restarts=0)
    path = folder / "noisy/run.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["train"]["optimizer"]["lr"] = 0.5
    path.write_text(yaml.safe_dump(settings))
    return folder / "first", folder / "noisy", folder / "again"


def lines(run: Path, kind: str = "rollout") -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind}


def test_figures_are_those_of_the_metric_lines(runs: tuple[Path, Path, Path]) -> None:
    first, noisy, _ = runs
    found = compare([first, noisy])["metrics"]
    names = {"reward": "rollout/raw_reward", "response_length": "rollout/response_len/mean", "mismatch_abs_diff": "train/train_rollout_logprob_abs_diff", "grad_norm": "train/grad_norm"}
    for ours, theirs in names.items():
        pairs = {step: [lines(run)[step][theirs] for run in (first, noisy)] for step in lines(first)}
        assert found[ours]["steps"] == sorted(pairs)
        assert found[ours]["values"] == list(pairs.values())
        assert found[ours]["mean"] == pytest.approx([sum(column) / len(pairs) for column in zip(*pairs.values(), strict=True)])
        apart = {step: abs(a - b) for step, (a, b) in pairs.items()}
        assert found[ours]["first_difference"] == next((step for step, size in apart.items() if size), None)
        assert found[ours]["greatest_difference"] == max(apart.values()) == apart[found[ours]["greatest_at"]]
    later = sorted(lines(first))[3]
    assert compare([first, noisy], first=later)["metrics"]["reward"]["steps"] == [step for step in sorted(lines(first)) if step >= later]


def test_the_first_difference_is_found_in_bits(runs: tuple[Path, Path, Path]) -> None:
    first, noisy, again = runs
    found = compare([first, noisy])["first_difference"]
    step = next(step for step in sorted(lines(first)) if any(lines(first)[step][name] != lines(noisy)[step][name] for name in lines(first)[step] if not name.startswith(("perf/", "time"))))
    here, there = lines(first)[step], lines(noisy)[step]
    assert (found["metrics"]["step"], found["metrics"]["kind"]) == (step, "rollout")
    assert found["metrics"]["first"] == sorted(name for name in here if here[name] != there.get(name) and not name.startswith("perf/") and name not in ("time", "step"))
    expected: dict[str, int | None] = dict.fromkeys(("tokens", "rollout_logprobs", "rewards"))
    for at in sorted({row.step for row in rows_of(first)}):
        one, other = ({(row.numbers["draw"], row.numbers["sample"]): row for row in rows_of(run) if row.step == at} for run in (first, noisy))
        wrong = {
            "tokens": any(one[key].tokens["token_id"].tobytes() != other[key].tokens["token_id"].tobytes() for key in one),
            "rollout_logprobs": any(one[key].tokens["rollout_logprob"].tobytes() != other[key].tokens["rollout_logprob"].tobytes() for key in one),
            "rewards": any(one[key].numbers["reward"] != other[key].numbers["reward"] for key in one),
        }
        expected |= {name: at for name, is_wrong in wrong.items() if is_wrong and expected[name] is None}
    assert {name: found["batches"]["first"][name] for name in expected} == expected
    assert found["batches"]["first"]["train_logprobs"] == min(row.step for row in rows_of(first))
    same = compare([first, again])
    assert differs(same) == []
    assert same["settings"] == []


def test_settings_and_environment_that_differ_are_named(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    first, noisy, again = runs
    assert [(row["name"], row["values"][1]) for row in compare([first, noisy])["settings"]] == [("train.optimizer.lr", 0.5)]
    shutil.copytree(again, tmp_path / "elsewhere")
    path = tmp_path / "elsewhere/provenance.json"
    provenance = json.loads(path.read_text())
    provenance["attempts"][-1]["versions"]["torch"] = "0.1"
    path.write_text(json.dumps(provenance))
    (row,) = compare([first, tmp_path / "elsewhere"])["environment"]
    assert (row["name"], row["values"][1]) == ("version of torch", "0.1")
    assert flatten({"a": {"b": [1, 2], "c": {}}, "d": None}) == {"a.b": [1, 2], "a.c": {}, "d": None}


def test_three_runs_and_steps_that_one_lacks(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    first, noisy, _ = runs
    shutil.copytree(first, tmp_path / "short")
    path = tmp_path / "short/metrics.jsonl"
    kept = path.read_text().splitlines()[:-1]
    path.write_text("\n".join(kept) + "\n")
    found = compare([first, noisy, tmp_path / "short"])
    assert [run["name"] for run in found["runs"]] == ["first", "noisy", "short"]
    assert len(found["metrics"]["reward"]["mean"]) == 3
    assert differs(compare([first, tmp_path / "short"])) == ["1 steps are in one run alone"]


def test_a_run_without_train_records_differs_in_nothing_of_them(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "rollouts")
    shutil.rmtree(tmp_path / "rollouts/train")
    assert differs(compare([runs[0], tmp_path / "rollouts"])) == []


def test_an_imported_run_is_compared_by_its_batches(lively: Any, tmp_path: Path) -> None:
    (tmp_path / "export.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of(lively[0])))
    import_jsonl([tmp_path / "export.jsonl"], tmp_path / "theirs")
    import_jsonl([tmp_path / "export.jsonl"], tmp_path / "theirs_too")
    found = compare([lively[0], tmp_path / "theirs"])
    assert found["metrics"]["reward"]["greatest_difference"] < 1e-6
    assert found["first_difference"]["batches"]["first"] == {"weights": 1, "draws": None, "tokens": None, "rollout_logprobs": None, "rewards": None, "train_logprobs": None}
    both = compare([tmp_path / "theirs", tmp_path / "theirs_too"])
    assert differs(both) == []
    rows = [row for row in rows_of(lively[0]) if row.step == 2]
    place = both["metrics"]["response_length"]["steps"].index(2)
    assert both["metrics"]["response_length"]["values"][place][0] == pytest.approx(sum(len(row.tokens["token_id"]) - row.numbers["prompt_length"] for row in rows) / len(rows))
    assert all(math.isfinite(value) and value > 0 for row in both["metrics"]["mismatch_k3"]["values"] for value in row)


def test_the_tool_tells_draws_and_fails_for_ci(runs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, noisy, again = map(str, runs)
    told = subprocess.run([*TOOL, first, noisy, "--html", str(tmp_path / "page.html"), "--same"], capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert "FAILED: the runs differ: rollout/raw_reward at rollout step" in told.stderr
    assert "train.optimizer.lr" in told.stdout
    assert "Mismatch, mean |d|" in (tmp_path / "page.html").read_text()
    assert script("compare_runs", first, again, "--same", "--json") == 0
    assert json.loads(capsys.readouterr().out)["first_difference"]["metrics"]["step"] is None


def test_what_can_not_be_compared(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    first, noisy, _ = runs
    (tmp_path / "empty").mkdir()
    for given, said in (
        ([first], "1 run given: two are compared"), ([first, first], "a run is given twice"), ([first, tmp_path / "none"], "no such folder"),
        ([first, tmp_path / "empty"], "holds neither metrics of rollout steps nor batches"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            compare(given)
    with pytest.raises(UserError, match="have no step with a figure in common"):
        compare([first, noisy], first=10_000)
