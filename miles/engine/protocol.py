"""SGLang 0.5.15's /generate: what a request may say, and how a reply is written.

Two kinds of fault, told apart as SGLang does: a wrong type is BadRequest, a wrong value is RequestError; both answer 400.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class RequestError(ValueError):
    """A request asks for what can't be: a wrong value, something this engine lacks, a call at the wrong time."""


class BadRequest(RequestError):
    """The body or one of its fields has the wrong type."""


@dataclass(slots=True)
class Sampling:
    """How tokens are drawn. `max_new_tokens` None fills the context; `top_k` -1 keeps all; temperature 0 is greedy; `seed` None lets the engine choose."""

    max_new_tokens: int | None = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    n: int = 1
    seed: int | None = None
    explicit: bool = False  # max_new_tokens was given: too many are refused, not cut


@dataclass(slots=True)
class Request:
    """One response to make: `input_ids` i32 [L]. `logprob_start_len` -1 asks for no prompt log-probs."""

    rid: str
    input_ids: NDArray[np.int32]
    sampling: Sampling
    return_logprob: bool = False
    logprob_start_len: int = -1
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0
    return_prompt_token_ids: bool = False
    extra_key: str = ""


# Options of SGLang that this engine lacks, with the values that leave them unused.
UNSUPPORTED_SAMPLING: dict[str, tuple[Any, ...]] = {
    "min_p": (0, None),
    "min_new_tokens": (0, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "repetition_penalty": (1, None),
    "stop_regex": (None, [], ""),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "structural_tag": (None,),
    "logit_bias": (None, {}),
    "custom_params": (None, {}),
}
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "input_embeds": (None,),
    "image_data": (None, []),
    "video_data": (None, []),
    "audio_data": (None, []),
    "top_logprobs_num": (0, None),
    "token_ids_logprob": (None, []),
    "return_text_in_logprobs": (False, None),
    "stream": (False, None),
    "return_hidden_states": (False, None),
    "return_indexer_topk": (False, None),
    "session_id": (None,),
    "session_params": (None, {}),
    "lora_path": (None, ""),
    "custom_logit_processor": (None, ""),
    "bootstrap_host": (None,),
}
IGNORED_SAMPLING = {"stream_interval"}
KNOWN_SAMPLING = {
    "max_new_tokens", "temperature", "top_p", "top_k", "stop", "stop_token_ids", "ignore_eos", "no_stop_trim",
    "skip_special_tokens", "spaces_between_special_tokens", "n", "sampling_seed",
}  # fmt: skip


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"{name}: Input should be a valid integer, got {value!r:.80}")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{name}: Input should be a valid number, got {value!r:.80}")
    try:
        return float(value)
    except OverflowError as error:
        raise RequestError(f"{name} is out of range") from error


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{name}: Input should be a valid boolean, got {value!r:.80}")
    return value


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{name}: Input should be a valid string, got {value!r:.80}")
    return value


def _refuse(given: dict[str, Any], unsupported: dict[str, tuple[Any, ...]], where: str) -> None:
    for name, unused in unsupported.items():
        if name in given:
            value = given[name]
            values = value if isinstance(value, list) and value else [value]
            if not all(any(item == rest and isinstance(item, bool) <= isinstance(rest, bool) for rest in unused) for item in values):
                raise RequestError(f"{where}{name} is not supported by the embedded engine; leave it out")


def parse_sampling(given: Any) -> Sampling:
    """Sampling from a request's sampling_params (an object or null); raises BadRequest or RequestError."""
    if given is None:
        return Sampling()
    if not isinstance(given, dict):
        raise BadRequest(f"sampling_params: Input should be a valid dictionary, got {given!r:.80}")
    _refuse(given, UNSUPPORTED_SAMPLING, "sampling_params.")
    unknown = set(given) - KNOWN_SAMPLING - set(UNSUPPORTED_SAMPLING) - IGNORED_SAMPLING
    if unknown:
        raise RequestError(f"sampling_params.{min(unknown)} is not a sampling parameter")
    result = Sampling()
    for name, value in given.items():
        if name == "max_new_tokens":
            result.max_new_tokens = None if value is None else _integer(value, name)
            result.explicit = value is not None
        elif value is None or name not in KNOWN_SAMPLING:
            continue
        elif name in ("temperature", "top_p"):
            setattr(result, name, _number(value, name))
        elif name in ("top_k", "n"):
            setattr(result, name, _integer(value, name))
        elif name == "sampling_seed":
            result.seed = _integer(value, name)
        elif name == "stop":
            stops = [value] if isinstance(value, str) else value
            if not isinstance(stops, list):
                raise BadRequest(f"stop: Input should be a string or a list of strings, got {value!r:.80}")
            result.stop = tuple(_string(item, "stop") for item in stops if item != "")
        elif name == "stop_token_ids":
            if not isinstance(value, list):
                raise BadRequest(f"stop_token_ids: Input should be a valid list, got {value!r:.80}")
            result.stop_token_ids = tuple(_integer(item, name) for item in value)
        else:
            setattr(result, name, _boolean(value, name))
    _judge(result)
    return result


