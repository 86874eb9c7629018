"""Compiled CPU kernels for log-probs, entropy and sampling: one row statistics for all three, so that their bits agree."""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit

from miles.precision.compiled import ONE, ZERO, f32, i64, kernel
from miles.precision.llvm import bits_of, exp, exp_sums, max_of, softmax_row, take

CHUNK = 1024


@njit(inline="always")
def row_statistics(at, n, temperature, pair):
    """(greatest of x / temperature, log of sum exp(x / temperature - greatest)); pair: address of 2 fp32 to work in."""
    top = max_of(at, n) / temperature
    exp_sums(at, n, temperature, top, pair)
    return top, np.float32(math.log(np.float64(f32(pair, 2)[0])))


@njit(inline="always")
def one_logprob(x, temperature, top, log_sum):
    """log softmax of one logit, never below the least fp32 (SGLang clamps too)."""
    return max(x / temperature - top - log_sum, np.float32(-3.4028235e38))


@kernel
def logprob_forward(block):
    """args: logits [T, V] with row stride, target i64, temperature [T], logprob, entropy, lse (out [T]), T, V, stride."""
    b = carray(block, 11)
    rows, n, stride = b[8], b[9], b[10]
    target, temperature = i64(b[3], rows), f32(b[4], rows)
    logprob, entropy, lse = f32(b[5], rows), f32(b[6], rows), f32(b[7], rows)
    pair = np.empty(2, np.float32)
    while True:
        row = take(b.ctypes.data)
        if row >= b[1]:
            break
        at = b[2] + row * stride * 4
        top, log_sum = row_statistics(at, n, temperature[row], pair.ctypes.data)
        logprob[row] = one_logprob(f32(at, n)[target[row]], temperature[row], top, log_sum)
        entropy[row] = log_sum - pair[1] / pair[0]
        lse[row] = top + log_sum


@kernel
def logprob_backward(block):
    """args: logits, target, temperature, entropy, lse, grad of logprob, grad of entropy, grad of logits (out, contiguous), T, V, stride.

    d logprob / d z_v = [v = target] - p_v; d entropy / d z_v = -p_v (log p_v + entropy); z = logits / temperature.
    """
    b = carray(block, 13)
    rows, n, stride = b[10], b[11], b[12]
    target, temperature = i64(b[3], rows), f32(b[4], rows)
    entropy, lse = f32(b[5], rows), f32(b[6], rows)
    grad_logprob, grad_entropy = f32(b[7], rows), f32(b[8], rows)
    while True:
        row = take(b.ctypes.data)
        if row >= b[1]:
            break
        x = f32(b[2] + row * stride * 4, n)
        out = f32(b[9] + row * n * 4, n)
        t = temperature[row]
        g = -grad_logprob[row] / t
        h = -grad_entropy[row] / t
        shift = lse[row]
        ent = entropy[row]
        if g == ZERO and h == ZERO:
            for v in range(n):
                out[v] = ZERO
        elif h == ZERO:
            for v in range(n):
                out[v] = g * exp(x[v] / t - shift)
        else:
            for v in range(n):
                y = x[v] / t - shift
                p = exp(y)
                out[v] = p * (g + h * ((y if p > ZERO else ZERO) + ent))
        out[target[row]] -= g


@njit
def uniform(seed, position):
    """A double in [0, 1) from (seed, position): splitmix64 (Steele, Lea, Flood 2014) of seed and of position, mixed once more.

    mix(z): z ^= z >> 30; z *= 0xBF58476D1CE4E5B9; z ^= z >> 27; z *= 0x94D049BB133111EB; z ^= z >> 31.
    u = (mix(mix(seed + G) + (position + 1) G) >> 11) 2^-53 with G = 0x9E3779B97F4A7C15, all modulo 2^64.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    z = mix(np.uint64(seed) + golden)
    z = mix(z + (np.uint64(position) + np.uint64(1)) * golden)
    return np.float64(z >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit
def mix(z):
    """splitmix64's finaliser."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(inline="always")
def first_max(x, n):
    best = 0
    for v in range(1, n):
        if x[v] > x[best]:
            best = v
    return best


