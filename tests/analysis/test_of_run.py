"""The verdict on a run's report: plain numpy's figures, over as much as its bounds allow, and a reason where there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
from made_runs import Made, make_sample, make_train, random_run, write_run

from miles.analysis.of_run import mismatch_of_run
from miles.analysis.tables import word
from miles.cli.report import report
from miles.config.schema import RunConfig

NOT_JUDGED = "rollout against training: not judged: "


def quiet_run(folder: Path, steps: int = 3) -> list[Made]:
    """Small differences, and a run.yaml."""
    random, made = np.random.default_rng(1), []
    for step in range(1, steps + 1):
        for draw in range(6):
            sample = make_sample(random, 10 * step + draw, 0, 5, 60, step)
            made.append(Made(step, sample, make_train(random, sample, 1e-4), 0, -1, 0, 0, step))
    write_run(folder, made)
    (folder / "run.yaml").write_text(json.dumps(RunConfig.model_validate({"name": "quiet", "num_rollout": steps}).model_dump(mode="json")))
    return made


def test_figures_are_those_of_plain_numpy(tmp_path: Path) -> None:
    expected = plain.token_metrics(random_run(tmp_path, seed=6, longest=200))
    found = mismatch_of_run(tmp_path)
    assert found is not None
    assert found.verdict is not None
    names = {"k3, nats": "kl_k3", "mean |d|": "abs_diff", "greatest |d|": "max_abs_diff", "mean ratio": "ratio_mean", "effective sample size": "ess", "same bits": "equal_share"}
    assert [name for name, _ in found.metrics] == list(names)
    for name, shown in found.metrics:
        assert float(shown) == pytest.approx(expected[names[name]], rel=1e-3)
    assert found.causes


def test_a_great_run_is_judged_by_its_newest_steps_and_totals(tmp_path: Path) -> None:
    made = quiet_run(tmp_path)
    newest = [each for each in made if each.step >= 2]
    tokens = sum(len(each.sample.token_id) for each in newest)
    found = mismatch_of_run(tmp_path, whole=10, most=tokens)
    assert found is not None
    assert found.verdict is not None
    assert (found.verdict.word, found.causes) == ("noise", [])
    assert "of 2 steps, from step 2 on, totals alone" in found.facts
    assert dict(found.metrics)["mean |d|"] == word(float(f"{plain.token_metrics(newest)['abs_diff']:.5g}"))
    refused = mismatch_of_run(tmp_path, most=10)
    assert refused is not None
    assert refused.verdict is None
    assert "the newest step alone has 390 tokens, too many for a report" in refused.facts


def test_the_command_says_it_and_the_page_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet_run(tmp_path)
    assert report(tmp_path, False) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1].startswith("rollout against training: noise: k3 is ")
    page = (tmp_path / "report/index.html").read_text()
    assert 'Rollout against training <span class="state good">noise</span>' in page
    assert report(tmp_path, True) == 0
    assert json.loads(capsys.readouterr().out)["mismatch"] == "noise"


def test_damage_is_told_and_the_page_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet_run(tmp_path)
    path = tmp_path / "train/step_000002/node_0000.h5"
    path.write_bytes(path.read_bytes()[:2000])
    assert report(tmp_path, False) == 0
    assert f"{NOT_JUDGED}{path}: an HDF5 file expected" in capsys.readouterr().out
    assert "Not judged: " in (tmp_path / "report/index.html").read_text()


def test_nothing_trained_is_nothing_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet_run(tmp_path)
    shutil.rmtree(tmp_path / "train")
    assert mismatch_of_run(tmp_path) is None
    assert report(tmp_path, False) == 0
    assert "rollout against" not in capsys.readouterr().out
    assert "Rollout against training" not in (tmp_path / "report/index.html").read_text()


def test_without_numba_the_page_says_so(tmp_path: Path) -> None:
    quiet_run(tmp_path)
    code = f"import sys\nsys.modules['numba'] = None\nfrom pathlib import Path\nfrom miles.cli.report import report\nreport(Path({str(tmp_path)!r}), False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = "numba is not installed here: pip install 'miles[analyze]', and make the report again"
    assert NOT_JUDGED + said in done.stdout
    assert said.replace("'", "&#39;") in (tmp_path / "report/index.html").read_text()


def test_torch_is_not_needed(lively: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(lively[0], run)
    code = f"import sys\nfrom pathlib import Path\nfrom miles.cli.report import report\nreport(Path({str(run)!r}), False)\nprint({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "leading cause: routing" in done.stdout
