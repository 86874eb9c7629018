"""/generate: from a body to replies. Calls wait at the gate, live in the engine's thread, and are answered at the end."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any

import numpy as np
import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from miles.engine.control import NOT_READY, reply
from miles.engine.engine import EngineThread
from miles.engine.gate import Gate
from miles.engine.protocol import Request, RequestError, parse_generate, type_error
from miles.engine.sequence import Sequence


class Call:
    """One HTTP call and its sequences, which finish in any order."""

    __slots__ = ("left", "requests", "result", "sequences")

    def __init__(self, requests: list[Request], result: asyncio.Future[None]):
        self.requests = requests
        self.result = result
        self.left = len(requests)
        self.sequences: dict[str, Sequence] = {}


class Generate:
    """The data plane. Everything but `_deliver` runs in the event loop."""

    def __init__(self, thread: EngineThread, gate: Gate):
        self._thread = thread
        self._gate = gate
        self._live: dict[str, Call] = {}
        self._working: set[asyncio.Future[list[Sequence]]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        thread.deliver = self._deliver

    def _deliver(self, finished: list[Sequence]) -> None:
        assert self._loop is not None, "sequences finish after calls"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._settle, finished)

    def _settle(self, finished: list[Sequence]) -> None:
        for sequence in finished:
            rid = sequence.request.rid
            call = self._live.pop(rid)
            call.sequences[rid] = sequence
            call.left -= 1
            if call.left == 0 and not call.result.done():
                call.result.set_result(None)

    def abort(self, rid: str | None) -> None:
        """Aborts one live request, or all; others are ignored, as in SGLang."""
        if rid is None or rid in self._live:
            self._thread.tell(lambda: self._thread.engine.scheduler.abort(rid))

    async def run(self, requests: list[Request]) -> list[Sequence]:
        """Runs requests to their end, in their order. Cancelling aborts them. Raises RequestError for an id that is live already."""
        self._loop = asyncio.get_running_loop()
        await self._gate.enter()
        try:
            for request in requests:
                if request.rid in self._live:
                    raise RequestError(f"Duplicate request ID detected: {request.rid}")
            call = Call(requests, self._loop.create_future())
            self._live.update((request.rid, call) for request in requests)
            self._thread.submit(requests)
            try:
                await asyncio.shield(call.result)
            except asyncio.CancelledError:
                for request in requests:
                    self.abort(request.rid)
                await call.result
                raise
        finally:
            self._gate.leave()
        return [call.sequences[request.rid] for request in requests]

    async def endpoint(self, http: HttpRequest) -> Response:
        """POST or PUT /generate."""
        engine = self._thread.engine
        requests, is_list = parse_generate(orjson.loads(await http.body()), engine.limits)
        unready = engine.why_not_ready()
        if unready is not None:
            return reply(type_error(unready, 503, "503"), NOT_READY)
        work = asyncio.ensure_future(self.run(requests))
        self._working.add(work)
        work.add_done_callback(self._working.discard)
        gone = asyncio.ensure_future(http.receive())  # after the body, only a disconnect can come
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            work.cancel()
            raise
        finally:
            gone.cancel()
        if not work.done():
            work.cancel()  # aborts its requests
            return Response(status_code=499)  # nobody reads it
        sequences = work.result()
        replies = [self._reply(sequence) for sequence in sequences]
        return reply(replies if is_list else replies[0])

    def _reply(self, sequence: Sequence) -> dict[str, Any]:
        request = sequence.request
        meta: dict[str, Any] = {
            "id": request.rid,
            "finish_reason": sequence.finish,
            "prompt_tokens": len(request.input_ids),
            "weight_version": sequence.weight_version,
            "num_retractions": sequence.retractions,
            "reasoning_tokens": 0,
            "completion_tokens": len(sequence.output),
            "cached_tokens": sequence.cached_tokens,
            "cached_tokens_details": {"device": sequence.cached_tokens, "host": 0},
            "dp_rank": None,
            "e2e_latency": sequence.finished - sequence.arrived,
            "response_sent_to_client_ts": time.time(),
        }
        if sequence.first_token:
            meta["time_to_first_token"] = sequence.first_token - sequence.arrived
        if request.return_logprob:
            meta["input_token_logprobs"] = _prompt_logprobs(sequence)
            meta["output_token_logprobs"] = [[score, token, None] for score, token in zip(sequence.logprob, sequence.output, strict=True)]
            meta["output_token_logprobs_length"] = len(sequence.output)
        if request.return_routed_experts and sequence.routes is not None:
            routes = np.ascontiguousarray(sequence.routes[request.routed_experts_start_len :], dtype="<i4")
            meta["routed_experts"] = base64.b64encode(routes.tobytes()).decode()
        body: dict[str, Any] = {"output_ids": sequence.output, "meta_info": meta}
        text = self._thread.engine.text
        if text is not None:
            body["text"] = text.reply(sequence)
        if request.return_prompt_token_ids:
            body["prompt_token_ids"] = request.input_ids.tolist()
        return body


def _prompt_logprobs(sequence: Sequence) -> list[list[Any]]:
    """Triples from logprob_start_len on; the first has no log-prob, since SGLang does not look before it."""
    start = sequence.request.logprob_start_len
    if start < 0:
        return []
    ids = sequence.request.input_ids[start:].tolist()
    scores = [score for part in sequence.prompt_logprob for score in part.tolist()]
    return [[score, token, None] for score, token in zip([None, *scores], ids, strict=False)]
