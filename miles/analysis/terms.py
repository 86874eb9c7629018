"""What the fused pass adds up, by name: shared by the kernels, the state and the metrics."""

from __future__ import annotations

# Over tokens that count, with d = train - rollout, c = d held to ±LIMIT, t = e^c - 1, mu the rollout's log-prob.
CORE = ("d", "abs", "d2", "k3", "t", "t2")
SUMS = (*CORE, "td", "mu", "mu2", "mud")
MOMENTS = ("place_abs",)  # over tokens that count: x |d|, of their places x in the piece
VALUES = ("tokens", "d", "abs", "d2", "k3", "t", "t2", "equal_bits")  # of every slice
TOKEN_VALUES = ("tokens", "abs", "d", "k3")  # of every token id
COUNTS = ("masked", "tokens", "equal_bits")  # under the loss mask; of them, both log-probs finite; of those, the same bits in both
LIMIT = 20.0  # nats: the bound of a log-ratio before it is exponentiated
HUGE = 1000.0  # nats: no log-prob of a token lies beyond it, whose probability would be 0 in any float; so squares of differences don't overflow
INFINITE = 1.0000000150474662e30  # nats, a float32: what lies beyond stands for probability 0; between both it is absurd
BINS = 1 << 13  # of the signed log-histogram: the upper 13 bits of d as float32, so 16 bins an octave
SUB_BINS = 8  # neighbouring tokens count in different columns: equal values don't wait for each other
WIDE = 16  # tokens of a turn of the innermost loop
CORE_WIDE = 64  # tokens of a turn of the core pass
CORE_TURNS = 64  # whose sums are fp32
CORE_RING = 4  # turns whose bins wait to be counted; a power of 2
TURNS = 16  # whose sums are fp32 before they go to fp64; fewer than 256
NEAR = 0.25  # nats: up to here a log-ratio is small, as nearly all are: its exponential is a short polynomial, its sums by token id are integers
NEAR_UNIT = {"tokens": 1.0, "abs": 2.0**-40, "d": 2.0**-40, "k3": 2.0**-45}  # of those integers
ROW = (*TOKEN_VALUES, "d2", "t", "t2", "equal_bits")  # of a token's terms in memory: VALUES, those of its id first
ROW_UNIT = {name: NEAR_UNIT.get(name, 1.0) for name in ROW}  # powers of two
TERM_ROW = 512  # tokens of a piece
GATHER = 2048  # tokens of a sequence whose terms are added in fp32, a quarter of them each, in a slot of the slices that change with every token
TAUS = (0.0, 1e-6, 1e-3, 0.1)  # nats: a sequence diverges first where |d| exceeds one of these
# Over sequences with a token that counts, S = sum of d over it, n its tokens: 1, e^S, e^2S, e^(-S/n), |S/n|, (S/n)^2, drift and its absolute value.
SEQUENCE_SUMS = ("sequences", "w", "w2", "ppl", "abs_mean", "mean2", "drift", "abs_drift")
SEQUENCE_HISTOGRAMS = ("log_ratio", "mean", "drift")
REPLICATES = 200  # of the bootstrap
WORST = 20  # tokens kept
