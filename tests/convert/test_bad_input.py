"""Bad sources by name, interruption and resume; nothing half-written looks whole."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from convert_models import write_model
from safetensors.torch import load_file, save_file

from miles.config.exits import UserError
from miles.convert.hf_to_torch_dist import hf_to_torch_dist
from miles.convert.look import inspect
from miles.convert.options import Options
from miles.convert.torch_dist_source import TorchDistSource
from miles.convert.verify import verify


@pytest.fixture
def source(tmp_path):
    return write_model(tmp_path / "hf", "qwen3")


def change(folder, edit):
    """Rewrite the tensors."""
    given = load_file(folder / "model.safetensors")
    edit(given)
    save_file(given, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def headless(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def shard_missing(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "other.safetensors"}}))


def index_lies(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.ghost.weight": "model.safetensors"}}))


def index_leaves(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}))


def tensor_missing(folder):
    change(folder, lambda given: given.pop("model.layers.1.mlp.up_proj.weight"))


def wrong_shape(folder):
    change(folder, lambda given: given.update({"model.norm.weight": torch.zeros(63)}))


def unknown_tensor(folder):
    change(folder, lambda given: given.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(3)}))


def no_json(folder):
    (folder / "config.json").write_text("{")


def other_blocks(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (other_blocks, r"weight_block_size \[64, 64\]"), (truncated, "truncated"), (headless, "truncated or no safetensors"), (shard_missing, r"missing: other\.safetensors"), (index_lies, "names model.ghost"),
        (index_leaves, "not beside it"), (tensor_missing, r"layers\.1\.mlp\.up_proj\.weight is missing"), (wrong_shape, r"has the shape \[63\]"),
        (unknown_tensor, "is no tensor of a 'qwen3' model"), (no_json, r"config\.json: not JSON"),
    ],
)  # fmt: skip
def test_a_bad_source_is_refused_by_name_before_anything_is_written(tmp_path, source, damage, said):
    damage(source)
    with pytest.raises(UserError, match=said) as caught:
        hf_to_torch_dist(source, tmp_path / "td")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "td").exists()


def test_nan_is_said_and_refused_when_strict(tmp_path, source):
    change(source, lambda given: given["model.norm.weight"].__setitem__(3, float("nan")))
    with pytest.raises(UserError, match=r"NaN in model\.norm\.weight"):
        hf_to_torch_dist(source, tmp_path / "strict", Options(strict=True))
    with pytest.raises(UserError, match="neither a Hugging Face folder"):
        inspect(tmp_path / "strict")
    assert "NaN in decoder.final_layernorm.weight" in hf_to_torch_dist(source, tmp_path / "td").warnings[0]


def test_a_destination_with_something_else_is_left_alone(tmp_path, source):
    (tmp_path / "td" / "release").mkdir(parents=True)
    (tmp_path / "td" / "release" / "mine").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        hf_to_torch_dist(source, tmp_path / "td")
    assert [path.name for path in (tmp_path / "td" / "release").iterdir()] == ["mine"]


def test_a_truncated_checkpoint_is_refused(tmp_path, source):
    hf_to_torch_dist(source, tmp_path / "td")
    (file,) = (tmp_path / "td" / "release").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match="truncated"):
        TorchDistSource(tmp_path / "td")


def test_killed_in_the_middle_it_resumes_to_equal_bits_with_other_workers(tmp_path, source):
    script = (
        "import sys, time\n"
        "import miles.convert.conversion as plan\n"
        "import miles.convert.hf_to_torch_dist as m\n"
        "from miles.convert.units import Rank, Units\n"
        "plan.CHUNK_BYTES, plan.FILE_BYTES = 2000, 30_000\n"
        "plain = Units._write\n"
        "def slow(self, i, buffer, progress):\n"
        "    plain(self, i, buffer, progress); print('wrote', flush=True); time.sleep(0.05)\n"
        "Units._write = slow\n"
        "print('kept', m.hf_to_torch_dist(sys.argv[1], sys.argv[2], None, Rank(workers=int(sys.argv[3]))).resumed_files)\n"
    )
    target = tmp_path / "td"
    command = [sys.executable, "-c", script, str(source), str(target)]
    process = subprocess.Popen([*command, "1"], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        assert process.stdout.readline() == "wrote\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (target / "latest_checkpointed_iteration.txt").exists()
    assert not (target / "release" / ".metadata").exists()
    kept = sorted((target / "release" / ".convert").glob("*.distcp.json"))
    damaged = target / "release" / json.loads(kept[0].read_text())["file"]
    damaged.write_bytes(b"\0" * damaged.stat().st_size)  # of the right size, and yet not what was written
    last = subprocess.run([*command, "3"], capture_output=True, text=True, check=True)
    assert last.stdout.splitlines()[-1] == f"kept {len(kept) - 1}"
    assert verify(source, target).equal
    assert not (target / "release" / ".convert").exists()
