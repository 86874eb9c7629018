"""The HTTP side of the embedded engine: SGLang 0.5.15's routes on starlette and uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from miles.config.address import bound, url_of
from miles.config.exits import UserError
from miles.engine.control import Control, reply
from miles.engine.engine import Engine, EngineThread
from miles.engine.gate import Gate
from miles.engine.generate import Generate
from miles.engine.options import EngineOptions
from miles.engine.protocol import BadRequest, RequestError, type_error, value_error

SWITCH_SECONDS = 0.001  # how long the HTTP side may hold the interpreter while the engine's thread waits for it
Endpoint = Callable[[HttpRequest], Awaitable[Response]]


class Auth:
    """Bearer token on every path but those that begin with /health or /metrics, as in SGLang. An empty token leaves all open."""

    def __init__(self, app: ASGIApp, token: str):
        self._app = app
        self._expected = f"Bearer {token}".encode() if token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._expected:
            is_open = scope["path"].startswith(("/health", "/metrics")) or scope["method"] == "OPTIONS"
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not is_open and not hmac.compare_digest(given, self._expected):
                await reply({"error": "Unauthorized"}, 401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _answering(endpoint: Endpoint) -> Endpoint:
    """Turns faults of the request into SGLang's 400s. Anything else is a bug: 500, and its traceback in the log."""

    async def answer(request: HttpRequest) -> Response:
        try:
            return await endpoint(request)
        except BadRequest as error:
            return reply(type_error(str(error)), 400)
        except orjson.JSONDecodeError as error:
            return reply(type_error(f"the body is not JSON: {error}"), 400)
        except RequestError as error:
            return reply(value_error(str(error)), 400)

    return answer


def build_app(thread: EngineThread) -> ASGIApp:
    """The ASGI application over an engine's thread, which is started with the application."""
    gate = Gate()
    generate = Generate(thread, gate)
    control = Control(thread, gate, generate)
    both, post, get = ["GET", "POST"], ["POST"], ["GET"]
    table: list[tuple[str, Endpoint, list[str]]] = [
        ("/generate", generate.endpoint, ["POST", "PUT"]),
        ("/health", control.health, get),
        ("/health_generate", control.health_generate, get),
        ("/ping", control.ping, get),
        ("/metrics", control.metrics, get),
        ("/model_info", control.model_info, get),
        ("/get_model_info", control.model_info, get),
        ("/server_info", control.server_info, get),
        ("/get_server_info", control.server_info, get),
        ("/v1/loads", control.loads, get),
        ("/get_load", control.get_load, get),
        ("/pause_generation", control.pause, post),
        ("/continue_generation", control.resume, post),
        ("/abort_request", control.abort, post),
        ("/flush_cache", control.flush, both),
        ("/update_weights_from_disk", control.update_from_disk, post),
        ("/update_weights_from_tensor", control.update_from_tensor, post),
        ("/update_weight_version", control.update_version, post),
        ("/release_memory_occupation", control.release, both),
        ("/resume_memory_occupation", control.resume_memory, both),
        ("/weights_checker", control.weights_checker, both),
    ]
    app = Starlette(routes=[Route(path, _answering(endpoint), methods=methods) for path, endpoint, methods in table])
    return Auth(app, thread.engine.options.token)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not listening yet. Raises UserError when the port is taken or the address is not this machine's."""
    try:
        return bound(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use; choose another, or 0 for a free one") from error
        if error.errno in (errno.EADDRNOTAVAIL, errno.EACCES) or isinstance(error, socket.gaierror):
            raise UserError(f"can't bind to port {port} of {host}: {error.strerror}; choose an address of this machine") from error
        raise


def serve(options: EngineOptions, ready: Callable[[str, Engine], None] | None = None) -> None:
    """Loads the model, serves until SIGTERM or SIGINT. `ready(url, engine)` is called once connections are accepted.

    Raises UserError for a port in use, an unknown family, or a folder that can't be read.
    """
    sock = bind(options.host, options.port)
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        engine = Engine(options)
        thread = EngineThread(engine)
        asyncio.run(_serve(thread, sock, options, ready))
    finally:
        sock.close()


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which would end the process by the signal after a clean shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(thread: EngineThread, sock: socket.socket, options: EngineOptions, ready: Callable[[str, Engine], None] | None) -> None:
    config = uvicorn.Config(build_app(thread), log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=5, timeout_graceful_shutdown=1)
    server = _Server(config)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, lambda: setattr(server, "should_exit", True))
    thread.start()
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    if ready is not None and server.started:
        await loop.run_in_executor(None, ready, url_of(options.host, sock.getsockname()[1]), thread.engine)
    await task
    thread.stop()
