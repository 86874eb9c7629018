"""The rollout service's process: takes its port, reads the prompts, serves until the attempt ends."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

import uvicorn

from miles.config.address import family_of
from miles.config.exits import AGAIN, OK, WRONG, TryAgain, UserError
from miles.data.prompts import load_prompts
from miles.data.store.epoch import Fenced
from miles.data.store.events import Events
from miles.data.store.run_dir import RunDir
from miles.rollout.demonstrations import with_responses
from miles.rollout.service import RolloutService
from miles.rollout.service_http import make_app
from miles.run.role import Role, leave_fault, load_run, main

POLL_SECONDS = 0.1
LINGER_SECONDS = 2.0  # after the end, for those who have not asked yet


def listen(host: str, port: int, chosen: bool = True) -> socket.socket:
    """A listening socket. Raises UserError when the port is in use or the address is not ours; TryAgain for a port that nobody chose."""
    try:
        return socket.create_server((host, port), family=family_of(host), backlog=1024)
    except OSError as error:
        if not chosen:
            raise TryAgain(f"the free port {port} was taken by another program meanwhile; the next attempt takes another") from error
        raise UserError(f"cluster.port: can't serve at {host}:{port} ({error.strerror}); choose another, or 0 for a free one") from error


def serve(role: Role) -> None:
    """Body of the role. Returns when the run is finished; raises UserError or TryAgain as the attempt ended.

    The port is taken first, so that callers wait in its queue while prompts are read.
    """
    address = urlsplit(role.service)
    assert address.hostname is not None, "a URL with a host"
    assert address.port is not None, "a URL with a port"
    config = load_run(role.run_dir)
    listener = listen(address.hostname, address.port, chosen=config.cluster.port != 0)
    with Events(RunDir(role.run_dir), role.name, role.rank, role.epoch).phase("prompts", 0) as facts:
        prompts = load_prompts(config)
        if "warm_start" in prompts:
            prompts["warm_start"] = with_responses(prompts["warm_start"], config.warm_start)
        facts.update({name: len(found) for name, found in prompts.items()})
    for name, found in prompts.items():
        print(f"service: {name}: {len(found)} prompts", flush=True)
    silence = float(os.environ.get("MILES_SILENCE_SECONDS", "60"))
    asyncio.run(_serve(role, listener, lambda: RolloutService(config, RunDir(role.run_dir), role.epoch, prompts, silence)))


async def _serve(role: Role, listener: socket.socket, make: Callable[[], RolloutService]) -> None:
    service = make()  # in the loop, since it holds events
    settings = uvicorn.Config(
        make_app(service, role.token), log_config=None, access_log=False, lifespan="off", timeout_keep_alive=600, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(settings)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while service.end is None and not task.done():
        service.watch()
        try:
            service.fence.check()
        except Fenced as error:
            service.finish(AGAIN, str(error))
        await asyncio.sleep(POLL_SECONDS)
    if service.end is not None and service.end.culprit:
        leave_fault(role, AGAIN, service.end.message, service.end.culprit)
    await asyncio.wait([task], timeout=LINGER_SECONDS)
    server.should_exit = True
    await task
    end = service.end
    if end is None or end.code == OK:
        return
    if end.code == WRONG:
        raise UserError(end.message)
    if end.code == AGAIN:
        raise TryAgain(end.message)
    raise RuntimeError(end.message)


if __name__ == "__main__":
    main("service", serve)
