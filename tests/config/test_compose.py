"""Composition: files, defaults, options and overrides, in that order; what is dumped loads back equal."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from miles.config.compose import configs_dir, dump_config, load_config, resolved
from miles.config.schema import RunConfig


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_later_wins(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "seed: 1\nrollout: {batch_size: 4, n_samples_per_prompt: 2, sampling: {temperature: 0.7, stop: [a, b]}}\n")
    recipe = write(tmp_path / "recipe.yaml", "defaults: [base]\nrollout: {batch_size: 16, sampling: {stop: [c]}}\n")
    config = load_config([recipe], ["train.optimizer.lr=1e-4", "rollout.sampling.top_k=20"], {"lr": 5e-7, "seed": 3})
    assert config.rollout.batch_size == 16  # the file over its defaults
    assert config.rollout.n_samples_per_prompt == 2  # deep: what is not named stays
    assert config.rollout.sampling.temperature == 0.7
    assert config.rollout.sampling.stop == ["c"]  # lists replace
    assert config.seed == 3  # an option over files
    assert config.train.optimizer.lr == 1e-4  # an override over options
    assert config.rollout.sampling.top_k == 20


def test_defaults_of_the_package(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", "defaults: [clusters/local_gpu, models/qwen3-30b-a3b]\nmodel: {dtype: float32}\n")
    config = load_config([recipe])
    assert config.cluster.device == "cuda"
    assert (config.model.name, config.model.dtype) == ("qwen3-30b-a3b", "float32")
    assert config.model.shape is not None
    assert config.model.shape.experts == 128
    assert load_config(["models/qwen2.5-0.5b"]).model.name == "qwen2.5-0.5b"  # by name, with a dot in it


def test_a_file_beside_wins_over_the_package(tmp_path: Path) -> None:
    write(tmp_path / "clusters" / "local.yaml", "cluster: {threads: 7}\n")
    recipe = write(tmp_path / "recipe.yaml", "defaults: [clusters/local]\n")
    assert load_config([recipe]).cluster.threads == 7


@pytest.mark.parametrize("path", sorted(configs_dir().rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_file_loads(path: Path, tmp_path: Path) -> None:
    config = load_config([path])
    again = write(tmp_path / "run.yaml", dump_config(config))
    assert load_config([again]) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E+3", 1000.0), (".5", 0.5), ("2.", 2.0), ("3", 3)],
)
def test_numbers(text: str, value: float) -> None:
    assert load_config([], [f"train.optimizer.weight_decay={text}"]).train.optimizer.weight_decay == value


def test_texts_that_yaml_1_1_would_change(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", "rollout: {sampling: {stop: [no, on, 12:30, 2026-01-01, 1_000]}}\n")
    assert load_config([recipe]).rollout.sampling.stop == ["no", "on", "12:30", "2026-01-01", "1_000"]
    again = write(tmp_path / "run.yaml", dump_config(load_config([recipe])))
    assert load_config([again]) == load_config([recipe])
    assert load_config([], ["seed=010"]).seed == 10  # not octal


def test_empty_sections_and_files_change_nothing(tmp_path: Path) -> None:
    assert load_config([write(tmp_path / "empty.yaml", "")]) == load_config([])
    assert load_config([write(tmp_path / "section.yaml", "train:\n  # lr: 1\ndata:\n")]) == load_config([])


def test_resolved_defaults() -> None:
    overrides = """
        rollout.batch_size=6 rollout.n_samples_per_prompt=4 num_rollout=5 train.global_batch_size=8 train.parallel.tensor=2
        rollout.sampling.max_prompt_len=100 rollout.sampling.max_response_len=28 rollout.reward.type=math algorithm.eps_clip=0.1
    """
    config = load_config([], overrides.split())
    assert config.train.num_steps_per_rollout == 3  # 6 × 4 / 8
    assert config.train.optimizer.lr_decay_steps == 15  # 5 rollouts × 3 steps
    assert load_config([], ["num_rollout=9", "train.optimizer.lr_warmup_steps=4"]).train.optimizer.lr_decay_steps == 5  # what the warm-up leaves
    assert config.train.parallel.expert_tensor == 2
    assert config.rollout.sampling.max_context_len == 128
    assert config.rollout.over_sampling_batch_size == 6
    assert config.eval.reward is not None
    assert config.eval.reward.type == "math"
    assert config.algorithm.eps_clip_high == 0.1
    assert resolved(config) == config
    assert load_config([], ["rollout.batch_size=6", "rollout.n_samples_per_prompt=4"]).train.global_batch_size == 24
    assert load_config([], ["rollout.batch_size=6", "rollout.n_samples_per_prompt=4", "train.num_steps_per_rollout=2"]).train.global_batch_size == 12


def test_no_default_is_left_out_of_the_dump() -> None:
    text = dump_config(load_config([]))
    for name, section in RunConfig().model_dump().items():
        for key in section if isinstance(section, dict) else []:
            assert f"  {key}:" in text, (name, key)


@settings(max_examples=40, deadline=None)
@given(
    name=st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/"), min_size=1, max_size=30).filter(lambda name: name not in (".", "..")),
    stop=st.lists(st.text(st.characters(blacklist_categories=("Cs",)), max_size=8), max_size=4),
    lr=st.floats(1e-12, 1.0),
    seed=st.integers(0, 2**63 - 1),
)
@example(name="a", stop=["\x85", "a\u2028b", "\u2029 "], lr=1.0, seed=0)  # line breaks of YAML 1.1
def test_dump_loads_back_equal(name: str, stop: list[str], lr: float, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = RunConfig().model_dump()
    base["name"], base["seed"] = name, seed
    base["rollout"]["sampling"]["stop"] = stop
    base["train"]["optimizer"]["lr"] = lr
    config = resolved(RunConfig.model_validate(base))
    path = write(tmp_path_factory.mktemp("dump") / "run.yaml", dump_config(config))
    assert load_config([path]) == config
