"""One rehearsed run: a folder, real processes, steps, and what is seen of them from outside."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from miles.config.compose import load_config
from miles.config.process import Process
from miles.data.sample import Sample
from miles.data.store.epoch import new_epoch
from miles.data.store.run_dir import RunDir
from miles.rollout.rewards import RewardContext
from miles.run.environment import Node, environment
from miles.run.role import load_run
from miles.slurm.attempt import start_list

ROOT = Path(__file__).resolve().parents[1]
PROMPT = 256  # tokens of every prompt
VOCABULARY = 151936
ROLES = ("service", "engine", "worker", "trainer")
STILL_SECONDS, STILL_BYTES = 2.0, 1 << 20  # processes whose memory moves by less in so long have started
START_SECONDS = 120


@dataclass(frozen=True)
class Case:
    """What is rehearsed. longest: tokens of the longest response. pace: seconds an engine takes for a token of a response, so that the
    short ones of a group come before the long ones. large: the batch is many times what a process may hold, and that is judged."""

    name: str
    steps: int
    groups: int
    samples: int
    longest: int
    layers: int = 60
    top_k: int = 8
    routes: bool = False
    pace: float = 1e-5
    concurrency: int = 64
    large: bool = False


@dataclass
class Found:
    """What a case showed. steps: the trainer's lines; files: new ones of each step after the first, and their bytes; journals: bytes after
    each step; memory: high water by process; idle: resident before the first step; rise: high water since then, less idle [bytes]; growth: of
    resident memory [bytes] and of open files, over the last three quarters of the steps."""

    case: Case
    steps: list[dict[str, Any]] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    journals: list[int] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    idle: dict[str, int] = field(default_factory=dict)
    rise: dict[str, int] = field(default_factory=dict)
    growth: dict[str, tuple[int, int]] = field(default_factory=dict)


def by_length(samples: list[Sample], context: RewardContext) -> list[float]:
    """A reward that looks at every sample's text and tokens."""
    return [len(sample.response or "") / max(1, len(sample.token_id)) for sample in samples]


