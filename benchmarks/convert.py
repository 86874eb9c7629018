"""Conversion against cp -r of the same folder, both through fsync from a warm source, and the anonymous memory of conversion and quantisation.

The models have DeepSeek-V3's shapes with one layer and fewer experts. MILES_BENCH_DIR: a folder on the disk to measure, with 26 GB free.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table import Row

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 0, "num_hidden_layers": 1, "num_experts_per_tok": 8, "tie_word_embeddings": False,
    "hidden_act": "silu",
}  # fmt: skip
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
# Of the real model's numbers 0.3 % are in the embedding and the head, which are not FP8; with all rows they would be most of so small a model.
FEW_ROWS = {"vocab_size": 4096}
MEMORY = 5e8
ROOM = 26e9  # bytes on the disk: the largest source and what it is converted to
PAIRS, FEWEST, SECONDS = 5, 3, 200.0  # of one comparison: so many pairs, fewer on a disk so slow that they take longer
WARM, TRIES = 0.05, 3  # a source of which more came from the disk was not warm: measured again
# Runs one conversion; prints its seconds with all files synced, and its anonymous memory at its highest over that of the loaded libraries.
CHILD = """
import sys, threading, time
from miles.convert.{module} import *
from miles.convert.units import Rank
def anonymous():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon')) * 1024
base = peak = anonymous(); stop = False
def watch():
    global peak
    while not stop: peak = max(peak, anonymous()); time.sleep(0.005)
thread = threading.Thread(target=watch); thread.start()
began = time.perf_counter(); {call}, me=Rank(workers=4)); took = time.perf_counter() - began
stop = True; thread.join(); print(took, peak - base)
"""


CALLS = {
    "hf_to_torch_dist": "hf_to_torch_dist(sys.argv[1], sys.argv[2]", "torch_dist_to_hf": "torch_dist_to_hf(sys.argv[1], sys.argv[2]",
    **{f"quantize {method}": f"quantize(sys.argv[1], sys.argv[2], Target('{method}')" for method in ("fp8", "int4", "bf16")},
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """seconds of a conversion, anonymous bytes over the libraries, bytes that came from the disk because they were not cached."""

    seconds: float
    memory: int
    fetched: int = 0


def write(folder: Path, gigabytes: float, more: dict[str, Any]) -> int:
    """A source of about that size (at least 0.5 GB beside its embedding) in files of a GB or so; returns its bytes."""
    from miles.convert.safetensors_file import DTYPES, header, size_of
    from miles.models.maps.find import known
    from miles.models.maps.pieces import pieces

    for experts in range(1, 257):
        config = CONFIG | more | {"n_routed_experts": experts}
        tensors = {}
        for piece in pieces(known(config, "config.json")):
            for block in piece.blocks:
                codes = "quantization_config" in more and len(block.shape) == 2 and not any(word in block.name for word in ("embed", "lm_head", ".gate."))
                tensors[block.name] = (DTYPES["F8_E4M3" if codes else "F32" if piece.dtype else "BF16"], block.shape)
                if codes:
                    tensors[f"{block.name}_scale_inv"] = (DTYPES["F32"], tuple(-(-size // 128) for size in block.shape))
        total = sum(size_of(tensor) for tensor in tensors.values())
        if total >= gigabytes * 1e9:
            break
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    small = rng.integers(0, 0x3F00, 1 << 23, dtype=np.uint16).view(np.uint8)  # small numbers as bf16 and as fp32, none of them NaN
    codes = rng.integers(0, 0x7F, 1 << 24, dtype=np.uint8)
    files: list[dict[str, Any]] = [{}]
    for name, tensor in tensors.items():
        if files[-1] and sum(size_of(held) for held in files[-1].values()) + size_of(tensor) > 1.5e9:
            files.append({})
        files[-1][name] = tensor
    for i, held in enumerate(files):
        with (folder / f"model-{i:05d}.safetensors").open("wb") as file:
            file.write(header(held))
            for tensor in held.values():
                noise, left = codes if tensor[0].itemsize == 1 else small, size_of(tensor)
                while left:
                    left -= file.write(noise[: min(left, len(noise))].data)
    return total


def fetched() -> int:
    """Bytes that processes which have ended read from a disk."""
    return 512 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock


def copy(source: Path, target: Path) -> Measured:
    """cp -r, then fsync of each file."""
    before, began = fetched(), time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return Measured(time.perf_counter() - began, 0, fetched() - before)


def convert(name: str, source: Path, target: Path) -> Measured:
    """One conversion in a process of its own."""
    before, code = fetched(), CHILD.format(module=name.split()[0], call=CALLS[name])
    found = subprocess.run([sys.executable, "-c", code, source, target], capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"{name} failed: {found.stderr.strip()[-2000:]}")
    seconds, memory = found.stdout.split()
    return Measured(float(seconds), int(memory), fetched() - before)


def warm(folder: Path) -> None:
    """Read all of it into the page cache, with nothing left to write."""
    subprocess.run(["sync"], check=True)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)


def from_warm(step: Callable[[], Measured], source: Path, target: Path, say: Callable[[str], None]) -> Measured:
    """A measurement with nothing else to write, and with the source in the page cache to its end. Of TRIES without that, the last."""
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    for left in reversed(range(TRIES)):
        shutil.rmtree(target, ignore_errors=True)
        warm(source)
        found = step()
        if found.fetched <= WARM * size:
            break
        say(f"{found.fetched / 1e9:.1f} of {size / 1e9:.1f} GB came from the disk: the source was pushed out of the cache{', again' if left else ''}")
    return found


def compare(root: Path, gigabytes: float, more: dict[str, Any], pairs: int, label: str, goal: float, back: bool, say: Callable[[str], None]) -> tuple[list[Row], list[int]]:
    """Copies and conversions of one source in turns, the copy first and last by turns; the rows, and the conversions' memory."""
    source, checkpoint, began = root / "hf", root / "td", time.monotonic()
    total = write(source, gigabytes, more)
    found: dict[str, list[Measured]] = {"cp": [], "hf_to_torch_dist": [], "torch_dist_to_hf": []}
    for i in range(pairs):
        steps = ["hf_to_torch_dist", *(["torch_dist_to_hf"] if back else [])]
        for name in [*steps, "cp"] if i % 2 else ["cp", *steps]:
            given, target = (checkpoint, root / "back") if name == "torch_dist_to_hf" else (source, checkpoint if name != "cp" else root / "copy")
            step = functools.partial(copy, given, target) if name == "cp" else functools.partial(convert, name, given, target)
            found[name].append(from_warm(step, given, target, say))
            if name != "hf_to_torch_dist":
                shutil.rmtree(target)
        shutil.rmtree(checkpoint)
        say(f"{label}, pair {i + 1} of {pairs}: " + ", ".join(f"{name} {times[-1].seconds:.1f} s" for name, times in found.items() if times))
        if i + 1 >= FEWEST and time.monotonic() - began > SECONDS:
            break
    shutil.rmtree(source)
    plain = statistics.median(each.seconds for each in found.pop("cp"))
    rows = []
    for name, times in found.items():
        if times:
            took, cold = statistics.median(each.seconds for each in times), sum(each.fetched for each in times) / len(times)
            note = f"{total / 1e9:.1f} GB: cp -r {plain:.1f} s, conversion {took:.1f} s, {len(times)} pairs" + (f", {cold / 1e9:.1f} GB from the disk" if cold > WARM * total else "")
            rows.append(Row(f"{name}, {label}: speed of cp -r", plain / took, goal, note=note, found={"seconds": [each.seconds for each in times]}))
    return rows, [each.memory for times in found.values() for each in times]


