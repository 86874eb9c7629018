"""From a draw to a sample: one prompt, one response. A user's own function has the same signature:

    async def generate(draw: Draw, sample: int, context: GenerateContext) -> Sample

Seeds are sampling_seed(run seed, draw, sample, turn) (miles.rollout.draws), so a sample does not depend on when, where or beside
what it is generated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pybase64
from numpy.typing import NDArray

from miles.config.exits import TryAgain, UserError
from miles.config.schema import RunConfig, Sampling, Source
from miles.data.sample import Draw, Flag, Sample, Status
from miles.rollout.draws import sampling_seed
from miles.rollout.engines import Engines
from miles.rollout.tokenizer import Tokenizer

# /turns/role
PROMPT, ASSISTANT, TOOL = 0, 1, 2

STATUS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


@dataclass
class GenerateContext:
    """What a generate function works with: tokens of the prompt, the engines, the seed, how to sample.

    kind: rollout or eval. weight_version: of the policy that the batch wants. route_shape: (layers, experts per token), and the
    dtype that holds an expert's number, when routes are recorded.
    """

    config: RunConfig
    kind: str
    sampling: Sampling
    tokenizer: Tokenizer
    engines: Engines
    weight_version: int
    route_shape: tuple[int, int] | None = None
    route_dtype: Any = np.uint8
    _prompts: dict[int, tuple[str, list[int]]] = field(default_factory=dict, repr=False)

    def prompt(self, draw: Draw) -> tuple[str, list[int]]:
        """(text, token ids) of a draw's prompt. Raises UserError when it is too long."""
        if draw.draw not in self._prompts:
            if len(self._prompts) >= 64:
                self._prompts.clear()
            self._prompts[draw.draw] = tokenised(draw, self.config, self.tokenizer, self.sampling)
        return self._prompts[draw.draw]

    def seed(self, draw: Draw, sample: int, turn: int = 0) -> int:
        """Seed of a turn."""
        return sampling_seed(self.config.seed, draw.draw, sample, turn)

    def sampling_params(self, seed: int, length: int) -> dict[str, Any]:
        """SGLang's sampling parameters after `length` tokens of context. Raises UserError when none are left to generate."""
        options = self.sampling
        room = options.max_response_len
        if options.max_context_len is not None:
            room = min(room, options.max_context_len - length)
        if room < 1:
            raise UserError(f"{length} tokens fill sampling.max_context_len {options.max_context_len}; raise it, or shorten the prompts")
        return {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "max_new_tokens": room,
            "stop": list(options.stop),
            "stop_token_ids": list(options.stop_token_ids),
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "spaces_between_special_tokens": False,
            "sampling_seed": seed,
        }


def tokenised(draw: Draw, config: RunConfig, tokenizer: Tokenizer, sampling: Sampling | None) -> tuple[str, list[int]]:
    """(text, token ids) of a draw's prompt, by its source's options. Raises UserError: empty, or longer than max_prompt_len."""
    source: Source = getattr(config, draw.source)
    text, ids = tokenizer.prompt(draw.prompt, source.apply_chat_template, source.apply_chat_template_kwargs, draw.source)
    if not ids:
        raise UserError(f"{draw.source}, draw {draw.draw}: the prompt has no tokens; remove the row")
    longest = sampling.max_prompt_len if sampling is not None else None
    if longest is not None and len(ids) > longest:
        section = "eval" if draw.source == "eval" else "rollout"
        raise UserError(
            f"{draw.source}, draw {draw.draw}: the prompt has {len(ids)} tokens, more than {section}.sampling.max_prompt_len {longest}; "
            f"raise it, or remove the row ({text[:40]!r}…)"
        )
    return text, ids


async def generate(draw: Draw, sample: int, context: GenerateContext) -> Sample:
    """The default: the prompt, one response."""
    text, prompt = context.prompt(draw)
    seed = context.seed(draw, sample)
    reply = await context.engines.generate(draw.draw, prompt, context.sampling_params(seed, len(prompt)))
    return from_reply(draw, sample, seed, text, prompt, reply, context)


