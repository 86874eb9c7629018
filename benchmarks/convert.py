"""Conversion against cp -r of the same folder, both through fsync from a warm source, and its anonymous memory: python -m benchmarks.convert [GB]

The model has DeepSeek-V3's shapes with fewer layers and experts; free disk needed: three times the size.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table import Row, show

PAIRS = 3
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 0, "num_hidden_layers": 1, "num_experts_per_tok": 8, "tie_word_embeddings": False,
    "hidden_act": "silu",
}  # fmt: skip
# Runs one conversion and prints its anonymous memory over that of the loaded libraries, at its highest, and its seconds with all files synced.
CHILD = """
import os, sys, threading, time
from miles.convert.hf_to_torch_dist import hf_to_torch_dist
from miles.convert.units import Rank
def anonymous():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon')) * 1024
base = peak = anonymous(); stop = False
def watch():
    global peak
    while not stop: peak = max(peak, anonymous()); time.sleep(0.005)
thread = threading.Thread(target=watch); thread.start()
began = time.perf_counter(); hf_to_torch_dist(sys.argv[1], sys.argv[2], None, Rank(workers=2)); took = time.perf_counter() - began
stop = True; thread.join(); print(took, peak - base)
"""


def write(folder: Path, gigabytes: float) -> int:
    """A bf16 source of about that size in one file; returns its bytes."""
    from miles.models.maps.find import known
    from miles.models.maps.pieces import pieces

    for experts in range(1, 257):
        config = CONFIG | {"n_routed_experts": experts}
        shapes = {block.name: (block.shape, piece.dtype) for piece in pieces(known(config, "config.json")) for block in piece.blocks}
        total = sum(int(np.prod(shape)) * (4 if dtype else 2) for shape, dtype in shapes.values())
        if total >= gigabytes * 1e9:
            break
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, (shape, dtype) in shapes.items():
        size = int(np.prod(shape)) * (4 if dtype else 2)
        header[name] = {"dtype": "F32" if dtype else "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = np.random.default_rng(0).integers(0, 0x3F00, 1 << 23, dtype=np.uint16).tobytes()  # small numbers, none of them NaN
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while at:
            at -= file.write(noise[: min(at, len(noise))])
    return total


def copy_seconds(source: Path, target: Path) -> float:
    """cp -r, then fsync of each file."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - began


def measure(gigabytes: float) -> list[Row]:
    """Pairs of a copy and a conversion, in turns."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("MILES_BENCH_DIR")) as scratch:
        root = Path(scratch)
        total = write(root / "hf", gigabytes)
        subprocess.run(["cat", root / "hf" / "model.safetensors"], stdout=subprocess.DEVNULL, check=True)
        copies, conversions, memory = [], [], []
        for _ in range(PAIRS):
            copies.append(copy_seconds(root / "hf", root / "copy"))
            shutil.rmtree(root / "copy")
            found = subprocess.run([sys.executable, "-c", CHILD, root / "hf", root / "td"], capture_output=True, text=True, check=True)
            took, peak = found.stdout.split()
            conversions.append(float(took))
            memory.append(int(peak))
            shutil.rmtree(root / "td")
    copy, convert = statistics.median(copies), statistics.median(conversions)
    note = f"{total / 1e9:.1f} GB: cp {copy:.1f} s, conversion {convert:.1f} s, {total / 1e9 / convert:.2f} GB/s"
    high = max(memory)
    return [
        Row("hf_to_torch_dist, speed of cp -r", copy / convert, 0.8, note=note, found={"copies": copies, "conversions": conversions}),
        Row("anonymous memory over 0.5 GB", high / 5e8, 1.0, at_least=False, note=f"{high / 1e6:.0f} MB over the loaded libraries", found={"peaks": memory}),
    ]


if __name__ == "__main__":
    show(measure(float(sys.argv[1]) if len(sys.argv) > 1 else 4.0))
