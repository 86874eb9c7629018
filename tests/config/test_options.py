"""The public options: the announced lines parse completely, the list is frozen, every target exists."""

import subprocess
import sys
from pathlib import Path

import pytest

from miles.config.compose import load_config
from miles.config.document import markdown
from miles.config.exits import ConfigError
from miles.config.explain import fields
from miles.config.options import flag_values, parse_flags, sglang_arguments, table
from miles.config.schema import RunConfig

ANNOUNCED = [
    "--advantage-estimator grpo --model-name qwen3-30b-a3b --hf-checkpoint DIR --rollout-batch-size 512 --n-samples-per-prompt 8",
    "--actor-num-nodes 1 --actor-num-gpus-per-node 8 --rollout-num-gpus 8 --rollout-num-gpus-per-engine 2 --colocate --hf-checkpoint DIR"
    " --advantage-estimator grpo --tensor-model-parallel-size 8 --expert-model-parallel-size 4 --prompt-data FILE --num-rollout 3000",
    "--actor-num-gpus-per-node 8 --hf-checkpoint DIR --sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 3"
    " --sglang-speculative-eagle-topk 1 --sglang-speculative-num-draft-tokens 4 --sglang-speculative-draft-model-path DIR"
    " --sglang-enable-draft-weights-cpu-backup --mtp-num-layers 1 --enable-mtp-training --mtp-loss-scaling-factor 0.2"
    " --use-tis --tis-threshold 0.9 --lr 5e-7 --pipeline-model-parallel-size 2",
]


def configuration(line: str) -> RunConfig:
    return load_config(*parse_flags(line.split()))


def test_first_announced_line() -> None:
    config = configuration(ANNOUNCED[0])
    assert config.algorithm.advantage_estimator == "grpo"
    assert (config.model.name, config.model.hf_checkpoint) == ("qwen3-30b-a3b", "DIR")
    assert (config.rollout.batch_size, config.rollout.n_samples_per_prompt, config.train.global_batch_size) == (512, 8, 4096)


def test_second_announced_line() -> None:
    config = configuration(ANNOUNCED[1])
    assert (config.train.num_nodes, config.train.num_gpus_per_node) == (1, 8)
    assert (config.rollout.num_gpus, config.rollout.num_gpus_per_engine) == (8, 2)
    assert config.cluster.placement == "colocate"
    assert (config.train.parallel.tensor, config.train.parallel.expert, config.train.parallel.expert_tensor) == (8, 4, 8)
    assert (config.data.prompt_data, config.num_rollout, config.model.hf_checkpoint) == ("FILE", 3000, "DIR")


def test_third_announced_line() -> None:
    config = configuration(ANNOUNCED[2])
    assert config.rollout.sglang == {
        "speculative_algorithm": "EAGLE",
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
        "speculative_draft_model_path": "DIR",
        "enable_draft_weights_cpu_backup": True,
    }
    assert (config.model.mtp_num_layers, config.train.enable_mtp_training, config.train.mtp_loss_scaling_factor) == (1, True, 0.2)
    assert (config.algorithm.use_tis, config.algorithm.tis_clip) == (True, 0.9)  # --tis-threshold is --tis-clip
    assert (config.train.optimizer.lr, config.train.parallel.pipeline, config.train.num_gpus_per_node) == (5e-7, 2, 8)


@pytest.mark.parametrize("line", ANNOUNCED)
def test_every_word_of_an_announced_line_is_an_option(line: str) -> None:
    paths, overrides, flags = parse_flags(line.split())
    assert (paths, overrides) == ([], [])
    assert len(flags) == sum(word.startswith("--") for word in line.split())


def test_list_of_options_is_frozen() -> None:
    """A name that goes, or means something else, breaks somebody's launch script: change options.txt with intent."""
    now = []
    for option in table().values():
        meaning = "only" if option.fixed else "refused" if option.why else " ".join(option.to)
        now += [f"{name} {meaning}" for name in (option.name, *option.aliases)]
    frozen = (Path(__file__).parent / "options.txt").read_text().splitlines()
    assert now == frozen


def test_every_target_is_a_field_and_every_refusal_has_its_reason() -> None:
    for option in table().values():
        for path in option.to:
            assert tuple(path.split(".")) in fields(), option.name
        assert option.to or (option.why and len(option.why) > 10), option.name
    with pytest.raises(ConfigError, match="--use-opsm: not there yet"):
        list(flag_values({"use-opsm": []}))


