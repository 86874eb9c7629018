"""Scoring of groups: finds the reward function, calls it where it belongs, judges its answer.

    reward(samples: list[Sample], context: RewardContext) -> list[float | dict[str, float]]       (or async)

Asynchronous functions run in the worker's event loop, exact_match too; all other synchronous ones in reward_pool's processes.
What a user's function does wrong ends the run with one line: the function, the draw, the exception.
"""

from __future__ import annotations

import asyncio
import math
import os
from typing import Any

import httpx
import numpy as np

from miles.config.exits import TryAgain, UserError
from miles.config.schema import Reward, RunConfig
from miles.data.sample import Draw, Sample
from miles.rollout.builtin_rewards import RewardContext, exact_match, remote_rm
from miles.rollout.imports import load_function
from miles.rollout.reward_pool import GRACE_SECONDS, RewardPool, TooSlow, as_scored, is_async, reward_function, within

__all__ = ["RewardContext", "Scorer"]

MAX_PROCESSES = 8
CONNECTIONS = 64  # to a reward server


class Scorer:
    """Scores groups by one Reward section (`section` names it in messages). Call close() at the end."""

    def __init__(self, options: Reward, config: RunConfig, section: str = "rollout.reward") -> None:
        self.options, self.config, self.section = options, config, section
        self.name = options.path or options.type or ""
        # A user's generate function may score by itself; then no reward is configured.
        self._function = reward_function(options, section) if self.name or config.rollout.generate_path is None else None
        self._http: httpx.AsyncClient | None = None
        self._calls = asyncio.Semaphore(CONNECTIONS)
        size = max(1, min(MAX_PROCESSES, (os.cpu_count() or 2) // 2))
        self._pool = RewardPool(options, config, section, size)

    @staticmethod
    def check(config: RunConfig) -> None:
        """Find every function that the run names, so that a wrong name shows at the start. Raises UserError."""
        if config.num_rollout > 0:
            Scorer(config.rollout.reward, config, "rollout.reward")
        if config.eval.interval is not None:
            Scorer(config.eval.reward or config.rollout.reward, config, "eval.reward")
        if config.rollout.filter_path is not None:
            load_function(config.rollout.filter_path, "rollout.filter_path")
        if config.rollout.generate_path is not None:
            load_function(config.rollout.generate_path, "rollout.generate_path")

    def warm(self) -> None:
        """Start what scoring needs, ahead of the first group."""
        if self._function is not None and not is_async(self._function) and self._function is not exact_match:
            self._pool.warm()

    async def score(self, draw: Draw, samples: list[Sample]) -> None:
        """Fill in reward and reward_parts of a group. Raises UserError (the function's or the user's fault) or TryAgain (a server is away, a
        scoring process was killed)."""
        if self._function is None:
            if any(math.isnan(sample.reward) for sample in samples):
                raise UserError(f"{self.section}: nothing scores draw {draw.draw}; set {self.section}.type, or let the generate function set sample.reward")
            return
        where = f"reward {self.name}, draw {draw.draw}"
        try:
            scores = await self._call(draw, as_scored(samples, self.options))
        except TooSlow:
            raise UserError(f"{where}: no answer in {self.options.timeout:g} s; raise {self.section}.timeout, or mend the function") from None
        except (UserError, TryAgain) as error:
            raise type(error)(f"{where}: {error}") from error
        except Exception as error:  # a user's asynchronous function may raise anything
            raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:500]}") from error
        self._fill(samples, scores, where)

    async def _call(self, draw: Draw, samples: list[Sample]) -> Any:
        assert self._function is not None
        if is_async(self._function):
            if self._http is None:
                self._http = httpx.AsyncClient(limits=httpx.Limits(max_connections=CONNECTIONS))
            work = self._function(samples, RewardContext(draw, self.options, self.config, self._http, self._calls))
            # remote_rm has a deadline for each of its tries: an outage is not the function's fault.
            return await (work if self._function is remote_rm else within(self.options.timeout + GRACE_SECONDS, work))
        if self._function is exact_match:  # cheaper than the way to a process
            return exact_match(samples, RewardContext(draw, self.options, self.config))
        return await self._pool.score(draw, samples)

    def _fill(self, samples: list[Sample], scores: Any, where: str) -> None:
        if not isinstance(scores, list | tuple | np.ndarray) or len(scores) != len(samples):
            found = f"{len(scores)} entries" if isinstance(scores, list | tuple | np.ndarray) else f"a {type(scores).__name__}"
            raise UserError(f"{where}: returned {found} for a group of {len(samples)} samples; return one reward a sample, as a list")
        for sample, score in zip(samples, scores, strict=True):
            if isinstance(score, dict):
                sample.reward_parts = {str(k): float(v) for k, v in score.items() if _is_number(v)}
                score = self._pick(score, where)
            if not _is_number(score) or not math.isfinite(score):
                raise UserError(f"{where}: returned {score!r:.80} for sample {sample.sample}; a reward is a finite number")
            sample.reward = float(score)

    def _pick(self, score: dict[str, Any], where: str) -> Any:
        key = self.options.key
        if key is None:
            raise UserError(f"{where}: returned an object with {', '.join(map(repr, score))}; set {self.section}.key to the entry that is the reward")
        if key not in score:
            raise UserError(f"{where}: returned an object without {key!r} ({', '.join(map(repr, score))}); mend {self.section}.key")
        return score[key]

    async def close(self) -> None:
        """Ends processes and connections."""
        self._pool.close()
        if self._http is not None:
            await self._http.aclose()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_)
