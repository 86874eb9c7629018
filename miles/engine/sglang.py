"""SGLang as the engine of a run: its command line from the configuration, its process, and the wait until it serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from miles.config.exits import TryAgain, UserError
from miles.config.schema import RunConfig
from miles.config.sglang import followed
from miles.engine.child import around_proxies, die_with_parent, relay, write_private

START_SECONDS = 1200.0
LAST_LINES_SECONDS = 5.0  # processes of the server's that outlive it hold its output open


@dataclass(frozen=True)
class Server:
    """The server's process, and the thread that copies its output to this role's log."""

    process: subprocess.Popen[bytes]
    output: threading.Thread

    def wait(self) -> int:
        """Its exit code, once it has ended and its last lines are in the log."""
        code = self.process.wait()
        self.output.join(LAST_LINES_SECONDS)
        return code


def arguments(config: RunConfig, folder: str, host: str, port: int) -> list[str]:
    """Arguments of sglang.launch_server but the token. What the run needs comes first; rollout.sglang adds to it.

    Names in rollout.sglang are SGLang's own (checked by miles.config.options): true is a bare switch, false and null leave it out.
    """
    wanted: dict[str, object] = {
        "model_path": folder,
        "host": host,
        "port": port,
        "tp_size": config.rollout.num_gpus_per_engine,
        "random_seed": config.seed,
        **{name: entry.value for name, entry in followed(config).items()},
        **config.rollout.sglang,
    }
    words = []
    for name, value in wanted.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return words


def start(config: RunConfig, folder: str, host: str, port: int, token: str, private: Path) -> Server:
    """Start the server as a child that dies with us and whose output goes to this role's log.

    Command lines are public on a machine, so the token goes by SGLang's --config file, made at `private` (.yaml) for the owner alone. SGLang
    logs its arguments, so the token is taken out of what it prints.
    """
    write_private(private, json.dumps({"api-key": token}) + "\n")  # JSON is YAML
    command = [sys.executable, "-m", "sglang.launch_server", "--config", str(private), *arguments(config, folder, host, port)]
    # Not a tokenizer's worth of threads each, and no proxies on the way to loopback.
    env = {**os.environ, **around_proxies(host)}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, preexec_fn=die_with_parent)
    assert process.stdout is not None, "a pipe"
    output = threading.Thread(target=relay, args=(process.stdout, token), name="sglang-output", daemon=True)
    output.start()
    return Server(process, output)


def wait_ready(server: Server, url: str, seconds: float = START_SECONDS) -> None:
    """Until /health answers 200. Raises UserError when the server refuses its arguments, TryAgain when it dies or takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            code = server.wait()
            if code == 2:
                raise UserError("rollout.sglang: SGLang refused its arguments; its message is in the engine's log")
            raise TryAgain(f"SGLang ended with exit code {code} before it served")
        try:
            if httpx.get(url + "/health", timeout=25.0, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(1.0)
    raise TryAgain(f"SGLang did not serve within {seconds:.0f} s")
