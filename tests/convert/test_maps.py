"""Names and shapes against what megatron-core with Transformer Engine wrote; what is refused."""

from pathlib import Path

import pytest

from miles.config.exits import UserError
from miles.models.maps.find import MAPS, known
from miles.models.maps.pieces import padded_vocabulary, pieces

RECORDED = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": False}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
LATENT = {
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": 4, "n_routed_experts": 4,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 128, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS = {
    "dense": (GROUPED | {"model_type": "qwen3"}, 0),
    "moe": (GROUPED | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}, 0),
    "dsv3_mtp": (LATENT | {"model_type": "deepseek_v3"}, 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_that_megatron_wrote(name):
    fields, mtp = MODELS[name]
    found = {"common_state/shard_0_1 () BYTES"}
    for piece in pieces(known(RECORDED | fields, "config.json"), mtp_layers=mtp):
        found.add(f"{piece.key} {piece.whole} torch.{piece.dtype or 'bfloat16'}")
        found |= {f"{item} () BYTES" for item in piece.objects}
    assert sorted(found) == sorted((Path(__file__).parent / "keys" / f"{name}.txt").read_text().splitlines())


def test_pieces_of_a_tensor_fill_it_without_overlap():
    for fields, mtp in MODELS.values():
        held: dict[str, int] = {}
        whole: dict[str, int] = {}
        for piece in pieces(known(RECORDED | fields, "config.json"), mtp_layers=mtp):
            assert sum(block.rows for block in piece.blocks) == piece.shape[0]
            held[piece.key] = held.get(piece.key, 0) + 1
            whole[piece.key] = 1
            for size in piece.axes:
                whole[piece.key] *= size
        assert held == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mamba"}, "known: llama"), ({"new_gate": 3}, "new_gate = 3"), ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"), ({"use_sliding_window": True}, "use_sliding_window"),
        ({"num_key_value_heads": 3}, "can't share"), ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"model_type": "qwen2_moe", "num_experts": 4, "decoder_sparse_step": 0}, "decoder_sparse_step is 0, a whole number of at least 1"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(change, said):
    with pytest.raises(UserError, match=said) as caught:
        list(pieces(known(RECORDED | GROUPED | {"model_type": "qwen3"} | change, "config.json")))
    assert "\n" not in str(caught.value)


def test_vocabulary_is_padded_as_megatron_pads_it():
    assert padded_vocabulary(129280, 128, 8) == 129280 + 768
    assert padded_vocabulary(256, 128, 2) == 256


def test_all_families_of_the_list_are_known():
    wanted = "llama llama4_text qwen2 qwen2_moe qwen3 qwen3_moe deepseek_v3 deepseek_v32 glm4_moe minimax_m2 gemma2 gemma3_text gemma3n_text"
    assert set(wanted.split()) <= set(MAPS)
