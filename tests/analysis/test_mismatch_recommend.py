"""The recommended setting: when there is one, with which bounds, and that a recipe takes it."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plain
import pytest
from made_runs import Made, make_sample, make_train, random_run, write_run

from miles.analysis import measure
from miles.analysis.analyze import analyze
from miles.analysis.compare import differences, verdict
from miles.analysis.ranks import Alone
from miles.analysis.recommend import recommend
from miles.analysis.verdict import judge
from miles.config.compose import load_config
from miles.config.exits import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools/analyze/logprob_mismatch.py"


def plain_run(folder: Path, spread: float, shift: float = 0.0, routed: bool = False, seed: int = 0) -> list[Made]:
    """Sequences whose tokens are all off by independent noise."""
    random = np.random.default_rng(seed)
    made = []
    for draw in range(12):
        sample = make_sample(random, draw, 0, 5, 800, 1)
        sample.loss_mask[:5] = 0
        train = make_train(random, sample, 0.0)
        off = random.normal(0, spread, 805) - spread**2 / 2 + shift  # so that the mean ratio is 1 but for the shift
        train["train_logprob"] = (sample.rollout_logprob + off).astype(np.float32)
        train["route_miss"][:] = routed
        made.append(Made(1, sample, train, 0, -1, 0, 0, 1))
    write_run(folder, made)
    return made


def recommended(folder: Path):
    state = analyze(folder, Alone())
    tokens = measure.token_metrics(state)
    return recommend(state, tokens, judge(tokens, measure.standard_errors(state))), tokens


def test_no_setting_where_none_is_of_use(tmp_path):
    for name, spread, shift, words in (("bitwise", 0, 0, "same bits"), ("little", 0.003, 0, "below 0.0001"), ("broken", 0.1, 0.3, "no correction mends")):
        plain_run(tmp_path / name, spread, shift)
        found, _ = recommended(tmp_path / name)
        assert found.settings is None
        assert words in found.reason


@pytest.mark.parametrize(("spread", "routed", "expected"), [(0.03, False, (0.0, 1.2)), (0.1, False, (0.0, 1.5)), (0.135, False, (0.0, 2.0)), (0.135, True, (0.0, 1.5)), (0.19, False, (0.5, 1.5))])
def test_bounds_come_from_the_data_within_what_is_customary(tmp_path, spread, routed, expected):
    made = plain_run(tmp_path, spread, routed=routed)
    found, tokens = recommended(tmp_path)
    assert found.settings == {"use_tis": True, "tis_clip": expected[1], "tis_clip_low": expected[0]}, tokens["kl_k3"]
    ratio = np.exp(np.concatenate([plain.tokens_of(each)["d"] for each in made]))
    assert found.outcome["clipped"] == ((ratio > expected[1]) | (ratio < expected[0])).mean()
    assert ("replaying routes" in found.reason) == routed


@pytest.fixture
def run_tool(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """The script in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return call


def test_a_recipe_takes_the_file_and_it_is_never_written_over(tmp_path, run_tool):
    plain_run(tmp_path / "run", 0.1)
    target = tmp_path / "correction.yaml"
    code, out, err = run_tool(tmp_path / "run", "--recommend", target)
    assert code == 0, err
    assert f"setting: {target}" in out
    assert out.splitlines()[0].startswith("noise: k3 is 0.0"), "the verdict comes first"
    assert len(out.splitlines()) < 75, "two screens at most"
    before, after = load_config(["recipes/tiny"]), load_config(["recipes/tiny", target])
    assert (before.algorithm.use_tis, after.algorithm.use_tis, after.algorithm.tis_clip) == (False, True, 1.5)
    assert after.model_copy(update={"algorithm": before.algorithm}) == before, "nothing else is set"
    comment = target.read_text()
    assert "# Why: k3 is 0.0" in comment
    code, _, err = run_tool(tmp_path / "run", "--recommend", target)
    assert code == 78
    assert "is there already" in err
    assert target.read_text() == comment
    plain_run(tmp_path / "equal", 0)
    code, out, err = run_tool(tmp_path / "equal", "--recommend", tmp_path / "none.yaml", "--json")
    assert code == 0
    assert "is not written: nothing is recommended: every token has the same bits" in err
    assert json.loads(out)["recommendation"]["settings"] is None
    assert not (tmp_path / "none.yaml").exists()


