"""Control calls: health, information, pause, flush, weights, memory."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

import miles
from miles.engine.engine import EngineThread
from miles.engine.gate import Gate
from miles.engine.protocol import BadRequest, Request, RequestError, Sampling

if TYPE_CHECKING:
    from miles.engine.generate import Generate

Result = TypeVar("Result")
NOT_READY = 503
HEALTH_SECONDS = 20.0
MODES = ("abort", "retract", "in_place")
TAGS = ("weights", "kv_cache", "cuda_graph")


def reply(body: Any, status: int = 200) -> Response:
    """JSON."""
    return Response(orjson.dumps(body), status, media_type="application/json")


async def _body(http: HttpRequest) -> dict[str, Any]:
    raw = await http.body()
    body = orjson.loads(raw) if raw.strip() else {}
    if not isinstance(body, dict):
        raise BadRequest("the body should be a JSON object")
    return body


def _field(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name, default)
    if value is not default and not isinstance(value, kind):
        raise BadRequest(f"{name}: Input should be a valid {kind.__name__}, got {value!r:.80}")
    return value


class Control:
    """The control plane. Commands run in the engine's thread, between steps."""

    def __init__(self, thread: EngineThread, gate: Gate, generate: Generate):
        self._thread = thread
        self._engine = thread.engine
        self._gate = gate
        self._generate = generate
        self._probes = 0

    async def _ask(self, what: Callable[[], Result]) -> Result:
        return await asyncio.wrap_future(self._thread.ask(what))

    # -- information -------------------------------------------------------------------------------------------------------

    async def health(self, http: HttpRequest) -> Response:
        """200 while the engine's thread lives, paused or not."""
        return Response(status_code=200 if self._thread.alive else NOT_READY)

    async def health_generate(self, http: HttpRequest) -> Response:
        """Generates one token; 503 when that takes too long (a paused engine can't) or the weights are not there."""
        if self._engine.why_not_ready() is not None:
            return Response(status_code=NOT_READY)
        self._probes += 1
        probe = Request(f"HEALTH_CHECK_{self._probes}", np.zeros(1, dtype=np.int32), Sampling(max_new_tokens=1, temperature=0.0))
        try:
            await asyncio.wait_for(self._generate.run([probe]), HEALTH_SECONDS)
        except TimeoutError:
            return Response(status_code=NOT_READY)
        return Response(status_code=200)

    async def ping(self, http: HttpRequest) -> Response:
        """200."""
        return Response(status_code=200)

    async def metrics(self, http: HttpRequest) -> Response:
        """Prometheus text."""
        return Response(self._engine.metrics.text(self._engine.weights.path), media_type="text/plain; version=0.0.4")

    async def model_info(self, http: HttpRequest) -> Response:
        """What is served."""
        engine = self._engine
        return reply({
            "model_path": engine.weights.path,
            "tokenizer_path": engine.options.folder,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": engine.weights.version,
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": engine.runner.model_type,
            "architectures": engine.runner.architectures,
        })  # fmt: skip

    async def server_info(self, http: HttpRequest) -> Response:
        """Options and state. Unlike SGLang's it does not show the token."""
        engine, metrics = self._engine, self._engine.metrics
        options = dataclasses.asdict(engine.options)
        del options["token"]
        state = {
            "last_gen_throughput": metrics.gen_throughput,
            "memory_usage": {"token_capacity": metrics.capacity},
            "effective_max_running_requests_per_dp": engine.runner.rows,
        }
        return reply({
            **options,
            "model_path": engine.weights.path,
            "weight_version": engine.weights.version,
            "enable_deterministic_inference": engine.options.batch_invariant,
            "enable_return_routed_experts": engine.runner.routed_experts,
            "skip_tokenizer_init": engine.tokenizer is None,
            "status": "ready",
            "engine": "miles",
            "version": miles.__version__,
            "context_length": engine.context_length,
            "max_total_num_tokens": metrics.capacity,
            "max_req_input_len": engine.context_length - 1,
            "internal_states": [state],
        })  # fmt: skip

    def _load(self) -> dict[str, Any]:
        metrics = self._engine.metrics
        return {
            "dp_rank": 0,
            "num_running_reqs": metrics.running,
            "num_waiting_reqs": metrics.queued,
            "num_total_reqs": metrics.running + metrics.queued,
            "num_used_tokens": metrics.used_tokens,
            "max_total_num_tokens": metrics.capacity,
            "token_usage": metrics.used_tokens / metrics.capacity,
            "gen_throughput": metrics.gen_throughput,
        }

    async def loads(self, http: HttpRequest) -> Response:
        """Load of the one data-parallel rank."""
        return reply({"version": miles.__version__, "dp_rank_count": 1, "loads": [self._load()]})

    async def get_load(self, http: HttpRequest) -> Response:
        """The older form of /v1/loads."""
        load = self._load()
        return reply([{
            "dp_rank": 0, "num_reqs": load["num_total_reqs"], "num_waiting_reqs": load["num_waiting_reqs"], "num_tokens": load["num_used_tokens"],
        }])  # fmt: skip

    # -- pause, abort, flush -----------------------------------------------------------------------------------------------

    async def pause(self, http: HttpRequest) -> Response:
        """Modes abort (default), retract, in_place; generate calls block until /continue_generation."""
        mode = _field(await _body(http), "mode", str, "abort")
        if mode not in MODES:
            raise RequestError(f"mode is {mode!r}; choose abort, retract or in_place")
        async with self._gate.control():
            self._gate.paused = True
            if mode == "abort":
                await self._ask(self._engine.resume)  # aborted requests of an earlier pause of another mode must end
                self._generate.abort(None)
                await self._gate.drained()
            else:
                await self._ask(lambda: self._engine.pause(mode))
        return reply({"message": f"Generation paused successfully (mode: {mode}).", "status": "ok"})

    async def resume(self, http: HttpRequest) -> Response:
        """Ends a pause; harmless without one."""
        await _body(http)
        async with self._gate.control():
            await self._ask(self._engine.resume)
            self._gate.paused = False
        return reply({"message": "Generation continued successfully.", "status": "ok"})

    async def abort(self, http: HttpRequest) -> Response:
        """Aborts by exact id, or all. Always an empty 200."""
        body = await _body(http)
        rid, everything = _field(body, "rid", str, ""), _field(body, "abort_all", bool, False)
        if everything or rid:
            self._generate.abort(None if everything else rid)
        return Response(status_code=200)

    async def flush(self, http: HttpRequest) -> Response:
        """Empties the prefix cache; waits up to ?timeout= seconds for the engine to be idle."""
        try:
            timeout = float(http.query_params.get("timeout", "0"))
        except ValueError as error:
            raise BadRequest("timeout: Input should be a valid number") from error
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not await self._ask(self._engine.flush):
            if not loop.time() < deadline:
                return Response("Failed to flush cache: requests are unfinished.\n", 400)
            await asyncio.sleep(0.02)
        return Response("Cache flushed.\n", 200)

    # -- weights -----------------------------------------------------------------------------------------------------------

    async def _update(self, body: dict[str, Any], load: Callable[[], str], more: dict[str, Any]) -> Response:
        flush = _field(body, "flush_cache", bool, True)
        version = body.get("weight_version")
        if version is not None and not isinstance(version, str):
            raise BadRequest("weight_version: Input should be a valid string")
        if _field(body, "abort_all_requests", bool, False):
            self._generate.abort(None)
        async with self._gate.writing():
            success, message = await self._ask(lambda: self._engine.update(load, flush, version))
        return reply({"success": success, "message": message, **more}, 200 if success else 400)

    async def update_from_disk(self, http: HttpRequest) -> Response:
        """Loads a Hugging Face folder; the old weights stay on failure."""
        body = await _body(http)
        path = _field(body, "model_path", str, "")
        if not path:
            raise BadRequest("model_path: Field required")
        if body.get("load_format") not in (None, "auto", "safetensors"):
            raise RequestError("load_format of a disk update can be auto or safetensors; others are not supported by the embedded engine")
        return await self._update(body, lambda: self._engine.weights.from_disk(path), {"num_paused_requests": 0})

    async def update_from_tensor(self, http: HttpRequest) -> Response:
        """Loads one bucket: base64 of a safetensors file (load_format "safetensors", our extension; pickles are refused)."""
        body = await _body(http)
        if body.get("load_format") != "safetensors":
            message = 'load_format must be "safetensors": the embedded engine does not unpickle what comes over a socket'
            return reply({"success": False, "message": message}, 400)
        payload = _field(body, "serialized_named_tensors", list, None)
        if not payload or not all(isinstance(item, str) for item in payload):
            raise BadRequest("serialized_named_tensors: Input should be a list of base64 strings, one per tensor-parallel rank")
        if len(payload) != 1:
            return reply({"success": False, "message": f"serialized_named_tensors has {len(payload)} entries; this engine has 1 rank"}, 400)
        return await self._update(body, lambda: self._engine.weights.from_bucket(payload[0]), {})

    async def update_version(self, http: HttpRequest) -> Response:
        """Names the weights; aborts all requests unless told otherwise."""
        body = await _body(http)
        version = _field(body, "new_version", str, "")
        if "new_version" not in body:
            raise BadRequest("new_version: Field required")
        if _field(body, "abort_all_requests", bool, True):
            self._generate.abort(None)
        await self._ask(lambda: setattr(self._engine.weights, "version", version))
        return reply({"success": True, "message": f"Weight version updated to {version}", "new_version": version})

    async def weights_checker(self, http: HttpRequest) -> Response:
        """action checksum: of every tensor under its Hugging Face name, and of all of them (miles.models.hf_folder.weight_checksum)."""
        action = _field(await _body(http), "action", str, "checksum")
        if action != "checksum":
            return reply({"success": False, "message": f"action {action!r} is not supported by the embedded engine; choose checksum"}, 400)
        found = await self._ask(self._engine.checksums)
        if found is None:
            return reply({"success": False, "message": "the weights are released; resume memory occupation (tag weights) first"}, 400)
        each, whole = found
        ranks = {name: 0 if name.endswith("rank") else 1 for name in ("tp_rank", "tp_size", "dp_rank", "dp_size", "pp_rank", "pp_size", "rank", "size")}
        rank = {"checksums": each, "per_gpu_checksum": whole, "parallelism_info": ranks}
        return reply({"success": True, "message": "checksum", "ranks": [rank], "per_engine_checksum": whole})

    # -- memory ------------------------------------------------------------------------------------------------------------

    async def _tags(self, http: HttpRequest) -> list[str]:
        tags = _field(await _body(http), "tags", list, None)
        foreign = [tag for tag in tags or [] if tag not in TAGS]
        if foreign:
            raise RequestError(f"tags has {foreign[0]!r}; choose weights, kv_cache or cuda_graph")
        return list(tags or TAGS)

    async def release(self, http: HttpRequest) -> Response:
        """Frees weights and cache; the engine must be idle. Body null."""
        tags = await self._tags(http)
        fault = await self._ask(lambda: self._engine.release(tags))
        if fault is not None:
            raise RequestError(fault)
        return reply(None)

    async def resume_memory(self, http: HttpRequest) -> Response:
        """Allocates again; weights are undefined until updated. Body null."""
        tags = await self._tags(http)
        fault = await self._ask(lambda: self._engine.resume_memory(tags))
        if fault is not None:
            raise RequestError(fault)
        return reply(None)
