"""Bad configuration: one line that names the fault, the place and the mend, as a ConfigError."""

from pathlib import Path

import pytest

from miles.config.compose import load_config
from miles.config.exits import ConfigError, UserError
from miles.config.options import parse_flags

FILES = [  # text of recipe.yaml, and parts of the line
    ("train:\n  optimizr: {lr: 1}\n", ["recipe.yaml:2: train.optimizr.lr: unknown key; did you mean train.optimizer.lr?"]),
    ("train:\n  paralel: {tensor: 1, expert: 1}\n", ["recipe.yaml:2: train.paralel: unknown key; did you mean train.parallel?"]),
    ("train:\n  optimizer:\n    lrr: 1\n", ["recipe.yaml:3: train.optimizer.lrr: unknown key; did you mean train.optimizer.lr?"]),
    ("rollout_batch_size: 8\n", ["recipe.yaml:1: rollout_batch_size: unknown key; did you mean rollout.batch_size?"]),
    ("lr: 1.0e-4\n", ["recipe.yaml:1: lr: unknown key; did you mean train.optimizer.lr?"]),
    ("xyzzy: 1\n", ["recipe.yaml:1: xyzzy: unknown key; the top level has name, seed"]),
    ("seed: many\n", ['recipe.yaml:1: seed: expected a whole number, got "many"']),
    ("seed: 1.5\n", ["recipe.yaml:1: seed: expected a whole number, got 1.5"]),
    ("seed: true\n", ["recipe.yaml:1: seed: expected a whole number, got true"]),
    ("name: 5\n", ["recipe.yaml:1: name: expected a text, got 5"]),
    ("train:\n  optimizer: {lr: fast}\n", ['recipe.yaml:2: train.optimizer.lr: expected a number, got "fast"']),
    ("train: {optimizer: {lr: .nan}}\n", ["train.optimizer.lr: expected a finite number, got NaN"]),
    ("train: {optimizer: {lr: -1}}\n", ["train.optimizer.lr: expected at least 0, got -1"]),
    ("train: 3\n", ["recipe.yaml:1: train: expected keys and values, got 3"]),
    ("data: {shuffle: maybe}\n", ['data.shuffle: expected true or false, got "maybe"']),
    ("rollout: {sampling: {stop: end}}\n", ['rollout.sampling.stop: expected a list, got "end"']),
    ("rollout: {sampling: {top_p: 1.5}}\n", ["rollout.sampling.top_p: expected at most 1, got 1.5"]),
    ("rollout: {sampling: {top_k: 0}}\n", ["rollout.sampling.top_k: 0 keeps no token; -1 keeps all"]),
    ("algorithm: {eps_clip_c: 1}\n", ["algorithm.eps_clip_c: expected more than 1, got 1"]),
    ("algorithm: {kl_loss_type: low_var}\n", ["expected one of k1, k2, k3, low_var_kl", 'got "low_var"; did you mean low_var_kl?']),
    ("cluster: {device: gpu}\n", ['cluster.device: expected one of cpu, cuda, got "gpu"']),
    ("debug: {rollout_only: true, train_only: runs/a}\n", ["recipe.yaml:1: debug.train_only: debug.rollout_only is given too; keep one of them"]),
    ("debug: {train_only: runs/a, rescore: runs/a}\n", ["debug.rescore: debug.train_only is given too; keep one of them"]),
    ("name: a\aa\n", [": not YAML", "special characters are not allowed"]),
    ("name: a\0a\n", [": not YAML", "special characters are not allowed"]),
    ("debug: {rescore: runs/a, rescore_steps: [2, -1]}\n", ["debug.rescore_steps: -1 is no step; steps are numbered from 1"]),
    ("debug: {rescore_steps: [1]}\n", ["debug.rescore_steps: nothing is scored without debug.rescore"]),
    ("debug: {reassign: true}\n", ["debug.reassign: only recorded batches are divided anew; set debug.train_only"]),
    ("debug: {rescore: runs/a, stop_after: 3}\n", ["debug.stop_after: debug.rescore trains no step", "choose steps by debug.rescore_steps"]),
    ("debug: {rollout_only: true}\nprofile: {steps: [1, 2]}\n", ["recipe.yaml:2: profile.steps: debug.rollout_only trains no step that could be traced"]),
    ("profile: {steps: [3]}\n", ["profile.steps: [3] is not a first and a last step; write [first, last], such as [3, 5]"]),
    ("profile: {steps: [3, 2]}\n", ["profile.steps: [3, 2] is not a first and a last step"]),
    ("seed: 1\nname: a\nseed: 2\n", ["recipe.yaml:3: seed: given twice (first in line 1); keep one"]),
    ("train:\n\tlr: 1\n", ["recipe.yaml:2: not YAML", "check indentation"]),
    ("name: [1, 2\nseed: 3\n", ["recipe.yaml:2: not YAML"]),
    ("name: !!python/object:os.system x\n", ["recipe.yaml:1: not YAML"]),
    ("seed: !!int abc\n", ["recipe.yaml:1: not YAML (abc is no !!int)"]),
    ("name: a\nseed: " + "9" * 5000 + "\n", ["recipe.yaml:2: not YAML (a number of 5000 digits)"]),
    ("name: !!bool abc\n", ["recipe.yaml:1: not YAML (abc is no !!bool)"]),
    ("name: !!timestamp abc\n", ["recipe.yaml:1: not YAML", "timestamp"]),
    ("name: a\nrollout: &r\n  sglang: {a: *r}\n", ["recipe.yaml:3: an anchor (&) holds an alias (*) of itself, so it has no end; remove the alias"]),
    ("name: a\nrollout: &r\n  <<: *r\n", ["recipe.yaml:2: an anchor (&) holds an alias (*) of itself"]),
    ("name: " + "[" * 60 + "]" * 60 + "\n", ["recipe.yaml:1: lists or keys are nested more than 50 deep; check the brackets"]),
    ("name: " + "[" * 1500 + "\n", ["recipe.yaml:1: lists or keys are nested more than 50 deep"]),
    (  # 10 to the sixth values in 60 bytes a line
        "rollout:\n  sglang:\n    a0: &a0 1\n" + "".join(f"    a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 7)),
        ["recipe.yaml:", "more than 100000 values, aliases (*) written out; shorten it"],
    ),
    ("- a\n- b\n", ["recipe.yaml:1: expected keys and values at the top, got a list"]),
    ("1: a\n", ["recipe.yaml:1: key '1' is not a text; quote it or remove it"]),
    ("defaults: clusters/local\n", ["recipe.yaml:1: defaults: expected a list of files, got 'clusters/local'"]),
    ("defaults: [clusters/locl]\n", ["clusters/locl: no such file, named in defaults", "recipe.yaml:1", "did you mean clusters/local?"]),
    ("defaults: [recipe]\n", ["recipe.yaml: defaults go in a circle (recipe.yaml -> recipe.yaml)"]),
    (
        "rollout: {batch_size: 6, n_samples_per_prompt: 4}\ntrain: {global_batch_size: 7, num_steps_per_rollout: 3}\n",
        ["recipe.yaml:2: train.global_batch_size: 6 prompts × 4 samples = 24 samples", "7 × num_steps_per_rollout 3 = 21; take global_batch_size 8"],
    ),
    (
        "rollout: {batch_size: 6, n_samples_per_prompt: 4}\ntrain: {num_steps_per_rollout: 5}\n",
        ["recipe.yaml:2: train.num_steps_per_rollout: 6 prompts × 4 samples = 24", "but 5 steps do not divide 6 prompts", "take 6 steps of 4 samples"],
    ),
    (  # 12 samples in 4 steps are 3 each, but whole prompts would make them 4, 4, 2 and 2
        "rollout: {batch_size: 6, n_samples_per_prompt: 2}\ntrain: {num_steps_per_rollout: 4}\n",
        ["6 prompts × 2 samples = 12", "but 4 steps do not divide 6 prompts, whose samples stay in one step; take 3 steps of 4 samples"],
    ),
    (
        "rollout: {batch_size: 4, n_samples_per_prompt: 4}\ntrain: {num_steps_per_rollout: 8}\n",
        ["4 prompts × 4 samples = 16", "but 8 steps do not divide 4 prompts, whose samples stay in one step; take 4 steps of 4 samples"],
    ),
    (
        "rollout: {batch_size: 4, n_samples_per_prompt: 4}\ntrain: {num_steps_per_rollout: 8, global_batch_size: 2}\n",
        ["train.num_steps_per_rollout: 4 prompts × 4 samples = 16", "but 8 steps do not divide 4 prompts", "take 4 steps of 4 samples"],
    ),
    (
        "rollout: {batch_size: 6, n_samples_per_prompt: 2}\ntrain: {global_batch_size: 3}\n",
        ["train.global_batch_size: 6 prompts × 2 samples = 12", "a step of 3 samples does not hold whole prompts of 2 samples; take global_batch_size 2"],
    ),
    (
        "rollout: {batch_size: 6, n_samples_per_prompt: 4}\ntrain: {global_batch_size: 10}\n",
        ["train.global_batch_size: 6 prompts × 4 samples = 24", "which 10 does not divide; take global_batch_size 8"],
    ),
    ("rollout: {batch_size: 8, over_sampling_batch_size: 4}\n", ["rollout.over_sampling_batch_size: 4 is less than rollout.batch_size 8; raise it"]),
    ("rollout: {num_gpus: 3, num_gpus_per_engine: 2}\n", ["engines of 2 do not fill rollout.num_gpus 3; take rollout.num_gpus 4"]),
    ("data: {prompt_data: a.jsonl, reasoning_gym: chain_sum}\n", ["data.reasoning_gym: data.prompt_data is given too; keep one"]),
    ("eval: {exclude: [train]}\n", ["eval.exclude: 'train' is not another source; name data or warm_start"]),
    ("rollout: {reward: {type: math, path: a.b}}\n", ["rollout.reward.path: rollout.reward.type 'math' is given too; set rollout.reward.type=null"]),
    ("rollout: {reward: {type: remote_rm}}\n", ["rollout.reward.url: ", "set rollout.reward.url"]),
    ("train: {optimizer: {lr: 1.0e-6, min_lr: 1.0e-5}}\n", ["train.optimizer.min_lr: 1e-05 is above train.optimizer.lr 1e-06; lower it"]),
    ("algorithm: {tis_clip_low: 3}\n", ["algorithm.tis_clip_low: 3.0 is above algorithm.tis_clip 2.0"]),
    (
        "rollout: {sampling: {max_prompt_len: 10, max_context_len: 10}}\n",
        ["rollout.sampling.max_context_len: 10 leaves no token to generate after max_prompt_len 10; raise it"],
    ),
    ("rollout: {sglang: {pagesize: 1}}\n", ["recipe.yaml:1: rollout.sglang.pagesize: SGLang 0.5.15 has no such", "did you mean page_size?"]),
    ("rollout: {sglang: {page_size: big}}\n", ['rollout.sglang.page_size: expected a whole number, got "big"']),
    ("rollout: {sglang: {tp_size: 2}}\n", ["rollout.sglang.tp_size: miles sets it; set rollout.num_gpus_per_engine"]),
    ("rollout: {sglang: {dtype: bfloat16}}\n", ['recipe.yaml:1: rollout.sglang.dtype: miles sets it to "float32"; set model.dtype']),
    ("rollout: {sglang: {max_running_requests: 8}}\n", ["rollout.sglang.max_running_requests: miles sets it to 32; set rollout.max_running_requests"]),
    ("rollout: {sglang: {skip_tokenizer_init: false}}\n", ["rollout.sglang.skip_tokenizer_init: miles sets it to true; leave it out", "rollout.sampling.stop"]),
    ("rollout: {sglang: {enable_return_routed_experts: true}}\n", ["miles sets it to false; set rollout.return_routed_experts"]),
    ("rollout: {sglang: {enable_metrics: null}}\n", ["rollout.sglang.enable_metrics: miles sets it to true; leave it out"]),
    ("seed: a\nname: 5\n", ["recipe.yaml:", "(and 1 more)"]),
]

LINES = [  # command line, and parts of the line
    ("missing.yaml", ["missing.yaml: no such file"]),
    ("recipe.yml2", ["recipe.yml2: no such file"]),
    (".", [".: is a folder, not a recipe"]),
    ("/", ["/: is a folder, not a recipe"]),
    ("clusters/locall", ["clusters/locall: no such file; did you mean clusters/local?"]),
    ("train.optimizer.lr=fast", ['train.optimizer.lr=fast: expected a number, got "fast"']),
    ("train.optimizr.lr=1", ["train.optimizr.lr: unknown key; did you mean train.optimizer.lr?"]),
    ("name=[1,", ["name=[1,: '[1,' is not a YAML value", "quote it"]),
    ("seed=" + "9" * 5000, ["seed=9999", "…: '9999", "(a number of 5000 digits)"]),
    ("seed=" + "9" * 300, ["seed=9999", "…: expected less than 9.22337e+18, got 9999"]),
    ("train.optimizer.lr=" + "9" * 390, ["…: expected a number, got 9999"]),
    ("--seed " + "9" * 5000, ["--seed: expected a whole number, got '9999", "…'"]),
    ("--apply-chat-template-kwargs " + "[" * 50_000, ["--apply-chat-template-kwargs: expected a JSON value, got '[[[["]),
    ('rollout.sglang={"a":1,"a":2}', ['rollout.sglang={"a":1,"a":2}: a: given twice; keep one']),
    ("--lr fast", ["--lr: expected a number, got 'fast'"]),
    ("--lr", ["--lr: expected a value after it"]),
    ("--tis-clip x", ["--tis-clip: expected a number, got 'x'"]),
    ("--tis-clp 2", ["--tis-clp: unknown option; did you mean --tis-clip?"]),
    ("--use_tis", ["--use_tis: unknown option; did you mean --use-tis?"]),
    ("--use-tis=3", ["--use-tis: takes no value, got '3'"]),
    ("--train.optimizer.lr 3", ["--train.optimizer.lr: not an option; write train.optimizer.lr=VALUE"]),
    ("--rollout-batch-size 0", ["--rollout-batch-size: rollout.batch_size: expected at least 1, got 0"]),
    ("--kl-loss-type k9", ['--kl-loss-type: algorithm.kl_loss_type: expected one of k1, k2, k3, low_var_kl, got "k9"']),
    ("--apply-chat-template-kwargs {", ["--apply-chat-template-kwargs: expected a JSON value, got '{'"]),
    ("--critic-load DIR --use-opsm", ["--critic-load: not there yet: critics", "--use-opsm: not there yet"]),
    ("--num-layers 48", ["--num-layers: the model's shape is read from --hf-checkpoint"]),
    ("--gamma 0.9", ["--gamma 0.9: not there yet", "leave it out or give 1.0"]),
    ("--recompute-granularity selective", ["--recompute-granularity selective: not there yet; give full"]),
    ("--eval-prompt-data a b c d", ["--eval-prompt-data: takes one pair, NAME PATH, got 4 values"]),
    ("--sglang-page-sise 3", ["--sglang-page-sise: unknown option; did you mean --sglang-page-size?"]),
    ("--sglang-page-size x", ["--sglang-page-size: expected a whole number, got 'x'"]),
    ("--sglang-tensor-parallel-size 2", ["--sglang-tp-size: rollout.sglang.tp_size: miles sets it; set rollout.num_gpus_per_engine"]),
    ("--lr-decay-iters 10 train.optimizer.lr_warmup_steps=10", ["--lr-decay-iters: 10 with a warm-up of 10 leave no step to decay; raise it, or lower train.optimizer.lr_warmup_steps"]),
    ("--eval-sglang-mem-fraction-static 0.5", ["--eval-sglang-mem-fraction-static: not there yet"]),
    ("--router-policy manual", ["--router-policy: every worker talks to its engines directly"]),
]


def one_line(error: pytest.ExceptionInfo[ConfigError], parts: list[str]) -> None:
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, UserError)
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(("text", "parts"), FILES, ids=[parts[0][:60] for _, parts in FILES])
def test_bad_file(text: str, parts: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config([recipe])
    one_line(error, parts)


@pytest.mark.parametrize(("line", "parts"), LINES, ids=[line[:60] for line, _ in LINES])
def test_bad_line(line: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(*parse_flags(line.split()))
    one_line(error, parts)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError) as error:
        load_config([recipe])
    one_line(error, ["recipe.yaml: not UTF-8 text (byte 9); save it as UTF-8"])


def test_not_an_override() -> None:
    with pytest.raises(ConfigError) as error:
        load_config([], ["seed"])
    one_line(error, ["seed: not an override; write key=value"])


def test_unknown_flag_given_by_a_program() -> None:
    with pytest.raises(ConfigError) as error:
        load_config([], [], {"rollout-batchsize": 8})
    one_line(error, ["--rollout-batchsize: unknown option; did you mean --rollout-batch-size?"])
