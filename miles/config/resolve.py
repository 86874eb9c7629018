"""Defaults that follow from other fields, written out, and checks across fields that need no file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from miles.config.exits import ConfigError
from miles.config.explain import named
from miles.config.schema import Optimizer, RunConfig, Sampling
from miles.config.section import Section
from miles.config.yaml_file import Key

S = TypeVar("S", bound=Section)


def resolved(config: RunConfig, origin: Mapping[Key, str] | None = None) -> RunConfig:
    """The same run with every derived default filled in. Idempotent. Raises ConfigError where fields contradict each other.

    origin: where each key was written, for the messages.
    """
    origin = origin or {}
    global_batch_size, steps = volumes(config, origin)
    check(config, origin)
    rollout, train, algorithm, warm = config.rollout, config.train, config.algorithm, config.warm_start
    parallel, optimizer = train.parallel, train.optimizer
    return _replace(
        config,
        rollout=_replace(
            rollout,
            over_sampling_batch_size=rollout.over_sampling_batch_size or rollout.batch_size,
            sampling=_context(rollout.sampling),
        ),
        eval=_replace(config.eval, sampling=_context(config.eval.sampling), reward=config.eval.reward or rollout.reward),
        algorithm=_replace(algorithm, eps_clip_high=algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high),
        train=_replace(
            train,
            global_batch_size=global_batch_size,
            num_steps_per_rollout=steps,
            parallel=_replace(parallel, expert_tensor=parallel.inside_expert),
            optimizer=_replace(optimizer, lr_decay_steps=_decay(optimizer, config.num_rollout * steps)),
        ),
        warm_start=_replace(
            warm, optimizer=_replace(warm.optimizer, lr_decay_steps=_decay(warm.optimizer, warm.steps))
        ),
    )


def volumes(config: RunConfig, origin: Mapping[Key, str]) -> tuple[int, int]:
    """(global_batch_size [samples], num_steps_per_rollout) with
    rollout.batch_size × rollout.n_samples_per_prompt = train.global_batch_size × train.num_steps_per_rollout.

    The samples of a prompt stay in one step, so the steps divide the prompts."""
    prompts, n = config.rollout.batch_size, config.rollout.n_samples_per_prompt
    size, steps, samples = config.train.global_batch_size, config.train.num_steps_per_rollout, prompts * n
    made = f"{prompts} prompts × {n} samples = {samples} samples a rollout"

    def wrong(name: str, text: str) -> ConfigError:
        return ConfigError(f"{named(('train', name), origin)}{made}, {text}")

    if size is None and steps is None:
        return samples, 1
    if size is not None and steps is not None and size * steps != samples:
        raise wrong("global_batch_size", f"but global_batch_size {size} × num_steps_per_rollout {steps} = {size * steps}; {_mend(prompts, n, steps)}")
    if steps is not None:
        if prompts % steps:
            near = _near_divisor(prompts, steps)
            apart = f"but {steps} steps do not divide {prompts} prompts, whose samples stay in one step; take {near} steps of {samples // near} samples"
            raise wrong("num_steps_per_rollout", apart)
        return samples // steps, steps
    assert size is not None
    near = n * _near_divisor(prompts, size / n)
    if samples % size:
        raise wrong("global_batch_size", f"which {size} does not divide; take global_batch_size {near}")
    if size % n:
        text = f"but a step of {size} samples does not hold whole prompts of {n} samples; take global_batch_size {near}"
        raise wrong("global_batch_size", text)
    return size, samples // size


def check(config: RunConfig, origin: Mapping[Key, str]) -> None:
    """Contradictions between fields."""

    def wrong(dotted: str, text: str) -> ConfigError:
        return ConfigError(f"{named(tuple(dotted.split('.')), origin)}{text}")

    rollout, algorithm, train = config.rollout, config.algorithm, config.train
    over = rollout.over_sampling_batch_size
    if over is not None and over < rollout.batch_size:
        raise wrong("rollout.over_sampling_batch_size", f"{over} is less than rollout.batch_size {rollout.batch_size}; raise it or remove it")
    if rollout.num_gpus % rollout.num_gpus_per_engine:
        raise wrong(
            "rollout.num_gpus_per_engine",
            f"engines of {rollout.num_gpus_per_engine} do not fill rollout.num_gpus {rollout.num_gpus}; "
            f"take rollout.num_gpus {-(-rollout.num_gpus // rollout.num_gpus_per_engine) * rollout.num_gpus_per_engine}",
        )
    if algorithm.tis_clip_low > algorithm.tis_clip:
        raise wrong("algorithm.tis_clip_low", f"{algorithm.tis_clip_low} is above algorithm.tis_clip {algorithm.tis_clip}; swap them")
    for name, source in (("data", config.data), ("warm_start", config.warm_start), ("eval", config.eval)):
        if source.prompt_data and source.reasoning_gym:
            raise wrong(f"{name}.reasoning_gym", f"{name}.prompt_data is given too; keep one of them")
        for other in source.exclude:
            if other not in ("data", "warm_start", "eval") or other == name:
                others = " or ".join(o for o in ("data", "warm_start", "eval") if o != name)
                raise wrong(f"{name}.exclude", f"{other!r} is not another source; name {others}")
    for name, reward in (("rollout.reward", rollout.reward), ("eval.reward", config.eval.reward)):
        if reward is not None and reward.type and reward.path:
            raise wrong(f"{name}.path", f"{name}.type {reward.type!r} is given too; set {name}.type=null to score by the function")
        if reward is not None and (reward.type or "").removeprefix("boxed_") == "remote_rm" and not reward.url:
            raise wrong(f"{name}.url", f"{name}.type remote_rm needs an address to post to; set {name}.url")
    for name, optimizer in (("train.optimizer", train.optimizer), ("warm_start.optimizer", config.warm_start.optimizer)):
        if optimizer.min_lr > optimizer.lr:
            raise wrong(f"{name}.min_lr", f"{optimizer.min_lr:g} is above {name}.lr {optimizer.lr:g}; lower it")
    debug, traced = config.debug, config.profile.steps
    modes = [name for name in ("rollout_only", "train_only", "rescore") if getattr(debug, name)]
    if len(modes) > 1:
        raise wrong(f"debug.{modes[1]}", f"debug.{modes[0]} is given too; keep one of them")
    if debug.rescore_steps and not debug.rescore:
        raise wrong("debug.rescore_steps", "nothing is scored without debug.rescore; set it, or leave the steps out")
    if any(step < 1 for step in debug.rescore_steps):
        raise wrong("debug.rescore_steps", f"{min(debug.rescore_steps)} is no step; steps are numbered from 1")
    if debug.reassign and not debug.train_only:
        raise wrong("debug.reassign", "only recorded batches are divided anew; set debug.train_only, or leave it out")
    if debug.rescore and debug.stop_after:
        raise wrong("debug.stop_after", "debug.rescore trains no step after which it could stop; choose steps by debug.rescore_steps")
    if debug.rollout_only and traced:
        raise wrong("profile.steps", "debug.rollout_only trains no step that could be traced; keep one of them")
    if traced and (len(traced) != 2 or not 1 <= traced[0] <= traced[1]):
        raise wrong("profile.steps", f"{traced} is not a first and a last step; write [first, last], such as [3, 5]")
    for name, sampling in (("rollout.sampling", rollout.sampling), ("eval.sampling", config.eval.sampling)):
        if sampling.top_k == 0:
            raise wrong(f"{name}.top_k", "0 keeps no token; -1 keeps all")
        if sampling.max_context_len is not None and sampling.max_context_len <= (sampling.max_prompt_len or 0):
            raise wrong(
                f"{name}.max_context_len",
                f"{sampling.max_context_len} leaves no token to generate after max_prompt_len {sampling.max_prompt_len}; raise it",
            )


def _context(sampling: Sampling) -> Sampling:
    if sampling.max_context_len is None and sampling.max_prompt_len is not None:
        return _replace(sampling, max_context_len=sampling.max_prompt_len + sampling.max_response_len)
    return sampling


def _replace(section: S, **changes: Any) -> S:
    return section.model_copy(update=changes)


def _decay(optimizer: Optimizer, total: int) -> int:
    """Steps of the decay: as given, else what the warm-up leaves of the phase."""
    return optimizer.lr_decay_steps or max(1, total - optimizer.lr_warmup_steps)


def _near_divisor(number: int, wanted: float) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


def _mend(prompts: int, n: int, steps: int) -> str:
    if prompts % steps == 0:
        return f"take global_batch_size {prompts * n // steps}"
    return f"take global_batch_size {prompts * n} and num_steps_per_rollout 1"