def test_comparison_by_numbers(tmp_path):
    one, two = random_run(tmp_path / "one", seed=4, noise=0.05), random_run(tmp_path / "two", seed=4, noise=0.01)
    states = [analyze(tmp_path / name, Alone()) for name in ("one", "two")]
    tokens = [measure.token_metrics(state) for state in states]
    rows = {row["metric"]: row for row in differences(states[0], tokens[0], states[1], tokens[1])}
    wanted = [plain.token_metrics(made) for made in (one, two)]
    for name in ("mean_diff", "abs_diff", "kl_k3", "ratio_mean", "ess", "slope"):
        assert rows[name]["value"] == pytest.approx(wanted[0][name], rel=1e-5, abs=1e-7)
        assert rows[name]["difference"] == pytest.approx(wanted[0][name] - wanted[1][name], rel=1e-4, abs=1e-7)
    assert (rows["abs_diff"]["beyond_noise"], rows["kl_k3"]["beyond_noise"], rows["slope"]["beyond_noise"]) == (True, True, None)
    low, high = rows["abs_diff"]["interval"]
    assert low < rows["abs_diff"]["difference"] < high
    # The same prompts with the same draws: a paired bootstrap by sequence, which is narrower than either run's own interval.
    parts = [[plain.tokens_of(each)["d"] for each in made] for made in (one, two)]
    random, found = np.random.default_rng(0), []
    for _ in range(1000):
        times = random.poisson(1.0, len(parts[0]))
        found.append([np.abs(np.concatenate([d for d, count in zip(run, times, strict=True) for _ in range(count)])).mean() for run in parts])
    spread = np.quantile(np.subtract(*np.transpose(found)), (0.025, 0.975))
    assert high - low == pytest.approx(spread[1] - spread[0], rel=0.4)
    assert verdict(list(rows.values()))[0] == "further off"
    itself = differences(states[0], tokens[0], states[0], tokens[0])
    assert all(row["difference"] == 0 and not row["beyond_noise"] for row in itself)
    assert verdict(itself)[0] == "alike"
    with pytest.raises(UserError, match="no metric in common"):
        differences(states[0], tokens[0], states[1], {"tokens": 0, "kl_k3": None})


def test_comparison_by_the_tool(tmp_path, run_tool):
    plain_run(tmp_path / "near", 0.02)
    plain_run(tmp_path / "far", 0.1)
    code, out, err = run_tool(tmp_path / "far", "--against", tmp_path / "near", "--json", "--above", "difference.kl_k3=1e-3", "--html", tmp_path / "page.html")
    assert code == 1, err
    found = json.loads(out)
    assert (found["schema"], found["comparison"]["word"], found["run"]["verdict"], found["against"]["verdict"]) == ("miles.mismatch_comparison/1", "further off", "noise", "noise")
    assert [failure.split()[0] for failure in found["failures"]] == ["difference.kl_k3"]
    assert "<h1>" in (tmp_path / "page.html").read_text()
    code, out, _ = run_tool(tmp_path / "near", "--against", tmp_path / "far", "--above", "difference.kl_k3=1e-3")
    assert (code, out.split(":")[0]) == (0, "closer")
    (tmp_path / "empty/batches").mkdir(parents=True)
    for arguments, words in (
        ((tmp_path / "near", "--against", tmp_path / "empty"), "nothing to compare"),
        ((tmp_path / "near", "--against", tmp_path / "far", "--core"), "leave out --core"),
    ):  # fmt: skip
        code, out, err = run_tool(*arguments)
        assert (code, out) == (78, "")
        assert words in err
        assert err.count("\n") == 1
