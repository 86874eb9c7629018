"""GLM-4.5, 4.6, 4.7: grouped-query attention with DeepSeek's experts and MTP."""

from miles.models.maps.deepseek import FIXED, feed_forward
from miles.models.maps.entry import Config, Entry
from miles.models.maps.family import Map
from miles.models.maps.parts import attention

FIELDS = frozenset({
    "attention_bias", "use_qk_norm", "partial_rotary_factor", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "first_k_dense_replace", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob", "num_experts", "num_local_experts",
})  # fmt: skip


def layer(config: Config, i: int) -> list[Entry]:
    return attention(config, bias=bool(config.get("attention_bias")), head_norm=bool(config.get("use_qk_norm"))) + feed_forward(config, i)


GLM4_MOE = Map(("glm4_moe",), layer, FIELDS, lambda config: False, {name: values for name, values in FIXED.items() if name != "attention_bias"}, mtp=True)
