"""An engine: as a role of a run (MILES_RUN_DIR is set), or on its own with command-line options."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback

from miles.config.address import bind_host, family_of, url_of
from miles.config.exits import OK, WRONG, TryAgain
from miles.config.schema import RunConfig
from miles.data.store.epoch import Fenced
from miles.data.store.events import Events
from miles.data.store.run_dir import RunDir
from miles.engine import sglang
from miles.engine.engine import Engine
from miles.engine.options import EngineOptions, options_from
from miles.engine.server import serve
from miles.run.coordinator import Coordinator, end
from miles.run.role import Role, load_run, main, user_fault


def context_length(config: RunConfig) -> int | None:
    """The longest prompt and response of the run together [tokens], where the configuration bounds both."""
    longest = 0
    for sampling in (config.rollout.sampling, *([config.eval.sampling] if config.eval.interval else [])):
        if sampling.max_context_len is not None:
            longest = max(longest, sampling.max_context_len)
        elif sampling.max_prompt_len is not None:
            longest = max(longest, sampling.max_prompt_len + sampling.max_response_len)
        else:
            return None
    return longest


def options_of(role: Role, config: RunConfig, folder: str) -> EngineOptions:
    """Options of a run's engine. The port is always a free one: several engines share a host, and peers learn it from the service."""
    return EngineOptions(
        folder=folder,
        host=bind_host(config.cluster.host),
        port=0,
        token=role.token,
        device=config.cluster.device,
        dtype=config.model.dtype,
        batch_invariant=config.rollout.batch_invariant,
        max_running_requests=config.rollout.max_running_requests,
        kv_cache_tokens=config.rollout.kv_cache_tokens,
        threads=config.cluster.threads,
        context_length=context_length(config),
        random_seed=config.seed + role.rank,
        skip_tokenizer_init=not config.rollout.sampling.stop and not config.eval.sampling.stop,
    )


def run(role: Role) -> None:
    """Body of the role: serves until it is stopped."""
    began = time.time()
    events = Events(RunDir(role.run_dir), "engine", role.rank, role.epoch)
    service = Coordinator(role)
    service.keep_alive()
    config = load_run(role.run_dir)
    folder = str(service.lookup("model"))
    if config.rollout.engine == "sglang":
        run_sglang(role, config, service, folder, events)
        return
    options = options_of(role, config, folder)

    def updated(start: float, version: str) -> None:
        try:
            events.append("update_weights", int(version) if version.isdecimal() else 0, start, time.time(), weight_version=version)
        except Fenced as error:  # in the engine's thread
            end(role, str(error))

    def ready(url: str, engine: Engine) -> None:
        print(f"engine: serving {options.folder} at {url}", flush=True)
        engine.updated = updated
        events.append("start", 0, began, time.time())
        service.register(url=url, pid=os.getpid())

    serve(options, ready)


def run_sglang(role: Role, config: RunConfig, service: Coordinator, folder: str, events: Events) -> None:
    """SGLang in a child of this process: registered when it serves; its end is ours."""
    host = bind_host(config.cluster.host)
    with socket.create_server((host, 0), family=family_of(host)) as probe:
        port = int(probe.getsockname()[1])
    url = url_of(host, port)
    with events.phase("start", 0):
        server = sglang.start(config, folder, host, port, role.token, RunDir(role.run_dir).attempt(role.epoch) / f"sglang.{role.rank}.yaml")
        sglang.wait_ready(server, url)
    print(f"engine: SGLang serves {folder} at {url}", flush=True)
    service.register(url=url, pid=server.process.pid)
    raise TryAgain(f"SGLang ended with exit code {server.wait()}")


def alone() -> int:
    """Serves by command-line options; the token is in MILES_TOKEN. Returns the exit code."""
    try:
        serve(options_from(sys.argv[1:]), lambda url, engine: print(f"engine: ready at {url}", flush=True))
    except Exception as error:
        line = user_fault(error)
        if line is None:
            traceback.print_exc()
            return 1
        print(f"engine: {line}", file=sys.stderr, flush=True)
        return WRONG
    return OK


if __name__ == "__main__":
    if "MILES_RUN_DIR" in os.environ:
        main("engine", run)
    sys.exit(alone())
