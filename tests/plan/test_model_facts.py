"""Dimensions and parameter counts, against the counts that the checkpoints' publishers state."""

import json
from pathlib import Path

import pytest

from miles.config.exits import ConfigError
from miles.config.schema import Model
from miles.plan.abilities import FAMILIES
from miles.plan.model import facts, known_names, parameters, shape_of_hf

PUBLISHED = {  # parameters of the checkpoint's tensors, as its model card states them
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "llama3.1-8b-instruct": 8_030_261_248,
    "llama3.2-3b-instruct": 3_212_749_824,
}
NOMINAL = {"deepseek-v3": 671e9, "llama4-maverick-17b-128e": 400.7e9, "kimi-k2": 1.0e12, "glm4.5-106b-a12b": 106e9, "glm4.5-355b-a32b": 355e9}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    known = facts(Model(name=name))
    assert known is not None
    assert sum(parameters(known.shape)) == PUBLISHED[name]


@pytest.mark.parametrize("name", NOMINAL)
def test_nominal_counts(name: str) -> None:
    known = facts(Model(name=name))
    assert known is not None
    assert sum(parameters(known.shape)) == pytest.approx(NOMINAL[name], rel=0.03)


def test_every_model_file_is_complete() -> None:
    assert len(known_names()) == 42
    for name in known_names():
        known = facts(Model(name=name))
        assert known is not None
        shape = known.shape
        assert (shape.experts > 0) == (shape.top_k > 0) == (shape.expert_ffn > 0), name
        assert (shape.kv_lora > 0) == (shape.qk_rope > 0) == (shape.v_head > 0), name


QWEN3_MOE = {
    "model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "vocab_size": 10, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "tie_word_embeddings": True,
}  # fmt: skip


def test_config_json_wins(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_MOE))
    known = facts(Model(hf_checkpoint=str(tmp_path)))
    assert known is not None
    assert known.source.endswith("config.json")
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 2 * 4  # q, k and v, o, norms of q and k
    dense = 2 * (attention + 8 * 4 + 2 * 8) + 8 + 10 * 8  # with router and norms; last norm; embedding
    assert parameters(known.shape) == (dense, 2 * 4 * 3 * 8 * 6)


def test_counts_agree_with_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    for family in FAMILIES:
        given = {key: value for key, value in QWEN3_MOE.items() if family == "qwen3_moe" or not ("expert" in key or "moe" in key)}
        config = transformers.AutoConfig.for_model(**{**given, "model_type": family})
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        config.save_pretrained(tmp_path)
        known = facts(Model(hf_checkpoint=str(tmp_path)))
        assert known is not None
        assert sum(parameters(known.shape)) == sum(p.numel() for p in model.parameters()), family


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.name: 'qwen3-30b' is not in configs/models; did you mean qwen3-30b-a3b"):
        facts(Model(name="qwen3-30b"))
    with pytest.raises(ConfigError, match="no hidden_size, num_attention_heads, vocab_size; give the folder of a causal language model"):
        shape_of_hf({"num_hidden_layers": 2}, "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not JSON"):
        facts(Model(hf_checkpoint=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_MOE))
    with pytest.raises(ConfigError, match=r"qwen3-0.6b has 28 layers of width 1024, but .*config.json says 2 of 8"):
        facts(Model(name="qwen3-0.6b", hf_checkpoint=str(tmp_path)))
    assert facts(Model()) is None


def test_families_are_those_of_the_model_registry() -> None:
    pytest.importorskip("torch")
    from miles.models import registry

    assert set(FAMILIES) == set(registry.FAMILIES)
