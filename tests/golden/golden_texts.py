"""The golden texts: `python tests/golden/golden_texts.py` (make golden) writes them again, and tests compare. Look at the difference before it is committed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from miles.config.compose import configs_dir, load_config
from miles.config.placement import node_groups
from miles.config.schema import RunConfig
from miles.data.store.run_dir import RunDir
from miles.plan.model import facts
from miles.slurm.options import arguments, srun_options
from miles.slurm.submission import by_hand, prepare

HERE = Path(__file__).resolve().parent
RUNS = Path("/shared/runs")
PYTHON = "cluster.slurm.python=/shared/miles/bin/python"
RECIPES = [f"{model}_{place}" for model in ("qwen3_30b_a3b", "deepseek_v3") for place in ("h200_colocate", "h200_het", "gb300_colocate", "gb300_het")]
TEMPLATES = configs_dir().parent / "sbatch"
NAMES = ("colocated", "split", "heterogeneous")
BY_HAND = {"analyze": ["runs/theirs", "--core"], "convert": ["models/theirs", "ckpt/theirs", "--strict"]}  # templates without a YAML file, and words to submit one with
CASES = sorted(path.stem for path in (HERE / "cases").glob("*.yaml"))


def text(config: RunConfig, run: RunDir) -> str:
    """The commands that submit a run by hand, what each group's srun is told, and every script."""
    submissions = prepare(config, run)
    parts = [line + "\n" for line in by_hand(run, submissions)]
    mounts = (f"{run.path}:{run.path}",)
    options = {group.name: arguments(srun_options(group, config.cluster.device, mounts)) for group in node_groups(config)}
    steps = [f"\n--- srun on {name}\n{shlex.join(words)}\n" for name, words in options.items()]
    return "".join(parts) + "".join(steps) + "".join(f"\n--- {name}\n{script}" for name, script in {each.file: each.script for each in submissions}.items())


def submission(case: str) -> str:
    """What is submitted for a case."""
    return text(load_config([HERE / "cases" / f"{case}.yaml"]), RunDir(RUNS / case))


def recipe_submission(recipe: str) -> str:
    """What is submitted for a recipe."""
    return text(load_config([f"recipes/{recipe}"], [PYTHON]), RunDir(RUNS / recipe))


def recipe_plan(recipe: str, folder: Path) -> str:
    """`miles-submit plan` of a recipe on a machine without Slurm, where its model and prompts are as far as their heads go."""
    config = load_config([f"recipes/{recipe}"])
    known = facts(config.model)
    assert known is not None
    assert config.model.hf_checkpoint is not None
    assert config.data.prompt_data is not None
    model, prompts = folder / config.model.hf_checkpoint, folder / config.data.prompt_data
    model.mkdir(parents=True, exist_ok=True)
    prompts.parent.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(hugging_face(known.shape.model_dump())))
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    prompts.write_text('{"input": "1+1", "label": "2"}\n')
    command = [sys.executable, "-m", "miles.cli", "plan", f"recipes/{recipe}", PYTHON, "--run-dir", str(RUNS / recipe)]
    environment = {"PATH": "/nowhere", "PYTHONPATH": os.pathsep.join([str(configs_dir().parent), os.environ.get("PYTHONPATH", "")]), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return f"$ {shlex.join(['miles-submit', *command[3:5]])}  # exit code {done.returncode}\n" + done.stdout.replace(str(folder), "/shared")


def hugging_face(shape: dict[str, object]) -> dict[str, object]:
    """A config.json of these dimensions."""
    names = {
        "family": "model_type", "layers": "num_hidden_layers", "hidden": "hidden_size", "ffn": "intermediate_size", "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "vocab": "vocab_size", "tied": "tie_word_embeddings", "experts": "num_experts",
        "top_k": "num_experts_per_tok", "expert_ffn": "moe_intermediate_size", "dense_layers": "first_k_dense_replace", "q_lora": "q_lora_rank",
        "kv_lora": "kv_lora_rank", "qk_nope": "qk_nope_head_dim", "qk_rope": "qk_rope_head_dim", "v_head": "v_head_dim",
    }  # fmt: skip
    return {**{theirs: shape[ours] for ours, theirs in names.items()}, "n_shared_experts": 1 if shape["shared_ffn"] else 0}


def template(name: str) -> str:
    """A batch script of sbatch/, whose paths are relative to the folder that it is submitted from."""
    (only,) = prepare(load_config([TEMPLATES / f"{name}.yaml"]), RunDir(Path("runs") / name))
    return only.script


def by_hand_template(name: str, folder: Path) -> str:
    """What a template without a YAML file asks of sbatch, and what it tells srun, which stands in here and prints its words."""
    (folder / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "srun").chmod(0o755)
    script = TEMPLATES / f"{name}.sbatch"
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "16"}
    done = subprocess.run(["bash", script, *BY_HAND[name]], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    asked = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    return "\n".join([*asked, "", shlex.join(["srun", *done.stdout.splitlines()])]) + "\n"


def everything(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, text) of every golden text."""
    for case in CASES:
        yield HERE / "submissions" / f"{case}.txt", submission(case)
    for name in NAMES:
        yield TEMPLATES / f"{name}.sbatch", template(name)
    for name in BY_HAND:
        yield HERE / "templates" / f"{name}.txt", by_hand_template(name, folder)
    for recipe in RECIPES:
        yield HERE / "recipes" / f"{recipe}.sbatch.txt", recipe_submission(recipe)
        yield HERE / "recipes" / f"{recipe}.plan.txt", recipe_plan(recipe, folder)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for path, content in everything(Path(temporary).resolve()):
            path.write_text(content)