@pytest.mark.parametrize("name", [option.name for option in table().values() if option.why and not option.fixed])
def test_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_flags([f"--{name}", "value"])
    assert str(error.value) == f"--{name}: {table()[name].why}"


def test_words_in_any_order() -> None:
    paths, overrides, flags = parse_flags(["a.yaml", "--lr", "1e-3", "seed=3", "--colocate", "b.yaml", "--rollout-top-k", "-1", "--rollout-stop", "x", "y"])
    assert paths == [Path("a.yaml"), Path("b.yaml")]
    assert overrides == ["seed=3"]
    assert flags == {"lr": 1e-3, "colocate": "colocate", "rollout-top-k": -1, "rollout-stop": ["x", "y"]}


def test_conversions() -> None:
    config = configuration(
        "--disable-grpo-std-normalization --skip-eval-before-train --eval-prompt-data aime PATH.jsonl --recompute-granularity full"
        " --apply-chat-template --label-key answer --eval-label-key solution --rollout-max-response-len 64 --eval-max-response-len 32"
        " --gamma 1.0 --group-rm --loss-type policy_loss --bf16 --rollout-stop-token-ids 1 2 --apply-chat-template-kwargs {\"a\":1}"
        " --sglang-mem-fraction-static 0.7 --sglang-disable-radix-cache --sglang-cuda-graph-bs 1 2 4"
    )
    assert config.algorithm.grpo_std_normalization is False
    assert config.eval.before_train is False
    assert config.eval.prompt_data == "PATH.jsonl"
    assert config.train.gradient_checkpointing is True
    assert (config.data.apply_chat_template, config.eval.apply_chat_template) == (True, True)
    assert (config.data.label_key, config.eval.label_key) == ("answer", "solution")
    assert (config.rollout.sampling.max_response_len, config.eval.sampling.max_response_len) == (64, 32)
    assert config.model.dtype == "bfloat16"
    assert config.rollout.sampling.stop_token_ids == [1, 2]
    assert config.data.apply_chat_template_kwargs == {"a": 1}
    assert config.rollout.sglang["mem_fraction_static"] == 0.7
    assert config.rollout.sglang["disable_radix_cache"] is True
    assert config.rollout.sglang["cuda_graph_bs_decode"] == [1, 2, 4]  # an older spelling that SGLang still takes


def test_profiler_options_count_as_upstream_does() -> None:
    """There steps count from 0 and the end is not included; here they count from 1, and both are."""
    assert configuration("--use-pytorch-profiler").profile.steps == [11, 12]
    assert configuration("--profile-step-start 4 --use-pytorch-profiler --profile-step-end 7 --profile-target train_overall").profile.steps == [5, 7]
    with pytest.raises(ConfigError, match="--profile-step-end: has no effect without --use-pytorch-profiler; give both"):
        configuration("--profile-step-end 7")


def test_debug_options() -> None:
    assert configuration("--debug-exit-after-rollout 3").debug.stop_after == 3
    assert configuration("--debug-rollout-only").debug.rollout_only
    assert configuration("--debug-train-only runs/first").debug.train_only == "runs/first"
    with pytest.raises(ConfigError, match=r"--load-debug-rollout-data: .*give --debug-train-only RUN_DIR"):
        configuration("--load-debug-rollout-data dump.pt")


def test_evaluation_option_wins_in_either_order() -> None:
    for line in ("--label-key a --eval-label-key b", "--eval-label-key b --label-key a"):
        assert configuration(line).eval.label_key == "b"


def test_recorded_sglang_arguments() -> None:
    """Names that SGLang 0.5.15's documentation and the announced lines use."""
    known = sglang_arguments()
    assert len(known) == 422
    assert known["mem_fraction_static"] == "float"
    assert known["speculative_num_steps"] == "int"
    assert known["enable_deterministic_inference"] == "bool"
    assert known["enable_return_routed_experts"] == "bool"


def test_page_of_options_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "options.md"
    assert page.read_text() == markdown(), "run: python -m miles.config.document > docs/options.md"


def test_configuration_imports_no_torch() -> None:
    code = (
        "import sys; import miles.config.compose, miles.config.options, miles.config.document, miles.plan.judge, miles.cli.check;"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
