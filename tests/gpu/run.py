"""What needs a GPU, in one go, with a table at the end: `python tests/gpu/run.py OUT`.

On a host with a CUDA GPU, PyTorch and SGLang 0.5.15: the engine contract against SGLang and against the embedded engine on CUDA, then
five GRPO steps with SGLang as the engine beside the trainer on the same GPU. Exit code 1 when something fell short.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TOKEN, PORT = "gpu-suite", 31000
SERVE = [
    "--skip-tokenizer-init",
    "--enable-return-routed-experts",
    "--disable-cuda-graph",
    "--attention-backend",
    "triton",
    "--sampling-backend",
    "pytorch",
    "--moe-runner-backend",
    "triton",
    "--mem-fraction-static",
    "0.3",
    "--context-length",
    "4096",
    "--enable-metrics",
    "--enable-memory-saver",
    "--skip-server-warmup",
]
# Shapes that SGLang's kernels accept.
SHAPE = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
}

rows: list[tuple[str, bool, str]] = []


def note(what: str, good: bool, figure: str) -> None:
    rows.append((what, good, figure))
    print(f"{'ok  ' if good else 'FAIL'} {what}: {figure}", flush=True)


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **more}


def write_models(out: Path) -> None:
    """A tiny random Qwen3-MoE in bf16, and the same with a tokenizer and prompts for training."""
    import torch
    from tiny_models import write_tiny
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from miles.recipes.quickstart import EOS, PAD, make_tokenizer

    questions = [f"Calculate {a} + {b}." for a in range(40) for b in range(40)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(questions), eos_token=EOS, pad_token=PAD)
    for name in ("served", "trained"):
        write_tiny(out / "fp32", seed=0, **SHAPE, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        AutoModelForCausalLM.from_pretrained(out / "fp32", dtype=torch.bfloat16).save_pretrained(out / name)
    tokenizer.save_pretrained(out / "trained")
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text, "answer": "0"}) + "\n" for text in questions))


def contract(out: Path) -> None:
    """The client suite against a running SGLang."""
    url = f"http://127.0.0.1:{PORT}"
    command = [
        sys.executable,
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(out / "served"),
        "--port",
        str(PORT),
        "--api-key",
        TOKEN,
        *SERVE,
    ]
    with (out / "sglang.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
    began = time.monotonic()
    try:
        while not answers(url):
            if server.poll() is not None or time.monotonic() - began > 330:
                note("SGLang serves", False, (out / "sglang.log").read_text()[-1500:])
                return
            time.sleep(1)
        note("SGLang serves", True, f"after {time.monotonic() - began:.0f} s")
        suite("contract, SGLang 0.5.15", out, "sglang", MILES_TEST_SGLANG_URL=url, MILES_TEST_SGLANG_TOKEN=TOKEN)
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=25) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def suite(what: str, out: Path, engine: str, **env: str) -> None:
    """tests/contract for one engine."""
    words: Sequence[str] = [sys.executable, "-m", "pytest", "tests/contract", "-p", "no:cacheprovider", "--tb=short", "-v"]
    done = subprocess.run(words, cwd=ROOT, env=environment(**env), capture_output=True, text=True)
    (out / f"contract_{engine}.log").write_text(done.stdout + done.stderr)
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR", "E   ")):
            print("    " + line[:300], flush=True)
    note(what, done.returncode == 0, done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:])


def train(out: Path) -> None:
    """Five GRPO steps."""
    run_dir = out / "run"
    words = [sys.executable, "-m", "miles.cli", "run", "tests/gpu/grpo_sglang.yaml", "--run-dir", str(run_dir)]
    words += [f"model.hf_checkpoint={out / 'trained'}", f"data.prompt_data={out / 'prompts.jsonl'}"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    print(done.stdout[-1500:], done.stderr[-3000:], flush=True)
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for line in lines:
        print(
            f"    step {line['step']}: reward {line['rollout/raw_reward']:.3f}, loss {line['train/loss']:+.4f}, grad norm {line['train/grad_norm']:.3f}, "
            f"mean |d log-prob| {line['train/train_rollout_logprob_abs_diff']:.5f}, max {line['train/train_rollout_logprob_max_abs_diff']:.4f}, "
            f"train {line['perf/train_time']:.2f} s, sync {line['perf/update_weights_time']:.2f} s",
            flush=True,
        )
    note("five GRPO steps with SGLang", done.returncode == 0 and len(lines) == 5, f"exit code {done.returncode}, {len(lines)} steps")
    if done.returncode:
        for log in sorted(run_dir.glob("attempts/*/logs/*")):
            print(f"== {log.name}\n{log.read_text()[-2500:]}", flush=True)


def main() -> None:
    out = Path(sys.argv[1]).absolute()
    out.mkdir(parents=True, exist_ok=True)
    wanted = sys.argv[2:] or ["sglang", "embedded", "train"]
    print(
        subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.strip()
    )
    write_models(out)
    if "sglang" in wanted:
        contract(out)
    if "embedded" in wanted:
        options = "--device cuda --dtype bfloat16 --no-batch-invariant"
        suite("contract, embedded engine on CUDA", out, "embedded", MILES_TEST_EMBEDDED_OPTIONS=options)
    if "train" in wanted:
        train(out)
    print(
        "\n"
        + "\n".join(f"{'ok  ' if good else 'FAIL'} {what:<40} {re.sub(r'=+', '', figure).strip()[:120]}" for what, good, figure in rows)
    )
    sys.exit(not all(good for _, good, _ in rows))


if __name__ == "__main__":
    main()
