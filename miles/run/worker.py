"""The rollout worker's process: finds the model's folder and its engines through the service, then works."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import httpx
import orjson

from miles.config.exits import TryAgain, UserError
from miles.config.placement import processes
from miles.data.store.epoch import Fence
from miles.data.store.files import Damaged
from miles.data.store.retention import retire_journals
from miles.data.store.run_dir import RunDir
from miles.engine.client import EngineClient
from miles.rollout.engines import Engines
from miles.rollout.rewards import Scorer
from miles.rollout.tokenizer import Tokenizer
from miles.rollout.worker import Worker
from miles.run.coordinator import Coordinator
from miles.run.role import Role, load_run, main


def caller(role: Role, http: httpx.AsyncClient) -> Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]:
    """POST /work as a function. Raises TryAgain (service lost, fenced, given up), UserError (somebody's mistake)."""

    async def call(report: dict[str, Any]) -> dict[str, Any]:
        try:
            reply = await http.post("/work", content=orjson.dumps({**report, "place": role.place, "epoch": role.epoch}))
        except httpx.TransportError as error:
            raise TryAgain(f"the rollout service at {role.service} is lost ({type(error).__name__} {error})") from error
        body = orjson.loads(reply.content) if reply.headers.get("content-type") == "application/json" else {}
        if reply.status_code == 409:
            raise TryAgain(body.get("message") or body["error"])
        if reply.status_code == 422:
            raise UserError(body["error"])
        if reply.status_code != 200:
            raise RuntimeError(f"rollout service: POST /work answered {reply.status_code}: {reply.text[:500]}")
        return dict(body)

    return call


def work(role: Role) -> None:
    """Body of the role."""
    config, run_dir = load_run(role.run_dir), RunDir(role.run_dir)
    own = sum(process.role == "engine" for process in processes(config, "rollout", role.node))
    role = replace(role, rank=Coordinator(role).register(pid=os.getpid(), host=socket.gethostname(), engines=own))
    service = Coordinator(role)
    service.keep_alive()
    Scorer.check(config)
    tokenizer = Tokenizer(service.lookup("model"))
    if role.rank == 0:
        _tidy_journals(run_dir, role, service.lookup("resumed"))

    async def find() -> list[EngineClient]:
        found = await asyncio.to_thread(lambda: service.peers("engine", own, place=role.place))
        return [EngineClient(peer["url"], role.token) for peer in found]

    async def body() -> None:
        headers = {"Authorization": f"Bearer {role.token}", "Content-Type": "application/json"}
        async with httpx.AsyncClient(base_url=role.service, headers=headers, timeout=60.0, trust_env=False) as http:
            engines = Engines(find, **({"return_routed_experts": True} if config.rollout.return_routed_experts else {}))
            await Worker(config, run_dir, role.rank, role.epoch, caller(role, http), tokenizer, engines, own).run()

    asyncio.run(body())


def _tidy_journals(run_dir: RunDir, role: Role, resumed: int | None) -> None:
    try:
        retire_journals(Fence(run_dir, role.epoch), resumed)
    except Damaged as error:
        print(f"worker: old journals are kept: {error}", flush=True)


if __name__ == "__main__":
    main("worker", work)