def _judge(sampling: Sampling) -> None:
    if not (0 <= sampling.temperature < float("inf")):
        raise RequestError(f"temperature must be non-negative, got {sampling.temperature}.")
    if not 0 < sampling.top_p <= 1:
        raise RequestError(f"top_p must be in (0, 1], got {sampling.top_p}.")
    if (sampling.top_k != -1 and sampling.top_k < 1) or sampling.top_k >= 1 << 31:
        raise RequestError(f"top_k must be -1 (disable) or at least 1, got {sampling.top_k}.")
    if sampling.max_new_tokens is not None and sampling.max_new_tokens < 0:
        raise RequestError(f"max_new_tokens must be at least 0, got {sampling.max_new_tokens}.")
    if not 1 <= sampling.n <= 1 << 16:
        raise RequestError(f"n must be at least 1 and at most 65536, got {sampling.n}.")
    if sampling.seed is not None and not -(1 << 63) <= sampling.seed < 1 << 64:
        raise RequestError(f"sampling_seed must fit in 64 bits, got {sampling.seed}.")
    if any(not 0 <= token < 1 << 31 for token in sampling.stop_token_ids):
        raise RequestError("stop_token_ids must be token ids, zero or greater.")
    if sampling.temperature < 1e-6:  # SGLang's threshold of greedy
        sampling.temperature = 0.0


@dataclass(frozen=True)
class Limits:
    """What a request is judged against: sizes in tokens; `tokenizer` None serves token ids only."""

    vocab_size: int
    context_length: int
    routed_experts: bool
    tokenizer: Any = None


def _ids(value: Any, name: str, limits: Limits) -> NDArray[np.int32]:
    if not value:
        raise RequestError(f"{name} is empty; a prompt has at least one token")
    try:
        wide = np.array(value)
    except (ValueError, OverflowError) as error:
        raise BadRequest(f"{name}: Input should be a list of integers") from error
    if wide.dtype.kind not in "iu" or wide.ndim != 1 or any(isinstance(item, bool) for item in value):
        raise BadRequest(f"{name}: Input should be a list of integers")
    if wide.min() < 0 or wide.max() >= limits.vocab_size:
        raise RequestError(f"{name} has a token id outside the vocabulary of {limits.vocab_size}")
    return wide.astype(np.int32)


def _prompts(body: dict[str, Any], limits: Limits) -> tuple[list[NDArray[np.int32]], bool]:
    text, ids = body.get("text"), body.get("input_ids")
    if ids is not None:
        if not isinstance(ids, list):
            raise BadRequest(f"input_ids: Input should be a valid list, got {ids!r:.80}")
        batch = bool(ids) and isinstance(ids[0], list)
        rows = ids if batch else [ids]
        if not all(isinstance(row, list) for row in rows):
            raise BadRequest("input_ids: Input should be a list of integers or a list of such lists")
        return [_ids(row, "input_ids", limits) for row in rows], batch
    if text is None:
        raise RequestError("Either text, input_ids or input_embeds should be provided.")
    batch = isinstance(text, list)
    if batch and not text:
        raise RequestError("text is empty; give at least one prompt")
    texts = [_string(item, "text") for item in (text if batch else [text])]
    if limits.tokenizer is None:
        raise RequestError("The engine has no tokenizer, so text can't be served; send input_ids.")
    return [_ids(list(limits.tokenizer.encode(item)), "text", limits) for item in texts], batch


