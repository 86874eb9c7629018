"""Compiled CPU kernels for causal attention, fp32: one program for a query, whoever asks (packed batch, prefill, decode).

For query i of a sequence, its head h and the keys 0..i of that sequence:
  score[j] = scale * (chain of fma over d = 0, 1, ... of q[d] k[j, d]);  top = max score;  p[j] = exp(score[j] - top);
  out[d] = (chain of fma over j = 0, 1, ... of p[j] v[j, d]) / (sum of p in 16 lanes by j modulo 16, then a fixed tree).
Nothing in it depends on how queries are grouped into tiles or tasks. Keys are read transposed ([D, keys], so that lanes are keys):
key lines may be read up to 15 elements past the last key, which must be readable memory; what is read there is not used.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from miles.precision.compiled import ONE, ZERO, f32, i64, kernel
from miles.precision.llvm import exp, fma, make_tile, max_of, softmax_row, take

tile_14, tile_12, tile_11 = make_tile(1, 4), make_tile(1, 2), make_tile(1, 1)
tile_24, tile_22, tile_21 = make_tile(2, 4), make_tile(2, 2), make_tile(2, 1)
tile_44, tile_42, tile_41 = make_tile(4, 4), make_tile(4, 2), make_tile(4, 1)


@njit
def gemm(a, a_row, a_k, b, b_k, c, c_row, m, n, k, accumulate):
    """C[m, n] (+)= A[m, k] B[k, n]; addresses in bytes, strides in elements; each element one chain of fma over k."""
    row = 0
    while row < m:
        step = 4 if m - row >= 4 else (2 if m - row >= 2 else 1)
        at_a = a + row * a_row * 4
        at_c = c + row * c_row * 4
        col = 0
        while col + 64 <= n:
            if step == 4:
                tile_44(at_a, a_row, a_k, b + col * 4, b_k, at_c + col * 4, c_row, k, accumulate)
            elif step == 2:
                tile_24(at_a, a_row, a_k, b + col * 4, b_k, at_c + col * 4, c_row, k, accumulate)
            else:
                tile_14(at_a, a_row, a_k, b + col * 4, b_k, at_c + col * 4, c_row, k, accumulate)
            col += 64
        if col + 32 <= n:
            if step == 4:
                tile_42(at_a, a_row, a_k, b + col * 4, b_k, at_c + col * 4, c_row, k, accumulate)
            elif step == 2:
                tile_22(at_a, a_row, a_k, b + col * 4, b_k, at_c + col * 4, c_row, k, accumulate)
            else:
                tile_12(at_a, a_row, a_k, b + col * 4, b_k, at_c + col * 4, c_row, k, accumulate)
            col += 32
        if col + 16 <= n:
            if step == 4:
                tile_41(at_a, a_row, a_k, b + col * 4, b_k, at_c + col * 4, c_row, k, accumulate)
            elif step == 2:
                tile_21(at_a, a_row, a_k, b + col * 4, b_k, at_c + col * 4, c_row, k, accumulate)
            else:
                tile_11(at_a, a_row, a_k, b + col * 4, b_k, at_c + col * 4, c_row, k, accumulate)
            col += 16
        if col < n:  # the last columns where n is no multiple of 16: the same chains, one by one
            for i in range(step):
                left = f32(at_a + i * a_row * 4, (k - 1) * a_k + 1)
                out = f32(at_c + i * c_row * 4, n)
                for x in range(col, n):
                    right = f32(b + x * 4, (k - 1) * b_k + 1)
                    total = out[x] if accumulate != 0 else ZERO
                    for j in range(k):
                        total = fma(left[j * a_k], right[j * b_k], total)
                    out[x] = total
        row += step


@njit(inline="always")
def up16(n):
    return (n + 15) // 16 * 16


@njit
def attend(q, q_row, k_lines, k_line, v, out, o_row, lse, lse_step, queries, first, group, dim, scale, score, width):
    """`queries` x `group` query rows of one kv head; query i sees keys 0 .. first + i.

    q, out: address of row (query 0, head 0 of the group); rows of a query are adjacent ([group, D]), queries q_row apart. k_lines: address
    of K transposed [D, k_line]; v: rows of V, `dim` apart, v_row given by width's caller. score: work, 4 x group lines of `width`.
    """
    v_row = dim
    i = 0
    while i < queries:
        step = 4 if queries - i >= 4 else 1
        seen = first + i + step  # keys that the last query of this step sees
        for s in range(step):
            gemm(q + (i + s) * q_row * 4, dim, 1, k_lines, k_line, score + s * group * width * 4, width, group, up16(seen), dim, 0)
        for s in range(step):
            mine = first + i + s + 1
            for g in range(group):
                at = score + (s * group + g) * width * 4
                line = f32(at, up16(seen))
                for j in range(mine):
                    line[j] = line[j] * scale
                top = max_of(at, mine)
                total = softmax_row(at, mine, top, up16(mine))
                if lse != 0:
                    f32(lse + ((i + s) * lse_step + g) * 4, 1)[0] = top + np.float32(np.log(np.float64(total)))
                f32(score + (4 * group * width + s * group + g) * 4, 1)[0] = total
        common = first + i + 1
        # the keys that all queries of the step see together, then each query's own last ones: one chain over j for every element
        for g in range(group):
            gemm(score + g * width * 4, group * width, 1, v, v_row, out + (i * o_row + g * dim) * 4, o_row, step, dim, common, 0)
        for s in range(step):
            if s > 0:
                gemm(
                    score + (s * group * width + common) * 4, width, 1, v + common * v_row * 4, v_row,
                    out + (i + s) * o_row * 4, dim, group, dim, s, 1,
                )  # fmt: skip
            for g in range(group):
                total = f32(score + (4 * group * width + s * group + g) * 4, 1)[0]
                row = f32(out + ((i + s) * o_row + g * dim) * 4, dim)
                inverse = ONE / total
                for d in range(dim):
                    row[d] = row[d] * inverse
        i += step


@kernel
def attention_forward(block):
    """Tasks: (sequence, kv head, run of queries), from a table.

    args: q [T, H, D], k lines, v, out [T, H, D], lse [T, H] (0: none), table i64 [tasks, 4] (first query row, queries, keys before the
    first query, slot), scale (address), H, Hkv, D, k: head stride, slot stride, line stride; v: head stride, slot stride; width of work.
    """
    b = carray(block, 18)
    heads, kv_heads, dim = b[9], b[10], b[11]
    k_head, k_slot, k_line, v_head, v_slot, width = b[12], b[13], b[14], b[15], b[16], b[17]
    scale = f32(b[8], 1)[0]
    group = heads // kv_heads
    table = i64(b[7], b[1] // kv_heads * 4)
    work = np.empty(4 * group * width + 4 * group, np.float32)
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        line = task // kv_heads * 4
        head = task % kv_heads
        row, slot = table[line], table[line + 3]
        spot = (row * heads + head * group) * dim * 4
        lse = b[6] + (row * heads + head * group) * 4 if b[6] != 0 else 0
        attend(
            b[2] + spot, heads * dim, b[3] + (slot * k_slot + head * k_head) * 4, k_line, b[4] + (slot * v_slot + head * v_head) * 4,
            b[5] + spot, heads * dim, lse, heads, table[line + 1], table[line + 2], group, dim, scale, work.ctypes.data, width,
        )  # fmt: skip


@njit(inline="always")
def softmax_scaled(p, n, scale, lse):
    """p[j] = exp(p[j] scale - lse) in place."""
    for j in range(n):
        p[j] = exp(p[j] * scale - lse)


@kernel
def attention_backward(block):
    """Tasks: (sequence, kv head). dV, dK are summed over the group's heads and over queries in one fixed order.

    args: q [T, H, D], K lines [Hkv, D, line], V lines [Hkv, D, line], k [Hkv, T, D], grad [T, H, D], out [T, H, D], lse [T, H],
    dq [T, H, D], dk [Hkv, T, D], dv [Hkv, T, D] (zeroed), table i64 [sequences, 2] (first row, length), scale (address), H, Hkv, D, T,
    line, greatest length rounded up to 16.
    """
    b = carray(block, 20)
    heads, kv_heads, dim, rows, k_line, width = b[14], b[15], b[16], b[17], b[18], b[19]
    scale = f32(b[13], 1)[0]
    group = heads // kv_heads
    table = i64(b[12], b[1] // kv_heads * 2)
    size = 16
    prob = np.empty(size * width, np.float32)
    grad_score = np.empty(size * width, np.float32)
    at_p, at_s = prob.ctypes.data, grad_score.ctypes.data
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        line = task // kv_heads * 2
        head = task % kv_heads
        row, length = table[line], table[line + 1]
        k_lines = b[3] + (head * dim * k_line + row) * 4
        v_lines = b[4] + (head * dim * k_line + row) * 4
        at_k = b[5] + (head * rows + row) * dim * 4
        at_dk = b[10] + (head * rows + row) * dim * 4
        at_dv = b[11] + (head * rows + row) * dim * 4
        for first in range(0, length, size):
            queries = min(size, length - first)
            seen = first + queries
            for g in range(group):
                at_row = (row + first) * heads + head * group + g
                spot = at_row * dim * 4
                gemm(b[2] + spot, heads * dim, 1, k_lines, k_line, at_p, width, queries, up16(seen), dim, 0)
                gemm(b[6] + spot, heads * dim, 1, v_lines, k_line, at_s, width, queries, up16(seen), dim, 0)
                for i in range(queries):
                    mine = first + i + 1
                    p = f32(at_p + i * width * 4, width)
                    s = f32(at_s + i * width * 4, width)
                    lse = f32(b[8] + (at_row + i * heads) * 4, 1)[0]
                    grad = f32(b[6] + spot + i * heads * dim * 4, dim)
                    out = f32(b[7] + spot + i * heads * dim * 4, dim)
                    delta = ZERO
                    for d in range(dim):
                        delta = fma(grad[d], out[d], delta)
                    softmax_scaled(p, mine, scale, lse)
                    for j in range(mine):
                        s[j] = p[j] * (s[j] - delta) * scale
                    for j in range(mine, seen):
                        p[j] = ZERO
                        s[j] = ZERO
                gemm(at_s, width, 1, at_k, dim, b[9] + spot, heads * dim, queries, dim, seen, 0)
                gemm(at_p, 1, width, b[6] + spot, heads * dim, at_dv, dim, seen, dim, queries, 1)
                gemm(at_s, 1, width, b[2] + spot, heads * dim, at_dk, dim, seen, dim, queries, 1)


@kernel
def cache_write(block):
    """args: k [T, Hkv, D], v [T, Hkv, D], slot i64 [T] (-1: skip), position i64 [T], K cache [slots, Hkv, D, L], V cache [slots, Hkv, L, D],
    T, Hkv, D, L."""
    b = carray(block, 12)
    rows, heads, dim, length = b[8], b[9], b[10], b[11]
    slot, position = i64(b[4], rows), i64(b[5], rows)
    while True:
        row = take(b.ctypes.data)
        if row >= b[1]:
            break
        if slot[row] < 0:
            continue
        for head in range(heads):
            base = (slot[row] * heads + head) * dim * length
            k = f32(b[2] + (row * heads + head) * dim * 4, dim)
            v = f32(b[3] + (row * heads + head) * dim * 4, dim)
            k_out = f32(b[6] + (base + position[row]) * 4, (dim - 1) * length + 1)
            v_out = f32(b[7] + (base + position[row] * dim) * 4, dim)
            for d in range(dim):
                k_out[d * length] = k[d]
                v_out[d] = v[d]
