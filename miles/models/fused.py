"""The supported families on the CPU kernels (fp32): transformers' models with their forward passes replaced, parameters untouched.

Modules change their class, not their parameters: state_dict keys, FSDP2 wrapping, gradient checkpointing (the decoder layer stays a
GradientCheckpointingLayer) and saving work as before. All rows of a pass are in one [T, ..] matrix, T a multiple of 16 by padding.
exact=True: matrix products in fixed blocks (batch-invariant). exact=False: plain products, everything else the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from miles.models.context import Context
from miles.models.registry import Family
from miles.precision.batch_invariant import RotaryTable, experts, linear, norm_rope, rms_norm, route, silu_mul


class FusedDecoderLayer(GradientCheckpointingLayer):
    """Norm, attention, norm, MLP or experts, on [T, hidden]."""

    exact: bool
    attention_name: str

    def forward(
        self: Any, hidden: torch.Tensor, miles_context: Context, position: torch.Tensor, table: RotaryTable, **kwargs: Any
    ) -> torch.Tensor:
        norm = self.input_layernorm
        attended = self.attention(rms_norm(hidden, norm.weight, norm.variance_epsilon), miles_context, position, table)
        hidden = hidden + attended
        norm = self.post_attention_layernorm
        return hidden + self.feed_forward(rms_norm(hidden, norm.weight, norm.variance_epsilon), miles_context)

    def attention(self: Any, x: torch.Tensor, context: Context, position: torch.Tensor, table: RotaryTable) -> torch.Tensor:
        """Self-attention of normed x [T, hidden]."""
        module, exact = self.self_attn, self.exact
        dim = module.head_dim
        q, k, v = (linear(x, p.weight, p.bias, exact).view(len(x), -1, dim) for p in (module.q_proj, module.k_proj, module.v_proj))
        q_norm, k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        q = norm_rope(q, None if q_norm is None else q_norm.weight, 0.0 if q_norm is None else q_norm.variance_epsilon, position, table)
        k = norm_rope(k, None if k_norm is None else k_norm.weight, 0.0 if k_norm is None else k_norm.variance_epsilon, position, table)
        attend = ALL_ATTENTION_FUNCTIONS[self.attention_name]
        heads = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        out, _ = attend(module, *heads, None, scaling=module.scaling, miles_context=context)
        return linear(out.reshape(len(x), -1), module.o_proj.weight, module.o_proj.bias, exact)

    def feed_forward(self: Any, x: torch.Tensor, context: Context) -> torch.Tensor:
        """MLP or routed experts of normed x [T, hidden]."""
        mlp, exact = self.mlp, self.exact
        if not hasattr(mlp, "gate"):
            gate, up = (linear(x, p.weight, p.bias, exact) for p in (mlp.gate_proj, mlp.up_proj))
            return linear(silu_mul(gate, up), mlp.down_proj.weight, mlp.down_proj.bias, exact)
        router = mlp.gate
        index, weight = route(linear(x, router.weight, None, exact), router.top_k, router.norm_topk_prob)
        context.record(self.self_attn.layer_idx, index)
        return experts(x, index, weight, mlp.experts.gate_up_proj, mlp.experts.down_proj, exact)


class FusedTrunk:
    """Embedding, layers, last norm: input_ids [1, T] -> [1, T, hidden]."""

    def forward(
        self: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, miles_context: Context, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        hidden = F.embedding(input_ids[0], self.embed_tokens.weight)
        position = position_ids[0].contiguous()
        table = self.rotary_table(miles_context, position)
        for layer in self.layers:
            hidden = layer(hidden, miles_context=miles_context, position=position, table=table)
        hidden = rms_norm(hidden, self.norm.weight, self.norm.variance_epsilon)
        last: Any = hidden.unsqueeze(0)
        return BaseModelOutputWithPast(last_hidden_state=last)

    def rotary_table(self: Any, context: Context, position: torch.Tensor) -> RotaryTable:
        """cos and sin [P, D / 2] for every position that occurs: made once per size, rows by position, so bits don't depend on the batch."""
        need = int(position.max()) + 1 if position.numel() else 1
        table: RotaryTable | None = self.__dict__.get("_miles_table")
        if table is None or table[0].shape[0] < need:
            with torch.inference_mode(False):  # made by an engine or a trainer alike: an inference tensor could not be used in training
                size = max(need, self.config.max_position_embeddings)
                rotary = self.rotary_emb
                angle = torch.arange(size, dtype=torch.float32)[:, None] * rotary.inv_freq.float().cpu()[None]
                # fp64 sine and cosine rounded once: the same bits for a position whatever the size of the table
                cos, sin = (f(angle.double()).float() * rotary.attention_scaling for f in (torch.cos, torch.sin))
                table = (cos.contiguous(), sin.contiguous())
            self.__dict__["_miles_table"] = table
        assert table is not None
        return table


class FusedCausalLM:
    """Trunk and head: logits [1, R, V] of the rows in logits_to_keep (i64 [R]), all rows for 0."""

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        miles_context: Context,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids=input_ids, position_ids=position_ids, miles_context=miles_context).last_hidden_state[0]
        if isinstance(logits_to_keep, torch.Tensor):
            hidden = hidden[logits_to_keep]
        logits: Any = linear(hidden, self.lm_head.weight, None, self.miles_exact).unsqueeze(0)
        return CausalLMOutputWithPast(logits=logits)


def fuse(model: PreTrainedModel, family: Family, exact: bool) -> None:
    """Replace the forward passes of a transformers causal model of a supported family, in place."""
    trunk: Any = model.model
    _become(model, FusedCausalLM)
    _become(trunk, FusedTrunk)
    model.__dict__["miles_exact"] = exact
    for layer in trunk.layers:
        layer.__class__ = FusedDecoderLayer
        layer.exact = exact
        layer.attention_name = model.config._attn_implementation


def _become(module: nn.Module, mixin: type) -> None:
    """The module's class with the mixin's forward; the name stays, since transformers writes it into config.json."""
    old = type(module)
    module.__class__ = type(old.__name__, (mixin, old), {"__module__": old.__module__})
