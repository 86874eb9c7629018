"""Compiled CPU kernels for fp32: RMS norm, SiLU times up, rotary embedding (with the norm of a head's query or key)."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from miles.precision.compiled import ONE, ZERO, f32, i64, kernel
from miles.precision.llvm import dot, exp, fma, take


@njit(inline="always")
def norm_scale(x, n, eps):
    """1 / sqrt(mean(x^2) + eps) of the n fp32 at address x."""
    return ONE / np.sqrt(dot(x, x, n) / np.float32(n) + eps)


@kernel
def rms_norm_forward(block):
    """args: x, weight, out, scale (0: not wanted), rows, n, eps (address), rows a task."""
    b = carray(block, 10)
    rows, n, per, eps = b[6], b[7], b[9], f32(b[8], 1)[0]
    weight = f32(b[3], n)
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        for row in range(task * per, min(rows, (task + 1) * per)):
            at = b[2] + row * n * 4
            scale = norm_scale(at, n, eps)
            x = f32(at, n)
            out = f32(b[4] + row * n * 4, n)
            for i in range(n):
                out[i] = weight[i] * (x[i] * scale)
            if b[5] != 0:
                f32(b[5], rows)[row] = scale


@kernel
def rms_norm_backward(block):
    """args: x, weight, grad, scale, grad_x, grad_weight per task [tasks, n], rows, n, rows a task."""
    b = carray(block, 11)
    rows, n, per = b[8], b[9], b[10]
    weight = f32(b[3], n)
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        part = f32(b[7] + task * n * 4, n)
        for i in range(n):
            part[i] = ZERO
        for row in range(task * per, min(rows, (task + 1) * per)):
            x = f32(b[2] + row * n * 4, n)
            grad = f32(b[4] + row * n * 4, n)
            out = f32(b[6] + row * n * 4, n)
            scale = f32(b[5], rows)[row]
            for i in range(n):
                out[i] = weight[i] * grad[i]
            inner = dot(b[6] + row * n * 4, b[2] + row * n * 4, n) * scale * scale / np.float32(n)
            for i in range(n):
                out[i] = scale * (out[i] - x[i] * inner)
                part[i] = fma(grad[i], x[i] * scale, part[i])


@kernel
def silu_mul_forward(block):
    """args: gate, up, out, rows, n, gate row stride, up row stride, rows a task. out = gate / (1 + exp(-gate)) * up."""
    b = carray(block, 10)
    rows, n, per = b[5], b[6], b[9]
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        for row in range(task * per, min(rows, (task + 1) * per)):
            gate = f32(b[2] + row * b[7] * 4, n)
            up = f32(b[3] + row * b[8] * 4, n)
            out = f32(b[4] + row * n * 4, n)
            for i in range(n):
                out[i] = gate[i] / (ONE + exp(-gate[i])) * up[i]


@kernel
def silu_mul_backward(block):
    """args: gate, up, grad, grad_gate, grad_up, rows, n, stride of gate, up, grad_gate and grad_up rows, rows a task."""
    b = carray(block, 11)
    rows, n, stride, per = b[7], b[8], b[9], b[10]
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        for row in range(task * per, min(rows, (task + 1) * per)):
            gate = f32(b[2] + row * stride * 4, n)
            up = f32(b[3] + row * stride * 4, n)
            grad = f32(b[4] + row * n * 4, n)
            grad_gate = f32(b[5] + row * stride * 4, n)
            grad_up = f32(b[6] + row * stride * 4, n)
            for i in range(n):
                s = ONE / (ONE + exp(-gate[i]))
                g = grad[i]
                grad_up[i] = g * gate[i] * s
                grad_gate[i] = g * up[i] * s * (ONE + gate[i] * (ONE - s))


@kernel
def norm_rope_forward(block):
    """Per head: RMS norm where there is a weight, then rotary embedding.

    args: x [T, H, D], weight (0: none), out, scale [T, H] (0: not wanted), position i64 [T], cos [P, D/2], sin, T, H, D, eps, rows a task.
    out[i] = y[i] cos - y[i + D/2] sin, out[i + D/2] = y[i + D/2] cos + y[i] sin  (rotate_half of transformers).
    """
    b = carray(block, 14)
    rows, heads, dim, per = b[9], b[10], b[11], b[13]
    half = dim // 2
    eps = f32(b[12], 1)[0]
    position = i64(b[6], rows)
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        for row in range(task * per, min(rows, (task + 1) * per)):
            cos = f32(b[7] + position[row] * half * 4, half)
            sin = f32(b[8] + position[row] * half * 4, half)
            for head in range(heads):
                spot = (row * heads + head) * dim * 4
                first = f32(b[2] + spot, half)
                second = f32(b[2] + spot + half * 4, half)
                out_first = f32(b[4] + spot, half)
                out_second = f32(b[4] + spot + half * 4, half)
                if b[3] != 0:
                    scale = norm_scale(b[2] + spot, dim, eps)
                    if b[5] != 0:
                        f32(b[5], rows * heads)[row * heads + head] = scale
                    w_first = f32(b[3], half)
                    w_second = f32(b[3] + half * 4, half)
                    for i in range(half):
                        u = w_first[i] * (first[i] * scale)
                        v = w_second[i] * (second[i] * scale)
                        out_first[i] = u * cos[i] - v * sin[i]
                        out_second[i] = v * cos[i] + u * sin[i]
                else:
                    for i in range(half):
                        u = first[i]
                        v = second[i]
                        out_first[i] = u * cos[i] - v * sin[i]
                        out_second[i] = v * cos[i] + u * sin[i]


@kernel
def norm_rope_backward(block):
    """args: x, weight (0: none), grad, scale, position, cos, sin, grad_x, grad_weight per task [tasks, D], T, H, D, rows a task."""
    b = carray(block, 15)
    rows, heads, dim, per = b[11], b[12], b[13], b[14]
    half = dim // 2
    position = i64(b[6], rows)
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        if b[3] != 0:
            part = f32(b[10] + task * dim * 4, dim)
            for i in range(dim):
                part[i] = ZERO
        for row in range(task * per, min(rows, (task + 1) * per)):
            cos = f32(b[7] + position[row] * half * 4, half)
            sin = f32(b[8] + position[row] * half * 4, half)
            for head in range(heads):
                spot = (row * heads + head) * dim * 4
                grad_first = f32(b[4] + spot, half)
                grad_second = f32(b[4] + spot + half * 4, half)
                out_first = f32(b[9] + spot, half)
                out_second = f32(b[9] + spot + half * 4, half)
                for i in range(half):
                    g = grad_first[i]
                    h = grad_second[i]
                    out_first[i] = g * cos[i] + h * sin[i]
                    out_second[i] = h * cos[i] - g * sin[i]
                if b[3] != 0:
                    scale = f32(b[5], rows * heads)[row * heads + head]
                    weight = f32(b[3], dim)
                    x = f32(b[2] + spot, dim)
                    out = f32(b[9] + spot, dim)
                    part = f32(b[10] + task * dim * 4, dim)
                    for i in range(dim):
                        part[i] = fma(out[i], x[i] * scale, part[i])
                        out[i] = out[i] * weight[i]
                    inner = dot(b[9] + spot, b[2] + spot, dim) * scale * scale / np.float32(dim)
                    for i in range(dim):
                        out[i] = scale * (out[i] - x[i] * inner)