@njit
def weights(x, start, stop, temperature, top, out):
    """out[v] = exp(x[v] / temperature - top) for v = start .. stop - 1, at out[0] on; returns their fp32 sum."""
    n = stop - start
    for v in range(n):
        out[v] = x[start + v] / temperature
    return softmax_row(out.ctypes.data, n, top, (n + 15) // 16 * 16)


@njit
def draw_in_order(x, n, temperature, top, u, work):
    """Inverse CDF over all tokens in their order: sums of chunks first (fp64 over chunks), then token by token in the chunk that holds u.

    Where rounding leaves none in that chunk, its last token of positive weight.
    """
    chunks = (n + CHUNK - 1) // CHUNK
    total = 0.0
    for c in range(chunks):
        total += np.float64(weights(x, c * CHUNK, min(n, (c + 1) * CHUNK), temperature, top, work))
    goal = u * total
    before = 0.0
    chunk = 0
    for c in range(chunks):
        part = np.float64(weights(x, c * CHUNK, min(n, (c + 1) * CHUNK), temperature, top, work))
        if part > 0.0:
            chunk = c
            if before + part > goal:
                break
            before += part
    size = min(n, (chunk + 1) * CHUNK) - chunk * CHUNK
    weights(x, chunk * CHUNK, chunk * CHUNK + size, temperature, top, work)
    last = 0
    for v in range(size):
        if work[v] > ZERO:
            last = v
            before += np.float64(work[v])
            if before > goal:
                break
    return chunk * CHUNK + last


@njit
def draw_filtered(weight, n, top_k, top_p, u):
    """Draw among the tokens that top-k and top-p both keep.

    Sorted by weight falling, ties by token rising, a token stays while its rank is below top_k and the weight before it is at most
    top_p of the total (the first one always stays): SGLang's joint filter. Inverse CDF over the kept ones in sorted order (fp64).
    A histogram over the leading bits of the weights finds those that can be kept at all; a heap sorts these.
    """
    count = np.zeros(2048, np.int64)
    mass = np.zeros(2048, np.float64)
    total = 0.0
    for v in range(n):
        w = weight[v]
        bucket = (bits_of(w) >> 20) & 2047  # a NaN's sign must not lead outside
        count[bucket] += 1
        mass[bucket] += w
    for bucket in range(2048):
        total += mass[bucket]
    limit = top_p * total
    least = 2047
    many = 0
    much = 0.0
    while least > 0 and many < top_k and much <= limit * 1.000001:
        many += count[least]
        much += mass[least]
        least -= 1
    heap = np.empty(max(many, 1), np.int64)
    size = 0
    for v in range(n):
        if bits_of(weight[v]) >> 20 > least and weight[v] > ZERO:
            heap[size] = v
            size += 1
    for start in range(size // 2 - 1, -1, -1):
        sift(heap, weight, start, size)
    kept = np.empty(size, np.int64)
    number = 0
    before = 0.0
    while size > 0 and number < top_k and (number == 0 or before <= limit):
        best = heap[0]
        kept[number] = best
        number += 1
        before += np.float64(weight[best])
        size -= 1
        heap[0] = heap[size]
        sift(heap, weight, 0, size)
    goal = u * before
    running = 0.0
    for c in range(number):
        running += np.float64(weight[kept[c]])
        if running > goal:
            return kept[c]
    return kept[number - 1] if number > 0 else 0  # nothing has a weight: the logits hold NaN, and so will the log-prob


@njit
def sift(heap, weight, start, size):
    """Restore the heap order (greatest weight first, then the smaller token) below `start`."""
    node = start
    while True:
        child = 2 * node + 1
        if child >= size:
            return
        other = child + 1
        if other < size and ahead(heap[other], heap[child], weight):
            child = other
        if not ahead(heap[child], heap[node], weight):
            return
        heap[node], heap[child] = heap[child], heap[node]
        node = child


@njit(inline="always")
def ahead(a, b, weight):
    return weight[a] > weight[b] or (weight[a] == weight[b] and a < b)


@kernel
def sample_rows(block):
    """args: logits, temperature, top_k i64, top_p, seed i64, position i64, token i64 (out), logprob (out), B, V, row stride."""
    b = carray(block, 13)
    rows, n, stride = b[10], b[11], b[12]
    temperatures, top_ks, top_ps = f32(b[3], rows), i64(b[4], rows), f32(b[5], rows)
    seeds, positions = i64(b[6], rows), i64(b[7], rows)
    tokens, logprobs = i64(b[8], rows), f32(b[9], rows)
    pair = np.empty(2, np.float32)
    chunk = np.empty(CHUNK, np.float32)
    while True:
        row = take(b.ctypes.data)
        if row >= b[1]:
            break
        at = b[2] + row * stride * 4
        x = f32(at, n)
        greedy = temperatures[row] == ZERO
        temperature = ONE if greedy else temperatures[row]
        top, log_sum = row_statistics(at, n, temperature, pair.ctypes.data)
        top_k = top_ks[row]
        if greedy or top_k == 1:
            token = first_max(x, n)
        elif top_k <= 0 and top_ps[row] >= ONE:
            token = draw_in_order(x, n, temperature, top, uniform(seeds[row], positions[row]), chunk)
        else:
            work = np.empty((n + 15) // 16 * 16, np.float32)
            weights(x, 0, n, temperature, top, work)
            keep = top_k if 0 < top_k < n else n
            token = draw_filtered(work, n, keep, np.float64(top_ps[row]), uniform(seeds[row], positions[row]))
        tokens[row] = token
        logprobs[row] = one_logprob(x[token], temperature, top, log_sum)
