"""Decode steps without Python between the kernels: one token of each sequence over a KV cache, as one program.

The same kernels on the same pieces as FusedDecoderLayer with exact=True, so the same bits (a test holds them against each other). What it
saves is the time between kernels, which is most of a small model's step, and the waits of threads for each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from miles.precision import cpu_attention, cpu_kernels, cpu_linear, cpu_program, cpu_routing
from miles.precision.attention import KVCache
from miles.precision.batch_invariant import BLOCK, ROWS, SERIAL, SGEMM, _panel, _scalar
from miles.precision.program import YIELD, Program, Size

MOST_ROWS = 256  # of a program: it keeps logits of so many rows


class DecodeProgram:
    """For a fused model and its cache, up to `rows` sequences at a time. Not for training: it keeps addresses of the weights."""

    @staticmethod
    def serves(model: Any, cache: KVCache) -> bool:
        """Whether this model can be run so: fused (fp32 on a CPU), with serial matrix products from the BLAS. Plain mode is served too: this is its fastest way."""
        return bool("miles_exact" in model.__dict__ and cache.transposed and SGEMM and SERIAL and YIELD)

    def __init__(self, model: Any, cache: KVCache, rows: int):
        self.rows = min(rows, MOST_ROWS)
        self._model, self._cache = model, cache
        self._parameters = list(model.parameters())
        self._built: list[int] = []

    def run(self, token_id: NDArray[np.int64], position: NDArray[np.int64], slot: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """token_id, position, slot i64 [B] -> (logits f32 [B, V], experts i64 [layers, B, k] or None), both overwritten by the next run."""
        addresses = [p.data_ptr() for p in self._parameters]
        if addresses != self._built:  # also after the weights' memory was released and taken again
            self._build()
            self._built = addresses
        count = len(token_id)
        longest = int(position.max()) + 1
        assert count <= self.rows, "the runner looks first"
        assert longest <= self._cache.length, "requests are checked to fit"
        self._position[:count], self._slot[:count] = position, slot
        self._tasks[:count, 2], self._tasks[:count, 3] = position, slot
        torch.index_select(self._model.model.embed_tokens.weight, 0, torch.from_numpy(token_id), out=self._hidden[:count])
        routed = count * self._top_k
        self._program.run(
            count * self._work, rows=count, rows_tasks=-(-count // ROWS), blocks=-(-count // BLOCK), routed=routed, routed_tasks=-(-routed // ROWS),
            width=-(-longest // 16) * 16,
        )  # fmt: skip
        return self._logits[:count], None if self._chosen is None else self._chosen[:, : count * self._top_k].view(-1, count, self._top_k)

    # -- writing it down ---------------------------------------------------------------------------------------------------------

    def _buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        buffer = torch.zeros(shape, dtype=dtype)
        self._kept.append(buffer)
        return buffer

    def _build(self) -> None:
        model, padded = self._model, -(-self.rows // BLOCK) * BLOCK
        config, layers = model.config, model.model.layers
        heads, kv_heads, dim, hidden = config.num_attention_heads, config.num_key_value_heads, layers[0].self_attn.head_dim, config.hidden_size
        self._kept: list[torch.Tensor] = []
        self._named: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._work = sum(p.numel() for p in self._parameters)
        mixed = [layer for layer in layers if hasattr(layer.mlp, "gate")]
        self._top_k = config.num_experts_per_tok if mixed else 0
        self._chosen = self._buffer(len(layers), self.rows * self._top_k, dtype=torch.int64) if mixed else None
        self._program = Program(32 * len(layers) + 8)
        self._position = self._buffer(padded, dtype=torch.int64).numpy()
        self._slot = self._buffer(padded, dtype=torch.int64).numpy()
        self._tasks = self._buffer(self.rows, 4, dtype=torch.int64).numpy()  # query row, 1 query, keys before, slot
        self._tasks[:, 0], self._tasks[:, 1] = np.arange(self.rows), 1
        self._hidden, x, y = (self._buffer(padded, hidden) for _ in range(3))
        self._logits = self._buffer(padded, config.vocab_size)
        qkv = [self._buffer(padded, n * dim) for n in (heads, kv_heads, kv_heads)]
        turned = [self._buffer(padded, n * dim) for n in (heads, kv_heads)]
        attended = self._buffer(padded, heads * dim)
        self._table = table = model.model.rotary_table(None, torch.tensor([self._cache.length - 1]))
        for number, layer in enumerate(layers):
            attention = layer.self_attn
            self._norm(self._hidden, layer.input_layernorm, x)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            for projection, out in zip(projections, qkv, strict=True):
                self._linear(x, projection.weight, out, joined=out is not qkv[2])
            for projection, out in zip(projections, qkv, strict=True):
                if projection.bias is not None:
                    self._add(out, projection.bias, 0)
            for source, out, norm, n in zip(qkv, turned, ("q_norm", "k_norm"), (heads, kv_heads), strict=False):
                self._rope(source, out, getattr(attention, norm, None), n, dim, table, joined=out is turned[0])
            self._attend(number, turned, qkv[2], attended, attention.scaling, heads, kv_heads, dim)
            self._linear(attended, attention.o_proj.weight, y)
            if attention.o_proj.bias is not None:
                self._add(y, attention.o_proj.bias, 0)
            self._add(self._hidden, y, hidden)
            self._norm(self._hidden, layer.post_attention_layernorm, x)
            if hasattr(layer.mlp, "gate"):
                self._experts(number, layer.mlp, x, y)
            else:
                self._mlp(layer.mlp, x, y)
            self._add(self._hidden, y, hidden)
        self._norm(self._hidden, model.model.norm, x)
        self._linear(x, model.lm_head.weight, self._logits)

    def _norm(self, x: torch.Tensor, norm: Any, out: torch.Tensor) -> None:
        eps = _scalar(norm.variance_epsilon).data_ptr()
        args = (x.data_ptr(), norm.weight.data_ptr(), out.data_ptr(), 0, Size("rows"), x.shape[1], eps, ROWS)
        self._program.add(cpu_kernels.rms_norm_forward, Size("rows_tasks"), args)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, joined: bool = False) -> None:
        n, k = weight.shape
        panel = _panel(n)
        args = (x.data_ptr(), weight.data_ptr(), out.data_ptr(), 0, BLOCK, k, n, panel, SGEMM, SERIAL, Size("blocks"))
        self._program.add(cpu_linear.linear_blocks, Size("blocks", -(-n // panel)), args, joined)

    def _add(self, x: torch.Tensor, y: torch.Tensor, stride: int) -> None:
        self._program.add(cpu_program.add_rows, Size("rows_tasks"), (x.data_ptr(), y.data_ptr(), Size("rows"), x.shape[1], stride, ROWS))

    def _rope(self, x: torch.Tensor, out: torch.Tensor, norm: Any, heads: int, dim: int, table: Any, joined: bool) -> None:
        weight, eps = (0, 0.0) if norm is None else (norm.weight.data_ptr(), norm.variance_epsilon)
        where = (x.data_ptr(), weight, out.data_ptr(), 0, int(self._position.ctypes.data), *(t.data_ptr() for t in table))
        self._program.add(cpu_kernels.norm_rope_forward, Size("rows_tasks"), (*where, Size("rows"), heads, dim, _scalar(eps).data_ptr(), ROWS), joined)

    def _attend(self, layer: int, turned: list[torch.Tensor], v: torch.Tensor, out: torch.Tensor, scale: float, heads: int, kv_heads: int, dim: int) -> None:
        cache, length = self._cache, self._cache.length
        places = (int(self._slot.ctypes.data), int(self._position.ctypes.data), cache.k[layer].data_ptr(), cache.v[layer].data_ptr())
        args: tuple[Any, ...] = (turned[1].data_ptr(), v.data_ptr(), *places, Size("rows"), kv_heads, dim, length)
        self._program.add(cpu_attention.cache_write, Size("rows"), args)
        strides = (dim * length, kv_heads * dim * length, length, length * dim, kv_heads * length * dim)
        args = (turned[0].data_ptr(), cache.k[layer].data_ptr(), cache.v[layer].data_ptr(), out.data_ptr(), 0, int(self._tasks.ctypes.data))
        args = (*args, _scalar(scale).data_ptr(), heads, kv_heads, dim, *strides, Size("width"))
        self._program.add(cpu_attention.attention_forward, Size("rows", kv_heads), args)

    def _mlp(self, mlp: Any, x: torch.Tensor, out: torch.Tensor) -> None:
        wide, padded = mlp.gate_proj.weight.shape[0], len(x)
        gate, up, inner = (self._shared(f"mlp{i}", padded, wide) for i in range(3))
        self._linear(x, mlp.gate_proj.weight, gate, joined=True)
        self._linear(x, mlp.up_proj.weight, up)
        for projection, made in ((mlp.gate_proj, gate), (mlp.up_proj, up)):
            if projection.bias is not None:
                self._add(made, projection.bias, 0)
        args = (gate.data_ptr(), up.data_ptr(), inner.data_ptr(), Size("rows"), wide, wide, wide, ROWS)
        self._program.add(cpu_kernels.silu_mul_forward, Size("rows_tasks"), args)
        self._linear(inner, mlp.down_proj.weight, out)
        if mlp.down_proj.bias is not None:
            self._add(out, mlp.down_proj.bias, 0)

    def _experts(self, number: int, mlp: Any, x: torch.Tensor, out: torch.Tensor) -> None:
        gate, gate_up, down, program, k = mlp.gate, mlp.experts.gate_up_proj, mlp.experts.down_proj, self._program, self._top_k
        count, wide, hidden = len(gate_up), down.shape[2], down.shape[1]
        most = self.rows * k // BLOCK + min(count, self.rows * k)  # blocks, were every expert's last one nearly empty
        assert self._chosen is not None, "made with the first layer of experts"
        logits, prob = (self._shared(name, len(x), count) for name in ("logits", "prob"))
        weight = self._shared("weight", self.rows, k)
        slot, owner = self._shared("slot", self.rows * k, dtype=torch.int64), self._shared("owner", most, dtype=torch.int64)
        first, counts = self._shared("first", count + 1, dtype=torch.int64), self._shared("counts", count, dtype=torch.int64)
        rows, up, inner, y = (self._shared(f"experts{i}", most * BLOCK, n) for i, n in enumerate((hidden, 2 * wide, wide, hidden)))
        index = self._chosen[number].data_ptr()
        self._linear(x, gate.weight, logits)
        args: tuple[Any, ...] = (logits.data_ptr(), prob.data_ptr(), index, weight.data_ptr(), Size("rows"), count, k, int(gate.norm_topk_prob), ROWS)
        program.add(cpu_routing.route, Size("rows_tasks"), args)
        program.add(cpu_routing.sort_by_expert, 1, (index, slot.data_ptr(), first.data_ptr(), counts.data_ptr(), Size("routed"), count, BLOCK))
        panels = [-(-n // _panel(n)) for n in (2 * wide, hidden)]
        targets = (program.next_block(2), panels[0], program.next_block(3), program.next_block(4), panels[1])
        program.add(cpu_program.plan_experts, 1, (first.data_ptr(), count, owner.data_ptr(), *targets, BLOCK, ROWS), joined=True)
        args = (x.data_ptr(), slot.data_ptr(), rows.data_ptr(), 0, Size("routed"), k, hidden, ROWS)
        program.add(cpu_routing.scatter_rows, Size("routed_tasks"), args)
        sizes = (BLOCK, hidden, 2 * wide, _panel(2 * wide), SGEMM, SERIAL, 0)
        program.add(cpu_linear.linear_blocks, 0, (rows.data_ptr(), gate_up.data_ptr(), up.data_ptr(), owner.data_ptr(), *sizes))
        args = (up.data_ptr(), up.data_ptr() + wide * 4, inner.data_ptr(), 0, wide, 2 * wide, 2 * wide, ROWS)
        program.add(cpu_kernels.silu_mul_forward, 0, args)
        sizes = (BLOCK, wide, hidden, _panel(hidden), SGEMM, SERIAL, 0)
        program.add(cpu_linear.linear_blocks, 0, (inner.data_ptr(), down.data_ptr(), y.data_ptr(), owner.data_ptr(), *sizes))
        args = (y.data_ptr(), slot.data_ptr(), weight.data_ptr(), out.data_ptr(), Size("rows"), k, hidden, ROWS)
        program.add(cpu_routing.combine_rows, Size("rows_tasks"), args)

    def _shared(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A buffer that all layers use in turn."""
        key = (name, shape)
        if key not in self._named:
            self._named[key] = self._buffer(*shape, dtype=dtype)
        return self._named[key]