def quantised(root: Path, gigabytes: float, say: Callable[[str], None]) -> dict[str, int]:
    """Anonymous memory of each way of quantisation, in bytes."""
    peaks = {}
    for more, methods in ((FEW_ROWS, ("fp8", "int4")), (FP8 | FEW_ROWS, ("bf16",))):
        write(root / "hf", gigabytes, more)
        for method in methods:
            done = convert(f"quantize {method}", root / "hf", root / "small")
            peaks[method] = done.memory
            say(f"quantize to {method}, {gigabytes:.1f} GB: {done.seconds:.1f} s")
            shutil.rmtree(root / "small")
        shutil.rmtree(root / "hf")
    return peaks


def memory_row(name: str, peaks: dict[str, int]) -> Row:
    note = ", ".join(f"{peak / 1e6:.0f} MB for {what}" for what, peak in peaks.items())
    return Row(f"{name}: anonymous memory over 0.5 GB", max(peaks.values()) / MEMORY, 1.0, at_least=False, note=note, found={"peaks": peaks})


def measure(say: Callable[[str], None], quick: bool = False) -> list[Row]:
    """Speed of both ways in bf16, speed from FP8, memory for 4 and for 12 GB."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("MILES_BENCH_DIR")) as scratch:
        root, pairs, large = Path(scratch), 1 if quick else PAIRS, 0.6 if quick else 4.0
        free = shutil.disk_usage(root).free
        if not quick and free < ROOM:
            raise SystemExit(f"{root}: {free / 1e9:.0f} GB free, {ROOM / 1e9:.0f} are needed; name another folder in MILES_BENCH_DIR")
        rows, memory = compare(root, large, FEW_ROWS if quick else {}, pairs, "bf16", 0.8, True, say)
        rows += compare(root, 0.4 if quick else 4.0, FP8 | FEW_ROWS, pairs, "FP8 to bf16", 0.5, False, say)[0]
        small = quantised(root, 0.4 if quick else 2.0, say)
        peaks = {f"{large:g} GB": max(memory)}
        if not quick:
            write(root / "hf", 12.0, {})
            peaks["12 GB"] = convert("hf_to_torch_dist", root / "hf", root / "td").memory
    return [*rows, memory_row("conversion", peaks), memory_row("quantisation", small)]
