"""The formulas again, in float64 numpy and plain loops, written from the papers and not from the package."""

import numpy as np


def grpo(reward, group, normalize=True, std=True):
    reward = np.asarray(reward, dtype=np.float64)
    if not normalize:
        return reward
    out = np.zeros_like(reward)
    for label in set(np.asarray(group).tolist()):
        where = np.flatnonzero(np.asarray(group) == label)
        values = reward[where]
        a = values - values.mean()
        if np.all(values == values[0]):
            a = np.zeros_like(values)
        elif std:
            a = a / (values.std(ddof=1) + 1e-6)
        out[where] = a
    return out


def difference(n, o, m):
    out = np.zeros(len(n))
    for t in range(len(n)):
        if m[t] and np.isfinite(n[t]) and np.isfinite(o[t]):
            out[t] = float(n[t]) - float(o[t])
    return out


def ppo(n, o, a, m, low, high, dual=None):
    loss, clipped, ratio, kl = (np.zeros(len(n)) for _ in range(4))
    d = difference(n, o, m)
    for t in range(len(n)):
        ratio[t] = np.exp(min(max(d[t], -20), 20))
        kl[t] = -d[t]
        if not m[t]:
            continue
        first = -ratio[t] * a[t]
        second = -min(max(ratio[t], 1 - low), 1 + high) * a[t]
        clipped[t] = float(second > first)
        loss[t] = max(first, second)
        if dual is not None and a[t] < 0:
            loss[t] = min(loss[t], -dual * a[t])
    return loss, ratio, clipped, kl


def kl(n, f, m, kind):
    d = difference(n, f, m)
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    if kind == "k3":
        return np.exp(-d) - 1 + d
    r = np.clip(-d, -20, 20)
    return np.clip(np.exp(r) - 1 - r, -10, 10)


def sample_mean(value, m, bounds, samples):
    """bounds: [(first, last)] of every sequence of the whole batch."""
    total = 0.0
    for first, last in bounds:
        active = [float(value[t]) for t in range(first, last) if m[t]]
        total += sum(active) / max(len(active), 1)
    return total / samples


def token_mean(value, m):
    active = [float(v) for v, keep in zip(value, m, strict=True) if keep]
    return sum(active) / max(len(active), 1)


def mismatch(train, rollout, m):
    d, equal, bad = [], 0, 0
    for t in range(len(m)):
        if not m[t]:
            continue
        if not (np.isfinite(train[t]) and np.isfinite(rollout[t])):
            bad += 1
            continue
        d.append(float(train[t]) - float(rollout[t]))
        equal += int(np.float32(train[t]).tobytes() == np.float32(rollout[t]).tobytes())
    if not d:
        return {"train/mismatch_tokens": 0, "train/mismatch_not_finite": bad}
    d = np.array(d)
    rho = np.exp(np.clip(d, -20, 20))
    k3 = np.clip(rho - 1 - np.clip(d, -20, 20), -10, 10)
    return {
        "train/mismatch_tokens": len(d),
        "train/mismatch_not_finite": bad,
        "train/train_rollout_logprob_abs_diff": np.abs(d).mean(),
        "train/train_rollout_logprob_max_abs_diff": np.abs(d).max(),
        "train/train_rollout_kl": k3.mean(),
        "train/train_rollout_kl_k1": -d.mean(),
        "train/train_rollout_equal_bits": equal / len(d),
        "train/train_rollout_ratio_mean": rho.mean(),
        "train/train_rollout_ratio_std": rho.std(),
        "train/train_rollout_ratio_max": rho.max(),
        "train/train_rollout_ratio_min": rho.min(),
        "train/train_rollout_chi2": (rho**2).mean() - 1,
        "train/train_rollout_ess": rho.sum() ** 2 / (len(rho) * (rho**2).sum()),
    }