def _each(body: dict[str, Any], name: str, default: Any, count: int, batch: bool) -> list[Any]:
    """A field that may be given once or once per prompt."""
    value = body.get(name)
    if value is None:
        return [default] * count
    if not isinstance(value, list):
        return [value] * count
    if not batch:
        raise BadRequest(f"{name}: a list needs a batch of prompts")
    if len(value) != count:
        raise RequestError(f"{name} has {len(value)} entries for {count} prompts")
    return [default if item is None else item for item in value]


def parse_generate(body: Any, limits: Limits) -> tuple[list[Request], bool]:
    """Requests of one /generate body, prompt-major when n > 1, and whether the reply is a list.

    Raises BadRequest (wrong type) or RequestError (wrong value, unsupported option, prompt too long).
    """
    if not isinstance(body, dict):
        raise BadRequest("the body should be a JSON object")
    _refuse(body, UNSUPPORTED_FIELDS, "")
    prompts, batch = _prompts(body, limits)
    count = len(prompts)
    rids = _rids(body.get("rid"), count, batch)
    samplings = [parse_sampling(item) for item in _each(body, "sampling_params", None, count, batch)]
    logprobs = _each(body, "return_logprob", False, count, batch)
    starts = _each(body, "logprob_start_len", -1, count, batch)
    keys = _each(body, "extra_key", "", count, batch)
    experts = _boolean(body.get("return_routed_experts") or False, "return_routed_experts")
    experts_start = _integer(body.get("routed_experts_start_len") or 0, "routed_experts_start_len")
    prompt_ids = _boolean(body.get("return_prompt_token_ids") or False, "return_prompt_token_ids")
    requests: list[Request] = []
    for index, prompt in enumerate(prompts):
        sampling = samplings[index]
        start = _integer(starts[index], "logprob_start_len")
        logprob = _boolean(logprobs[index], "return_logprob")
        _fits(prompt, sampling, start, experts_start, limits)
        for _ in range(sampling.n):
            rid = rids[index] if sampling.n == 1 else uuid.uuid4().hex
            requests.append(Request(
                rid, prompt, sampling, logprob, start if logprob else -1, experts and limits.routed_experts, experts_start, prompt_ids,
                _string(keys[index], "extra_key"),
            ))  # fmt: skip
    return requests, batch or len(requests) > 1


def _rids(given: Any, count: int, batch: bool) -> list[str]:
    if given is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(given, list):
        if not batch or len(given) != count:
            raise RequestError(f"rid has {len(given)} entries for {count} prompts" if batch else "rid is a list, but there is one prompt")
        rids = [_string(item, "rid") for item in given]
        if len(set(rids)) != len(rids):
            raise RequestError("Duplicate request IDs detected within the request")
        return rids
    rid = _string(given, "rid")
    return [f"{rid}_{index}" for index in range(count)] if batch else [rid]


def _fits(prompt: NDArray[np.int32], sampling: Sampling, start: int, experts_start: int, limits: Limits) -> None:
    length = len(prompt)
    if length >= limits.context_length:
        raise RequestError(f"The input ({length} tokens) is longer than the model's context length ({limits.context_length} tokens).")
    room = limits.context_length - length
    if sampling.max_new_tokens is None or not sampling.explicit:
        sampling.max_new_tokens = room if sampling.max_new_tokens is None else min(sampling.max_new_tokens, room)
    if sampling.max_new_tokens > room:
        raise RequestError(
            f"Requested token count exceeds the model's maximum context length of {limits.context_length} tokens: "
            f"{length} of input and max_new_tokens {sampling.max_new_tokens}."
        )
    if start > length or start < -1:
        raise RequestError(f"logprob_start_len is {start}; it must be -1, or from 0 to the prompt's length {length}.")
    if not 0 <= experts_start <= length:
        raise RequestError(f"routed_experts_start_len is {experts_start}; it must be from 0 to the prompt's length {length}.")
    if sampling.stop and limits.tokenizer is None:
        raise RequestError("The engine has no tokenizer, so stop strings can't be served; use stop_token_ids.")


def value_error(message: str) -> dict[str, Any]:
    """The body of a 400 for a wrong value."""
    return {"error": {"message": message}}


def type_error(message: str, code: int = 400, kind: str = "Bad Request") -> dict[str, Any]:
    """The body of a 400 for a wrong type, or of a 503."""
    return {"object": "error", "message": message, "type": kind, "param": None, "code": code}
