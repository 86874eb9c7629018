"""HTTP of the rollout service: routes, the token, the epoch, and how the end of an attempt is told.

200, or 202 for "not yet, ask again"; 401 without the token; 409 when the attempt is fenced off or given up (exit 75); 422 with
{"error": line} for a user's mistake (exit 78). After POST /stop, answers carry "stop": true: save, then end.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from miles.config.exits import AGAIN, OK, WRONG
from miles.data.store.manifest import NAME as MANIFEST
from miles.rollout.guests import Stale
from miles.rollout.jobs import Job
from miles.rollout.service import FAILED, RolloutService, as_end

LONGEST_WAIT_SECONDS = 30.0
TELL_SECONDS = 2.0
CODES = {OK: 200, AGAIN: 409, WRONG: 422}

Handler = Callable[[dict[str, Any]], Awaitable[tuple[int, Any]]]


def _json(status: int, content: Any) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def make_app(service: RolloutService, token: str) -> Starlette:
    """The application; `token` is the run's."""

    def route(method: str, path: str, handler: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            given = request.headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {token}".encode()):
                return _json(401, {"error": "this address needs the run's token (attempts/…/token)"})
            try:
                fields = dict(request.query_params) if method == "GET" else orjson.loads(await request.body() or b"{}")
                _check_epoch(service, fields.get("epoch", request.headers.get("x-miles-epoch")))
                return _json(*await handler(fields))
            except Stale as error:
                return _json(409, {"error": "fenced", "message": str(error)})
            except Exception as error:
                end = as_end(error)
                if end is None:  # a bug: the attempt ends, with a traceback in the service's log
                    service.finish(FAILED, f"the rollout service failed: {type(error).__name__}: {error}")
                    raise
                service.finish(end.code, end.message, end.culprit)
                return _json(CODES.get(end.code, 500), {"error": end.message, "exit": end.code})

        return Route(path, endpoint, methods=[method])

    async def register(fields: dict[str, Any]) -> tuple[int, Any]:
        service.check()
        service.turn_away(fields.get("place", ""))
        rank = service.register(**{name: value for name, value in fields.items() if name != "epoch"})
        return 200, {"epoch": service.epoch, "rank": rank}

    async def peers(fields: dict[str, Any]) -> tuple[int, Any]:
        count = int(fields.get("count", 1))
        found = await service.until(lambda: service.of_role(fields["role"], count, fields.get("place")), _wait(fields))
        return (200, found) if found else (202, [])

    async def put_value(fields: dict[str, Any]) -> tuple[int, Any]:
        service.values[fields["key"]] = fields["value"]
        service.changed()
        return 200, {}

    async def get_value(fields: dict[str, Any]) -> tuple[int, Any]:
        if await service.until(lambda: fields["key"] in service.values, _wait(fields)):
            return 200, {"value": service.values[fields["key"]]}
        return 202, {}

    async def work(fields: dict[str, Any]) -> tuple[int, Any]:
        return 200, await service.work(fields)

    async def batch(fields: dict[str, Any]) -> tuple[int, Any]:
        job = Job.parse(fields["job"])
        manifest = await service.batch(job)
        if manifest is None:
            made = service.jobs.get((job.kind, job.step))
            return 202, {"progress": made.progress() if made else {}, "stop": service.stop, "engines": service.new_engines()}
        return 200, {"manifest": str(service.run_dir.batch_of(job.kind, job.step) / MANIFEST), "next_draw": manifest.next_draw, "stop": service.stop}

    async def announce(fields: dict[str, Any]) -> tuple[int, Any]:
        service.check()
        service.notices += fields.pop("notices", [])
        service.announced.update({name: value for name, value in fields.items() if name != "epoch"})
        return 200, {"stop": service.stop}

    async def status(fields: dict[str, Any]) -> tuple[int, Any]:
        return 200, service.status()

    async def stop(fields: dict[str, Any]) -> tuple[int, Any]:
        service.stop = True
        service.changed()
        return 200, {"stop": True}

    async def finish(fields: dict[str, Any]) -> tuple[int, Any]:
        """Ends the attempt, and waits a little until the workers know, and the launcher what was noticed: the service may be stopped as soon as the caller leaves."""
        workers = {rank for role, rank in service.heard if role == "worker"}
        service.finish(int(fields.get("exit", OK)), str(fields.get("message", "finished")))
        await _until_told(service, workers)
        return 200, {}

    async def heartbeat(fields: dict[str, Any]) -> tuple[int, Any]:
        service.heartbeat(fields["role"], int(fields["rank"]), fields.get("place", ""), fields.get("progress"), bool(fields.get("dumped")))
        if service.end is not None and service.end.code == AGAIN:  # other ends are told to the main thread's next call
            raise service.end
        return 200, {"stop": service.stop, "dump": service.hang is not None}

    async def engines(fields: dict[str, Any]) -> tuple[int, Any]:
        return 200, [peer["url"] for peer in service.peers if peer["role"] == "engine"]

    async def sync(fields: dict[str, Any]) -> tuple[int, Any]:
        service.sync(fields["checksum"], fields["engines"], fields["lost"])
        return 200, {}

    async def leave(fields: dict[str, Any]) -> tuple[int, Any]:
        """A place says goodbye. Where nobody may leave, its supervisor's end is what ends the attempt; so does a failure that would come again."""
        if service.guests is not None and service.end is None and fields["place"] not in service.guests.lost:
            if int(fields["code"]) == AGAIN:
                service.lose(fields["place"], str(fields["why"]))
            else:
                service.finish(WRONG if int(fields["code"]) == WRONG else FAILED, str(fields["why"]))
        return 200, {}

    async def health(request: Request) -> Response:
        return Response(status_code=200)

    return Starlette(
        routes=[
            Route("/health", health),
            route("POST", "/register", register),
            route("GET", "/peers", peers),
            route("GET", "/engines", engines),
            route("POST", "/sync", sync),
            route("POST", "/leave", leave),
            route("POST", "/value", put_value),
            route("GET", "/value", get_value),
            route("POST", "/work", work),
            route("POST", "/batch", batch),
            route("POST", "/announce", announce),
            route("GET", "/status", status),
            route("POST", "/stop", stop),
            route("POST", "/finish", finish),
            route("POST", "/heartbeat", heartbeat),
        ]
    )


def _wait(fields: dict[str, Any]) -> float:
    return min(float(fields.get("wait", 0)), LONGEST_WAIT_SECONDS)


def _check_epoch(service: RolloutService, given: Any) -> None:
    """Who comes from an older attempt is sent away; when we are the older one, everybody is."""
    service.fence.check()
    if given is not None and int(given) != service.epoch:
        raise Stale(f"this is attempt {service.epoch}, the call is of attempt {given}")


async def _until_told(service: RolloutService, workers: set[int]) -> None:
    deadline = time.monotonic() + TELL_SECONDS
    while not (workers <= service.told and service.notices_told == len(service.notices)) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
