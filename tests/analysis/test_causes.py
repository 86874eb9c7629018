"""Planted causes come first, and nothing is found where nothing is wrong: a few here, all of them in tests/faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import BF16_NOISE, CAUSES, FP32_NOISE, NO_NOISE, plant

from miles.analysis.analyze import analyze
from miles.analysis.causes import attribute
from miles.analysis.ranks import Alone

SMALL = {"steps": 2, "sequences": 64, "response": 80}
STRONG = {
    "clean": 0.0, "retokenised": 0.02, "shifted": 0.25, "temperature": 0.05, "top_p": 0.1, "bf16_logits": 2.0**-8, "bf16_logprob": 2.0**-8,
    "engine": 4.0, "node": 0.2, "lag": 1.0, "routing": 0.05,
}  # fmt: skip


@pytest.mark.parametrize("cause", STRONG)
def test_a_strong_cause_leads(cause: str, tmp_path: Path) -> None:
    noise = FP32_NOISE if cause.startswith("bf16") else BF16_NOISE
    plant(tmp_path, cause, STRONG[cause], 7, noise=noise, **SMALL)
    found = attribute(analyze(tmp_path, Alone()).evidence)
    assert found[0].name == CAUSES[cause].family, found
    assert found[0].share > (0.5 if cause != "clean" else 0.99)
    assert sum(each.share for each in found) == pytest.approx(1)
    assert [each.name for each in found].count("noise") == 1


def test_equal_bits_have_no_cause(tmp_path: Path) -> None:
    plant(tmp_path, "clean", 0.0, 7, noise=NO_NOISE, steps=1, sequences=16, response=32)
    assert attribute(analyze(tmp_path, Alone()).evidence) == []


def test_top_p_is_seen_without_its_kept_mass_and_is_no_temperature(tmp_path: Path) -> None:
    plant(tmp_path, "top_p", 0.1, 7, recorded=set(), **SMALL)
    found = attribute(analyze(tmp_path, Alone()).evidence)
    assert [each.name for each in found] == ["top-p or top-k", "noise"]
    assert found[0].share > 0.9
