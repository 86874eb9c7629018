"""The client of an engine: SGLang 0.5.15's HTTP, spoken alike to SGLang and to the embedded engine. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

import httpx
import orjson

from miles.engine.reply import ByteBudget, read_reply

PauseMode = Literal["abort", "retract", "in_place"]
Tag = Literal["weights", "kv_cache", "cuda_graph"]


class EngineError(RuntimeError):
    """The engine answered with an error, or not at all (`status` 0)."""

    def __init__(self, status: int, message: str, route: str):
        super().__init__(f"engine {route}: {status or 'no answer'}: {message}")
        self.status = status
        self.message = message


def _message(response: httpx.Response) -> str:
    """The text of an error in any of SGLang's shapes."""
    try:
        body = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return response.text.strip()
    if isinstance(body, dict):
        error = body.get("error", body.get("message", body))
        return str(error.get("message", error) if isinstance(error, dict) else error)
    return str(body)


class EngineClient:
    """One engine at `url` (http://host:port). Bearer `token` may be empty. `timeout` [s] bounds control calls; a generate
    call has none unless one is given, since a paused engine holds it until it continues. `budget` bounds the bytes of generate
    replies that are read at a time; the engine keeps the others.

    Use it as an async context manager, or call close(); it opens its connections in the event loop of the first call.
    """

    def __init__(self, url: str, token: str = "", timeout: float = 600.0, budget: ByteBudget | None = None):
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout = timeout
        self.budget = budget
        self._http: httpx.AsyncClient | None = None

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def _call(self, method: str, route: str, body: Any = None, timeout: float | None = -1.0, stream: bool = False) -> httpx.Response:
        if self._http is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=4.0)
            # trust_env off: a proxy of the site must not see calls to an engine on loopback.
            self._http = httpx.AsyncClient(base_url=self.url, headers=self._headers, limits=limits, trust_env=False)
        content = None if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        headers = None if body is None else {"Content-Type": "application/json"}
        wait = httpx.Timeout(self._timeout if timeout == -1.0 else timeout, connect=30.0)
        request = self._http.build_request(method, route, content=content, headers=headers, timeout=wait)
        try:
            response = await self._http.send(request, stream=stream)
            if response.status_code >= 400:
                await response.aread()
                raise EngineError(response.status_code, _message(response), route)
        except httpx.HTTPError as error:
            raise EngineError(0, f"{type(error).__name__}: {error}", route) from error
        return response

    async def _json(self, method: str, route: str, body: Any = None, timeout: float | None = -1.0) -> Any:
        response = await self._call(method, route, body, timeout)
        return orjson.loads(response.content)

    async def generate(self, payload: dict[str, Any], timeout: float | None = None) -> Any:
        """/generate: one reply (a dict), or a list of them for a batch or n > 1; routed_experts are base64 as bytes. Raises EngineError."""
        response = await self._call("POST", "/generate", payload, timeout, stream=True)
        try:
            return await read_reply(response, self.budget)
        except httpx.HTTPError as error:
            raise EngineError(0, f"{type(error).__name__}: {error}", "/generate") from error
        finally:
            await response.aclose()

    async def model_info(self) -> dict[str, Any]:
        """Model path, weight_version and kind of the model served."""
        return await self._json("GET", "/model_info")

    async def server_info(self) -> dict[str, Any]:
        """Options and state of the server."""
        return await self._json("GET", "/server_info")

    async def health(self, generate: bool = False, timeout: float = 30.0) -> bool:
        """Whether the engine answers 200; `generate` makes it run one token first."""
        try:
            await self._call("GET", "/health_generate" if generate else "/health", timeout=timeout)
        except EngineError:
            return False
        return True

    async def pause(self, mode: PauseMode = "abort") -> None:
        """Stops generation: abort ends what runs, retract drops its cache and keeps its tokens, in_place keeps all."""
        await self._call("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Ends a pause (continue_generation)."""
        await self._call("POST", "/continue_generation", {})

    async def flush(self, timeout: float = 30.0) -> None:
        """Empties the prefix cache; waits up to `timeout` [s] for the engine to be idle, then raises EngineError 400."""
        await self._call("POST", f"/flush_cache?timeout={timeout:g}")

    async def abort(self, rid: str | None = None) -> None:
        """Aborts one request by its id, or all of them."""
        await self._call("POST", "/abort_request", {"rid": rid or "", "abort_all": rid is None})

    async def update_from_disk(self, path: str, version: str | int | None = None, flush_cache: bool = True, **fields: Any) -> str:
        """Loads a Hugging Face folder. The old weights stay when it fails (EngineError 400). Returns the engine's message."""
        body = {"model_path": str(path), "flush_cache": flush_cache, **fields}
        if version is not None:
            body["weight_version"] = str(version)
        return (await self._json("POST", "/update_weights_from_disk", body))["message"]

    async def update_from_tensor(
        self, serialized: Sequence[str], load_format: str | None = "safetensors", version: str | int | None = None,
        flush_cache: bool = True, **fields: Any,
    ) -> str:  # fmt: skip
        """Loads one bucket of named tensors: `serialized` holds one base64 text per tensor-parallel rank.

        The embedded engine reads load_format "safetensors"; SGLang reads its own (None, "flattened_bucket").
        Send `flush_cache` and `version` with the last bucket only.
        """
        body = {"serialized_named_tensors": list(serialized), "load_format": load_format, "flush_cache": flush_cache, **fields}
        if version is not None:
            body["weight_version"] = str(version)
        return (await self._json("POST", "/update_weights_from_tensor", body))["message"]

    async def update_version(self, version: str | int, abort_all: bool = False) -> None:
        """Names the weights served."""
        await self._call("POST", "/update_weight_version", {"new_version": str(version), "abort_all_requests": abort_all})

    async def release_memory(self, tags: Sequence[Tag] | None = None) -> None:
        """Gives memory back (weights, kv_cache, cuda_graph; None: all). The engine must be idle."""
        await self._call("POST", "/release_memory_occupation", {"tags": None if tags is None else list(tags)})

    async def resume_memory(self, tags: Sequence[Tag] | None = None) -> None:
        """Takes memory again. Weights are undefined until they are updated."""
        await self._call("POST", "/resume_memory_occupation", {"tags": None if tags is None else list(tags)})

    async def checksums(self) -> dict[str, Any]:
        """/weights_checker: per parameter, per rank, and `per_engine_checksum`."""
        return await self._json("POST", "/weights_checker", {"action": "checksum"})

    async def metrics(self) -> str:
        """Prometheus text."""
        return (await self._call("GET", "/metrics")).text