def from_reply(draw: Draw, sample: int, seed: int, text: str, prompt: list[int], reply: dict[str, Any], context: GenerateContext) -> Sample:
    """A single-turn sample of SGLang's reply. Raises TryAgain when other weights made it than the batch wants."""
    meta, output = reply["meta_info"], reply["output_ids"]
    logprobs = meta["output_token_logprobs"]
    assert [entry[1] for entry in logprobs] == output, "a log-prob for each token of the response"
    version = str(meta.get("weight_version", ""))
    if version.isdecimal() and int(version) != context.weight_version:
        raise TryAgain(f"engine {reply['engine']} has weights {version}, the batch is of weights {context.weight_version}")
    start, total = len(prompt), len(prompt) + len(output)
    logprob = np.full(total, np.nan, np.float32)
    logprob[start:] = [entry[0] for entry in logprobs]
    mask = np.zeros(total, np.uint8)
    mask[start:] = 1
    flags = np.zeros(total, np.uint8)
    flags[start:] = Flag.GENERATED
    if output:
        flags[start] |= Flag.FIRST_OF_TURN
    cached = int(meta.get("cached_tokens") or 0)
    flags[:cached] |= np.uint8(Flag.PREFIX_CACHED)
    return Sample(
        draw=draw.draw,
        sample=sample,
        seed=seed,
        token_id=np.array([*prompt, *output], np.int32),
        prompt_length=start,
        rollout_logprob=logprob,
        loss_mask=mask,
        flags=flags,
        status=STATUS[meta["finish_reason"]["type"]],
        runs=[(start, context.weight_version)],
        turns=[(0, PROMPT), (start, ASSISTANT)],
        engine=reply["engine"],
        source=draw.source,
        cached_tokens=cached,
        metadata=draw.metadata,
        prompt=text,
        response=context.tokenizer.decode(output),
        label=draw.label,
        routes=_routes(meta, total, context),
    )


def _routes(meta: dict[str, Any], total: int, context: GenerateContext) -> NDArray[Any] | None:
    """Experts [total - 1, layers, top_k] in the narrow dtype; None where none were asked for."""
    encoded = meta.get("routed_experts")
    if context.route_shape is None or encoded is None:
        return None
    wide = np.frombuffer(pybase64.b64decode(encoded, validate=True), "<i4").reshape(total - 1, *context.route_shape)
    return wide.astype(context.route_dtype)


def supervised(draw: Draw, config: RunConfig, tokenizer: Tokenizer) -> Sample:
    """A sample to imitate: the prompt, then the label and an eos as the response. No engine, no log-probs (NaN throughout).

    Raises UserError without a label.
    """
    text, prompt = tokenised(draw, config, tokenizer, None)
    if draw.label is None:
        raise UserError(f"{draw.source}, draw {draw.draw}: no response to learn; set {draw.source}.label_key")
    response = tokenizer.encode(draw.label, special=False)
    if tokenizer.eos_token_id is not None:
        response.append(tokenizer.eos_token_id)
    start, total = len(prompt), len(prompt) + len(response)
    mask = np.zeros(total, np.uint8)
    mask[start:] = 1
    flags = np.zeros(total, np.uint8)
    if response:
        flags[start] = Flag.FIRST_OF_TURN
    return Sample(
        draw=draw.draw,
        sample=0,
        seed=sampling_seed(config.seed, draw.draw, 0, 0),
        token_id=np.array([*prompt, *response], np.int32),
        prompt_length=start,
        rollout_logprob=np.full(total, np.nan, np.float32),
        loss_mask=mask,
        flags=flags,
        status=Status.COMPLETED,
        turns=[(0, PROMPT), (start, ASSISTANT)],
        source=draw.source,
        metadata=draw.metadata,
        prompt=text,
        response=draw.label,
        label=draw.label,
    )
