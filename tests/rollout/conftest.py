"""Real service and worker processes on a real run directory; the test plays trainer rank 0."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from miles.config.compose import load_config
from miles.data.store.epoch import new_epoch
from miles.data.store.run_dir import RunDir
from miles.recipes.quickstart import EOS, make_tokenizer
from miles.slurm.meeting import hold_port

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
REPOSITORY = Path(__file__).parents[2]
MODEL = {"model_type": "qwen3_moe", "eos_token_id": 0, "num_experts": 4, "num_hidden_layers": 2, "num_experts_per_tok": 2}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder without weights: a byte-level tokenizer and a config."""
    folder = tmp_path_factory.mktemp("model")
    made = make_tokenizer(["State the final answer to the following arithmetic problem: 3 + 4 - 5 ="] * 50)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}))
    (folder / "config.json").write_text(json.dumps(MODEL | {"eos_token_id": made.token_to_id(EOS)}))
    return folder


# Prompts from files: reading them costs milliseconds, and importing reasoning-gym in every process a second.
FROM_FILES = [f"{name}.{key}" for name in ("warm_start", "data", "eval") for key in ("reasoning_gym=null", "reasoning_gym_config={}")]
FROM_FILES += ["rollout.reward.type=exact_match"]


def sources(folder: Path) -> list[str]:
    """Three files of sums and their answers, as overrides: 48 rows of warm start, 64 of data, 10 of evaluation."""
    overrides = []
    for first, (name, count) in enumerate((("warm_start", 48), ("data", 64), ("eval", 10))):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"question": f"{first} + {number} =", "answer": str(first + number)}) + "\n" for number in range(count)))
        overrides.append(f"{name}.prompt_data={path}")
    return overrides


class Attempt:
    """One attempt at a run: processes, the token, and the calls that trainer rank 0 makes."""

    def __init__(self, folder: Path, model: Path, environment: dict[str, str] | None = None) -> None:
        self.folder, self.model = folder, model
        self.run = RunDir(folder)
        self.epoch = new_epoch(self.run)
        (self.run.attempt(self.epoch) / "logs").mkdir()
        self.port = hold_port("127.0.0.1", 0)  # for the service, which comes to it later
        self.token = secrets.token_hex(8)
        self.url = f"http://127.0.0.1:{self.port.getsockname()[1]}"
        self.environment = environment or {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.token}"}, timeout=40.0, trust_env=False)

    def start(self, *names: str, wait: bool = True) -> Attempt:
        for name in names or ("service", "worker"):
            env = {
                **os.environ,
                "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{REPOSITORY}",
                "OMP_NUM_THREADS": "1",
                "MILES_RUN_DIR": str(self.folder),
                "MILES_EPOCH": str(self.epoch),
                "MILES_RANK": "0",
                "MILES_WORLD_SIZE": "1",
                "MILES_TOKEN": self.token,
                "MILES_SERVICE": self.url,
                **self.environment,
            }
            log = self.log(name).open("ab")
            self.processes[name] = subprocess.Popen([sys.executable, "-m", f"miles.run.{name}"], env=env, stdout=log, stderr=subprocess.STDOUT)
            log.close()
        if wait and (not names or "service" in names):
            self.wait_for(lambda: self.alive("service") is False or self.healthy())
            if self.healthy():
                self.post("/value", key="model", value=str(self.model))
                self.post("/value", key="resumed", value=None)
        return self

    def healthy(self) -> bool:
        try:
            return httpx.get(self.url + "/health", timeout=5.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def alive(self, name: str) -> bool:
        return self.processes[name].poll() is None

    def log(self, name: str) -> Path:
        return self.run.attempt(self.epoch) / "logs" / f"{name}.0.log"

    def logs(self) -> str:
        return "\n".join(f"--- {name}\n{self.log(name).read_text()}" for name in self.processes)

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self.http.post(path, json={"epoch": self.epoch, **fields})

    def batch(self, kind: str, step: int, seconds: float = 180.0, **more: Any) -> Path:
        """Folder of the sealed batch, as the trainer gets it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            reply = self.post("/batch", job={"kind": kind, "step": step, "weight_version": step - 1, "weight_checksum": f"w{step}", **more})
            if reply.status_code == 200:
                return Path(reply.json()["manifest"]).parent
            assert reply.status_code == 202, f"{reply.status_code} {reply.text}\n{self.logs()}"
        raise AssertionError(f"no {kind} batch of step {step} in {seconds} s\n{self.logs()}")

    def status(self) -> dict[str, Any]:
        return dict(self.http.get("/status").json())

    def wait_for(self, ready: Callable[[], Any], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, f"waited {seconds} s\n{self.logs()}"
            time.sleep(0.02)

    def code(self, name: str, seconds: float = 120.0) -> int:
        """Exit code of a process that ends by itself."""
        try:
            return self.processes[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} did not end\n{self.logs()}") from None

    def kill(self, *names: str) -> None:
        for name in names or tuple(self.processes):
            if self.alive(name):
                self.processes[name].send_signal(signal.SIGKILL)
            self.processes[name].wait()

    def close(self) -> None:
        self.kill()
        self.http.close()
        self.port.close()


@pytest.fixture
def attempts(tmp_path: Path, tokenizer_folder: Path) -> Iterator[Callable[..., Attempt]]:
    """attempts(overrides..., model=..., environment=...) makes the next attempt of one run; the first call's overrides make run.yaml."""
    made: list[Attempt] = []
    folder = tmp_path / "run"

    def make(*overrides: str, model: Path = tokenizer_folder, environment: dict[str, str] | None = None) -> Attempt:
        if not folder.exists():
            folder.mkdir()
            config = load_config([REPOSITORY / "configs" / "recipes" / "tiny.yaml"], [f"model.hf_checkpoint={tokenizer_folder}", *FROM_FILES, *sources(tmp_path), *overrides])
            (folder / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        made.append(Attempt(folder, model, environment))
        return made[-1]

    yield make
    for attempt in made:
        attempt.close()