def make_model(folder: Path, case: Case) -> None:
    """config.json with the case's experts, and a byte-level tokenizer with a vocabulary of today's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<eos>", *letters, *(f"Ġ{number:x}" for number in range(VOCABULARY))][:VOCABULARY]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "qwen3_moe", "vocab_size": VOCABULARY, "eos_token_id": 0, "num_experts": 256, "num_hidden_layers": case.layers,
        "num_experts_per_tok": case.top_k,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def make_run(folder: Path, case: Case) -> None:
    """run.yaml and what it names."""
    folder.mkdir(parents=True)
    make_model(folder / "model", case)
    rows = ({"question": f"{number:0{PROMPT}d}", "answer": "0"} for number in range(max(512, case.groups)))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {
        "name": case.name, "num_rollout": case.steps, "warm_start.steps": 0, "eval.interval": "null", "model.hf_checkpoint": folder / "model",
        "data.prompt_data": folder / "data.jsonl", "data.reasoning_gym": "null", "data.reasoning_gym_config": "{}", "data.exclude": "[]",
        "rollout.batch_size": case.groups, "rollout.n_samples_per_prompt": case.samples, "rollout.max_concurrency": case.concurrency,
        "rollout.sampling.max_response_len": case.longest, "rollout.return_routed_experts": str(case.routes).lower(),
        "rollout.reward.type": "null", "rollout.reward.path": "benchmarks.rehearse_case.by_length", "train.max_tokens_per_gpu": PROMPT + case.longest,
    }  # fmt: skip
    config = load_config([ROOT / "configs" / "recipes" / "tiny.yaml"], [f"{name}={value}" for name, value in overrides.items()])
    (folder / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))


class Attempt:
    """The processes of one attempt, with the identities that a supervisor would give them."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder, self.case = folder, case
        self.run_dir = RunDir(folder)
        self.epoch = new_epoch(self.run_dir)
        self.logs = self.run_dir.attempt(self.epoch) / "logs"
        self.logs.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.service = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.token = secrets.token_hex(8)
        (self.logs.parent / "service.json").write_text(json.dumps({"url": self.service}))  # as the launcher leaves them
        (self.logs.parent / "token").write_text(self.token)
        self.node = Node.here("rehearsal", 0)
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def start(self) -> None:
        engine = ["benchmarks.rehearse_engine", str(self.folder / "model"), str(self.case.longest), str(PROMPT), str(self.case.pace)]
        commands = {"service": ["miles.run.service"], "engine": engine, "worker": ["miles.run.worker"], "trainer": ["benchmarks.rehearse_trainer"]}
        for role, command in commands.items():
            env = environment(start_list(load_run(self.folder)), self.folder, self.epoch, Process(role, 0, 1, ()), self.node) | {"PYTHONPATH": str(ROOT)}
            with (self.logs / f"{role}.log").open("ab") as log:
                pipe = subprocess.PIPE if role == "trainer" else None
                self.processes[role] = subprocess.Popen(
                    [sys.executable, "-m", *command], env=env, stdin=pipe, stdout=pipe or log, stderr=log, text=True
                )
        self._publish()

    def _publish(self) -> None:
        deadline = time.monotonic() + 60
        body = json.dumps({"key": "model", "value": str(self.folder / "model"), "epoch": self.epoch}).encode()
        request = urllib.request.Request(f"{self.service}/value", body, {"Authorization": f"Bearer {self.token}"})
        while True:
            try:
                urllib.request.urlopen(request, timeout=10).close()
                return
            except OSError:
                self.check()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def last_reply(self) -> float:
        """When the engine's last reply had gone out [Unix seconds]."""
        request = urllib.request.Request(f"{self.service}/peers?role=engine", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as reply:
            url = json.load(reply)[0]["url"]
        with urllib.request.urlopen(f"{url}/last", timeout=10) as reply:
            return float(json.load(reply)["last"])

    def started(self) -> dict[str, int]:
        """Wait until every process has imported what it needs and stands idle; its resident memory by then [bytes]."""
        self._answer()
        resident: dict[str, int] = {}
        still, deadline = time.monotonic(), time.monotonic() + START_SECONDS
        while time.monotonic() < still + STILL_SECONDS:
            self.check()
            now = {role: memory_of(pid, "VmRSS") for role, pid in self.pids().items()}
            if now.keys() != resident.keys() or "reward" not in now or any(abs(now[role] - resident[role]) > STILL_BYTES for role in now):
                still, resident = time.monotonic(), now
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {START_SECONDS} s the processes do not stand still: {now}")
            time.sleep(0.05)
        return resident

    def step(self, number: int) -> dict[str, Any]:
        """Let the trainer make a step; its line."""
        trainer = self.processes["trainer"]
        assert trainer.stdin is not None
        print(number, file=trainer.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The trainer's next line."""
        trainer = self.processes["trainer"]
        assert trainer.stdout is not None
        line = trainer.stdout.readline()
        if not line:
            trainer.wait()
            self.check()
        return dict(json.loads(line))

    def check(self) -> None:
        """Raise when a process has ended, with the end of its log."""
        for role, process in self.processes.items():
            if process.poll() is not None:
                time.sleep(0.5)
                logs = "\n".join(f"--- {name}\n{(self.logs / f'{name}.log').read_text()[-2000:]}" for name in ROLES)
                raise RuntimeError(f"{role} ended with code {process.returncode}\n{logs}")

    def pids(self) -> dict[str, int]:
        """Of every role, and of the worker's scoring processes together as `reward`."""
        found = {role: process.pid for role, process in self.processes.items()}
        children = Path(f"/proc/{found['worker']}/task/{found['worker']}/children").read_text().split()
        spawned = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return found | {f"reward {index}" if index else "reward": int(pid) for index, pid in enumerate(spawned)}

    def finish(self) -> None:
        """Let the run end as it should."""
        trainer = self.processes["trainer"]
        assert trainer.stdin is not None
        trainer.stdin.close()
        for role in ("trainer", "worker", "service"):
            code = self.processes[role].wait(60)
            if code != 0:
                raise RuntimeError(f"{role} ended with code {code}\n{(self.logs / f'{role}.log').read_text()[-2000:]}")

    def kill(self) -> None:
        """Whatever still runs."""
        for process in self.processes.values():
            process.kill()
            process.wait()


def memory_of(pid: int, what: str) -> int:
    """VmHWM (high water) or VmRSS of a process [bytes]."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(what)


def forget_high_water(pid: int) -> None:
    """VmHWM counts from here."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_files(pid: int) -> int:
    """Descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def sizes(folder: Path) -> dict[Path, int]:
    """Every file of a run but what an attempt has one of a process (logs, staging, events), with its size [bytes]."""
    apart = {"attempts", "events"}
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file() and not apart & set(path.relative_to(folder).parts)}


def rehearse(case: Case, folder: Path, say: Callable[[str], None]) -> Found:
    """Run a case in a new folder and look at it. Files and bytes count from the second step on: the first also makes what grows."""
    make_run(folder, case)
    attempt = Attempt(folder, case)
    found = Found(case)
    try:
        attempt.start()
        idle = attempt.started()
        starts = {role: memory_of(pid, "VmHWM") for role, pid in attempt.pids().items()}
        for pid in attempt.pids().values():
            forget_high_water(pid)
        before: dict[str, tuple[int, int]] = {}
        held = sizes(folder)
        for number in range(1, case.steps + 1):
            spent = {role: cpu_seconds(pid) for role, pid in attempt.pids().items()}
            line = attempt.step(number)
            line["last_token"] = attempt.last_reply()
            line["cpu"] = {role: cpu_seconds(pid) - spent.get(role, 0.0) for role, pid in attempt.pids().items()}
            found.steps.append(line)
            now = sizes(folder)
            if number > 1:
                found.files.append(len(now.keys() - held.keys()))
                found.bytes.append(sum(size for path, size in now.items() if path not in held))
            found.journals.append(sum(size for path, size in now.items() if path.parent.name == "journal"))
            held = now
            at = {role: (memory_of(pid, "VmRSS"), open_files(pid)) for role, pid in attempt.pids().items()}
            line["resident"] = {role: resident for role, (resident, _) in at.items()}
            before = at if number <= max(1, case.steps // 4) else before
            if number == case.steps or number % 50 == 0 or case.steps < 10:
                rate = line["tokens"] / (line["recorded"] - line["asked"])
                say(f"{case.name}: step {number} of {case.steps}: {line['tokens']:,} tokens, {rate:,.0f} a second")
        found.growth = {role: (at[role][0] - before[role][0], at[role][1] - before[role][1]) for role in at if role in before}
        high = {role: memory_of(pid, "VmHWM") for role, pid in attempt.pids().items()}
        found.memory = {role: max(starts.get(role, 0), size) for role, size in high.items()}
        found.idle = {role: idle[role if role in idle else role.split()[0]] for role in high}  # a second scoring process starts like the first
        found.rise = {role: size - found.idle[role] for role, size in high.items()}
        attempt.finish()
    finally:
        attempt.kill()
    return found
