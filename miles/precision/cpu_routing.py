"""Compiled CPU kernels for mixtures of experts: the router's choice, rows sorted into blocks of one expert, and back."""

from __future__ import annotations

from numba import carray

from miles.precision.compiled import ONE, ZERO, f32, i64, kernel
from miles.precision.llvm import dot, exp, fma, max_of, take


@kernel
def route(block):
    """Softmax over the experts and the top k, ties to the lower expert.

    args: logits [T, E], prob [T, E], index i64 [T, k], weight [T, k], T, E, k, normalise (0 or 1), rows a task.
    weight = prob of the chosen, divided by their sum (added in order of choice) where normalise is 1.
    """
    b = carray(block, 11)
    rows, experts, k, per = b[6], b[7], b[8], b[10]
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        for row in range(task * per, min(rows, (task + 1) * per)):
            logits = f32(b[2] + row * experts * 4, experts)
            prob = f32(b[3] + row * experts * 4, experts)
            index = i64(b[4] + row * k * 8, k)
            weight = f32(b[5] + row * k * 4, k)
            top = max_of(b[2] + row * experts * 4, experts)
            total = ZERO
            for e in range(experts):
                prob[e] = exp(logits[e] - top)
                total += prob[e]
            for e in range(experts):
                prob[e] = prob[e] / total
            chosen = ZERO
            for c in range(k):
                best = -1
                for e in range(experts):
                    taken = False
                    for other in range(c):
                        taken |= index[other] == e
                    if not taken and (best < 0 or prob[e] > prob[best]):
                        best = e
                index[c] = best
                weight[c] = prob[best]
                chosen += prob[best]
            if b[9] != 0:
                for c in range(k):
                    weight[c] = weight[c] / chosen


@kernel
def sort_by_expert(block):
    """Where each routed row goes, in blocks that hold rows of one expert; an expert's blocks lie together, its rows keep their order. One task.

    args: index i64 [T k], slot i64 [T k] (out: padded row), first i64 [E + 1] (out: first block of every expert), count i64 [E], T k, E,
    rows a block.
    """
    b = carray(block, 9)
    if take(b.ctypes.data) > 0:
        return
    n, experts, size = b[6], b[7], b[8]
    index = i64(b[2], n)
    slot = i64(b[3], n)
    first = i64(b[4], experts + 1)
    count = i64(b[5], experts)
    for e in range(experts):
        count[e] = 0
    for r in range(n):
        slot[r] = count[index[r]]
        count[index[r]] += 1
    first[0] = 0
    for e in range(experts):
        first[e + 1] = first[e] + (count[e] + size - 1) // size
    for r in range(n):
        slot[r] += first[index[r]] * size


@kernel
def scatter_rows(block):
    """out[slot[r]] = x[r // k] (times weight[r] where given). args: x [T, n], slot i64 [T k], out [padded, n], weight (0: none), T k, k, n, rows a task."""
    b = carray(block, 10)
    rows, k, n, per = b[6], b[7], b[8], b[9]
    slot = i64(b[3], rows)
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        for row in range(task * per, min(rows, (task + 1) * per)):
            x = f32(b[2] + (row // k) * n * 4, n)
            out = f32(b[4] + slot[row] * n * 4, n)
            if b[5] != 0:
                w = f32(b[5], rows)[row]
                for i in range(n):
                    out[i] = x[i] * w
            else:
                for i in range(n):
                    out[i] = x[i]


@kernel
def combine_rows(block):
    """out[t] = sum over c = 0, 1, ... of weight[t, c] y[slot[t, c]] by fma in that order (weight 0: of y alone).

    args: y [padded, n], slot i64 [T, k], weight [T, k] (0: none), out [T, n], T, k, n, rows a task.
    """
    b = carray(block, 10)
    rows, k, n, per = b[6], b[7], b[8], b[9]
    slot = i64(b[3], rows * k)
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        for row in range(task * per, min(rows, (task + 1) * per)):
            out = f32(b[5] + row * n * 4, n)
            for i in range(n):
                out[i] = ZERO
            for c in range(k):
                y = f32(b[2] + slot[row * k + c] * n * 4, n)
                w = ONE
                if b[4] != 0:
                    w = f32(b[4], rows * k)[row * k + c]
                for i in range(n):
                    out[i] = fma(w, y[i], out[i])


@kernel
def route_weight_backward(block):
    """grad_weight[r] = grad[r // k] . y[slot[r]]. args: grad [T, n], y [padded, n], slot i64 [T k], grad_weight, T k, k, n, rows a task."""
    b = carray(block, 10)
    rows, k, n, per = b[6], b[7], b[8], b[9]
    slot = i64(b[4], rows)
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        for row in range(task * per, min(rows, (task + 1) * per)):
            f32(b[5], rows)[row] = dot(b[2] + (row // k) * n * 4, b[3] + slot[row] * n * 4, n)
