"""routing: loads counted by hand, siblings compared by hand, misses from the train records by hand; and what is no result."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from made_runs import random_run
from planted import plant
from script import script
from shard_rows import rows_of

from miles.analysis.routing import routing
from miles.config.exits import UserError


def balance(counts: list[int]) -> dict[str, Any]:
    mean = sum(counts) / len(counts)
    share = [count / sum(counts) for count in counts if count]
    return {
        "max_over_mean": max(counts) / mean, "min_over_mean": min(counts) / mean, "deviation": np.std(counts) / mean,
        "entropy": -sum(each * np.log(each) for each in share) / np.log(len(counts)), "unused": counts.count(0), "busiest": counts.index(max(counts)),
    }  # fmt: skip


def test_load_is_a_count_of_tokens(lively: Any) -> None:
    folder, _ = lively
    rows, found = rows_of(folder), routing(folder, experts=9)
    for layer in range(found["layers"]):
        counted = Counter(int(expert) for row in rows for expert in row.routes[:, layer].ravel())
        counts = [counted[expert] for expert in range(9)]
        assert found["load"][layer] == counts
        for name, value in balance(counts).items():
            assert found["by_layer"][layer][name] == pytest.approx(value), name
    assert found["tokens"] == sum(len(row.routes) for row in rows)
    for step in found["by_step"]:
        here = [row for row in rows if row.step == step["step"]]
        layers = [balance([int((np.concatenate([row.routes[:, layer].ravel() for row in here]) == expert).sum()) for expert in range(9)]) for layer in range(found["layers"])]
        assert step["tokens"] == sum(len(row.routes) for row in here)
        assert step["worst_max_over_mean"] == pytest.approx(max(each["max_over_mean"] for each in layers))
        assert step["entropy"] == pytest.approx(np.mean([each["entropy"] for each in layers]))


def test_siblings_that_began_with_the_same_weights_are_compared(lively: Any) -> None:
    folder, _ = lively
    groups = defaultdict(list)
    for row in rows_of(folder):
        shard = "0" if row.engine.startswith("http://node-0") else "1"  # the worker that drives an engine seals its sequences
        groups[row.step, shard, row.numbers["draw"], row.runs[0][1]].append(row)
    wrong, compared = np.zeros(2, int), 0
    for members in groups.values():
        first = members[0].routes
        for row in members[1:]:
            for place in range(row.numbers["prompt_length"]):
                compared += 1
                wrong += [set(row.routes[place, layer]) != set(first[place, layer]) for layer in range(2)]
    found = routing(folder)
    assert compared > 50
    assert found["sibling_tokens"] == compared
    assert [row["siblings_differ"] for row in found["by_layer"]] == pytest.approx((wrong / compared).tolist())


def test_misses_are_those_of_the_train_records(lively: Any) -> None:
    folder, planted = lively
    found = routing(folder)["training"]
    masked, layers = defaultdict(list), np.zeros((2, 2))
    rows = {(row.step, row.numbers["draw"], row.numbers["sample"]): row for row in rows_of(folder)}
    for index in range(len(planted.scene.step)):
        row = rows[int(planted.scene.step[index]) + 1, int(planted.scene.draw[index]), int(planted.scene.sample[index])]
        length = len(row.tokens["token_id"])
        other = [sum(set(a) != set(b) for a, b in zip(x, y, strict=True)) for x, y in zip(planted.trained.experts[index, : length - 1], row.routes, strict=True)]
        differ = np.array([[set(a) != set(b) for a, b in zip(x, y, strict=True)] for x, y in zip(planted.trained.experts[index, : length - 1], row.routes, strict=True)])
        layers += [differ[row.tokens["loss_mask"][1:] != 0].sum(0), [row.tokens["loss_mask"][1:].sum()] * 2]
        masked[row.step] += [miss for miss, mask in zip([0, *other], row.tokens["loss_mask"], strict=True) if mask]
    everything = [miss for misses in masked.values() for miss in misses]
    assert found["total"] == pytest.approx({"tokens": len(everything), "differ": np.mean(np.array(everything) > 0), "layers_mean": np.mean(everything)})
    assert {row["layers"]: row["tokens"] for row in found["layers_routed_differently"]} == Counter(everything)
    assert found["by_layer"] == [{"layer": layer, "tokens": tokens, "differ": pytest.approx(differ / tokens)} for layer, (differ, tokens) in enumerate(layers.T.tolist())]
    assert [row["differ"] for row in found["steps"]] == pytest.approx([np.mean(np.array(masked[step]) > 0) for step in (1, 2, 3)])


def test_misses_alone_are_a_result_and_neither_is_none(tmp_path: Path) -> None:
    random_run(tmp_path / "misses", longest=30)
    found = routing(tmp_path / "misses")
    assert "by_layer" not in found
    assert found["training"]["total"]["differ"] > 0.5
    assert found["training"]["by_layer"] == []
    plant(tmp_path / "neither", "clean", 0.0, 1, steps=1, sequences=16, response=40, recorded=set())
    with pytest.raises(UserError, match=r"nothing to analyse: no batch has routes \(rollout.return_routed_experts\), and no train record has route_miss"):
        routing(tmp_path / "neither")


def test_routes_that_retention_took_are_told_apart(tmp_path: Path) -> None:
    plant(tmp_path, "clean", 0.0, 1, steps=1, sequences=16, response=40, recorded={"routes"})
    with pytest.raises(UserError, match="--experts says 3 a layer"):
        routing(tmp_path, experts=3)
    with h5py.File(tmp_path / "batches/step_000001/routes.0.h5", "r+") as file:
        file.attrs["schema"] = "miles.rollout/1"
    with pytest.raises(UserError, match=r"routes\.0\.h5: is a miles\.rollout/1 file; expected miles\.routes/1"):
        routing(tmp_path)
    for path in tmp_path.glob("batches/*/routes.*"):
        path.unlink()
    with pytest.raises(UserError, match="2 route files are named, and gone"):
        routing(tmp_path)


def test_the_tool_tells_and_draws(lively: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = lively
    assert script("routing", folder, "--html", tmp_path / "page.html") == 0
    printed = capsys.readouterr().out
    assert "2 layers, 2 of 8 experts" in printed
    assert "training and rollout, by layer" in printed
    assert "which layers" not in printed
    assert "Load of each expert" in (tmp_path / "page.html").read_text()
