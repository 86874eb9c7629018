"""Every family that megatron-core implements, in every layout: transformers' logits, and an independent computation's for the MTP head."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import megatron_cases
import run_ranks

CLOSE = 1e-5
DENSE = [name for name, (family, _, _) in megatron_cases.CASES.items() if family in ("llama", "qwen2", "qwen3")]
SPARSE = [name for name in megatron_cases.CASES if name not in DENSE]
EVEN = [name for name in SPARSE if name != "uneven"]
# ranks: what they compute, one process group after another
JOBS = {
    1: [{"layout": {}, "cases": DENSE + SPARSE}],
    2: [
        {"layout": {"tensor": 2}, "cases": DENSE + EVEN}, {"layout": {"tensor": 2, "expert": 2, "expert_tensor": 1}, "cases": EVEN},
        {"layout": {"expert": 2}, "cases": EVEN}, {"layout": {"pipeline": 2}, "cases": DENSE + SPARSE},
    ],
    4: [
        {"layout": {"tensor": 2, "expert": 2, "expert_tensor": 1, "pipeline": 2}, "cases": SPARSE}, {"layout": {"tensor": 2, "pipeline": 2}, "cases": DENSE},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: megatron_cases.make(folder / name, name) for name in megatron_cases.CASES}


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed: make test-faults installs it")
@pytest.mark.parametrize("world", JOBS)
def test_logits_are_those_of_transformers(cases, world, tmp_path):
    results = run_ranks.run(world, "megatron_programs.compare", tmp_path / "ranks", jobs=JOBS[world], cases=cases)
    worst = {}
    for i, job in enumerate(JOBS[world]):
        for name in job["cases"]:
            found = [result[i][name] for result in results if result[i][name]]
            assert len(found) == world // job["layout"].get("pipeline", 1)
            assert all(("mtp" in each) == bool(cases[name]["mtp"]) for each in found)
            for what in found[0]:
                worst[f"{json.dumps(job['layout'])} {name} {what}"] = max(each[what] for each in found)
    print(*(f"{value:.1e} {what}" for what, value in worst.items()), sep="\n")
    assert {what: value for what, value in worst.items() if not value < CLOSE} == {}
