"""What families have in common: attention, latent attention, gated MLP, experts. Names as Megatron with Transformer Engine writes them."""

from __future__ import annotations

from miles.models.maps.entry import FP32, Block, Config, Entry, same, stacked


def qkv(config: Config, suffix: str = "weight", prefix: str = "self_attn.") -> Entry:
    """linear_qkv: for each key-value head the query heads that share it, then its key, then its value."""
    heads, groups, head = config.heads, config.groups, config.head
    columns = (config.hidden,) if suffix == "weight" else ()
    each = heads // groups
    blocks = []
    for group in range(groups):
        at = group * (each + 2) * head
        blocks.append(Block(f"{prefix}q_proj.{suffix}", (heads * head, *columns), group * each * head, each * head, at))
        blocks.append(Block(f"{prefix}k_proj.{suffix}", (groups * head, *columns), group * head, head, at + each * head))
        blocks.append(Block(f"{prefix}v_proj.{suffix}", (groups * head, *columns), group * head, head, at + (each + 1) * head))
    return Entry(f"self_attention.linear_qkv.{suffix}", ((heads + 2 * groups) * head, *columns), tuple(blocks))


def attention(config: Config, *, bias: bool = False, out_bias: bool = False, head_norm: bool = False, whole_norm: bool = False) -> list[Entry]:
    """Grouped-query attention behind its norm. head_norm: QK-norm of each head; whole_norm: of all heads at once."""
    heads, groups, head, hidden = config.heads, config.groups, config.head, config.hidden
    entries = [
        qkv(config),
        same("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", hidden),
        same("self_attention.linear_proj.weight", "self_attn.o_proj.weight", hidden, heads * head),
    ]
    if bias:
        entries.append(qkv(config, "bias"))
    if out_bias:
        entries.append(same("self_attention.linear_proj.bias", "self_attn.o_proj.bias", hidden))
    if head_norm or whole_norm:
        wide = (heads * head, groups * head) if whole_norm else (head, head)
        entries.append(same("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", wide[0]))
        entries.append(same("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", wide[1]))
    return entries


def latent_attention(config: Config, *, fused_norms: bool = True) -> list[Entry]:
    """Multi-head latent attention. Its input norm is a module of its own; fused_norms: the inner ones belong to the up projections."""
    hidden, heads = config.hidden, config.heads
    q_rank, kv_rank = config.number("q_lora_rank", 0), config.number("kv_lora_rank")
    nope, rope, value = config.number("qk_nope_head_dim"), config.number("qk_rope_head_dim"), config.number("v_head_dim")
    of, hf = "self_attention.", "self_attn."
    entries = [
        same("input_layernorm.weight", "input_layernorm.weight", hidden),
        same(f"{of}linear_kv_down_proj.weight", f"{hf}kv_a_proj_with_mqa.weight", kv_rank + rope, hidden),
        same(f"{of}linear_kv_up_proj.weight", f"{hf}kv_b_proj.weight", heads * (nope + value), kv_rank),
        same(f"{of}linear_kv_up_proj.layer_norm_weight" if fused_norms else f"{of}kv_layernorm.weight", f"{hf}kv_a_layernorm.weight", kv_rank),
        same(f"{of}linear_proj.weight", f"{hf}o_proj.weight", hidden, heads * value),
    ]
    if not q_rank:
        return [*entries, same(f"{of}linear_q_proj.weight", f"{hf}q_proj.weight", heads * (nope + rope), hidden)]
    return [
        *entries,
        same(f"{of}linear_q_down_proj.weight", f"{hf}q_a_proj.weight", q_rank, hidden),
        same(f"{of}linear_q_up_proj.weight", f"{hf}q_b_proj.weight", heads * (nope + rope), q_rank),
        same(f"{of}linear_q_up_proj.layer_norm_weight" if fused_norms else f"{of}q_layernorm.weight", f"{hf}q_a_layernorm.weight", q_rank),
    ]


def gated_mlp(config: Config, width: int, *, name: str = "mlp", hf: str = "mlp", norm: str | None = "post_attention_layernorm") -> list[Entry]:
    """Gate and up in one matrix, then down; `norm`: the Hugging Face name of the norm before it, None for none (shared experts)."""
    hidden = config.hidden
    entries = [
        stacked(f"{name}.linear_fc1.weight", [f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"], width, hidden),
        same(f"{name}.linear_fc2.weight", f"{hf}.down_proj.weight", hidden, width),
    ]
    return entries if norm is None else [*entries, same(f"{name}.linear_fc1.layer_norm_weight", f"{norm}.weight", hidden)]


def router(config: Config, count: int, hf: str = "mlp.gate.weight", bias: str | None = None) -> list[Entry]:
    """The norm before the experts, the router, and the bias that balances the choice (kept in float32)."""
    entries = [
        same("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", config.hidden),
        same("mlp.router.weight", hf, count, config.hidden),
    ]
    return entries if bias is None else [*entries, same("mlp.router.expert_bias", bias, count, dtype=FP32)]


def experts(config: Config, count: int, width: int, hf: str = "mlp.experts", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> list[Entry]:
    """Routed experts with a tensor each in Hugging Face files; `names`: gate, up, down."""
    gate, up, down = names
    entries = []
    for e in range(count):
        first = stacked("mlp.experts.experts.linear_fc1.weight", [f"{hf}.{e}.{gate}.weight", f"{hf}.{e}.{up}.weight"], width, config.hidden)
        second = same("mlp.experts.experts.linear_fc2.weight", f"{hf}.{e}.{down}.weight", config.hidden, width)
        entries += [Entry(entry.name, entry.shape, entry.blocks, e, count) for entry in (first, second)]
    return entries


def experts_in_one(config: Config, count: int, width: int, hf: str) -> list[Entry]:
    """Routed experts in two tensors, [expert, hidden, gate and up] and [expert, width, hidden], each matrix transposed."""
    entries = []
    for e in range(count):
        wide = Block(f"{hf}.gate_up_proj", (count, config.hidden, 2 * width), 0, 2 * width, 0, e, True)
        down = Block(f"{hf}.down_proj", (count, width, config.hidden), 0, config.hidden, 0, e, True)
        entries.append(Entry("mlp.experts.experts.linear_fc1.weight", (2 * width, config.hidden), (wide,), e, count))
        entries.append(Entry("mlp.experts.experts.linear_fc2.weight", (config.hidden, width), (down,), e, count))
    return entries


def ends(config: Config) -> list[Entry]:
    """Final norm; embedding and output layer are padded to the vocabulary and stand in miles.models.maps.pieces."""
    return [same("decoder.final_layernorm.weight", "model.norm.weight", config.hidden)]
