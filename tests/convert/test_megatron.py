"""megatron-core itself: it loads what we write and computes transformers' logits; what it writes converts back with equal bits."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny

from miles.convert.hf_to_torch_dist import hf_to_torch_dist
from miles.convert.torch_dist_source import TorchDistSource
from miles.convert.torch_dist_to_hf import torch_dist_to_hf
from miles.convert.verify import verify

PROGRAM = Path(__file__).parent / "megatron_models.py"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed: make test installs it")


@pytest.mark.parametrize(("family", "more"), [("qwen2", {"tie_word_embeddings": True}), ("qwen3_moe", {}), ("qwen2_moe", {"shared_expert_intermediate_size": 48})])
def test_megatron_loads_ours_and_we_read_megatrons(tmp_path, family, more):
    from transformers import AutoModelForCausalLM

    hf = write_tiny(tmp_path / "hf", family, **more)
    hf_to_torch_dist(hf, tmp_path / "td")
    command = [sys.executable, PROGRAM, hf, tmp_path / "td" / "release", tmp_path / "megatron", tmp_path / "logits"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "done" in found.stdout, found.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.arange(3, 35)[None]).logits
    assert (torch.load(tmp_path / "logits") - wanted).abs().max() < 1e-5
    ours, theirs = TorchDistSource(tmp_path / "td"), TorchDistSource(tmp_path / "megatron")
    assert ours.shapes == theirs.shapes
    assert set(theirs.objects) <= set(ours.objects)
    torch_dist_to_hf(tmp_path / "megatron", tmp_path / "back", hf)
    assert verify(hf, tmp_path / "back").equal
