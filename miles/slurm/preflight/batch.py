"""The preflight job's process on its first node: `python -m miles.slurm.preflight.batch FOLDER [GROUP]`. A step over each group, then verdicts.

FOLDER has run.yaml; result.JOB.json is written there.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miles.config.compose import load_config
from miles.config.exits import AGAIN, OK, UserError
from miles.config.placement import NodeGroup, node_groups
from miles.config.schema import RunConfig
from miles.data.store.files import seal_json
from miles.plan.place import counts_gpus
from miles.slurm.options import srun_options
from miles.slurm.preflight.hub import Hub
from miles.slurm.preflight.job import read_by_nodes
from miles.slurm.preflight.judge import bad, judge
from miles.slurm.preflight.node import DONE, PRESENT, Plan
from miles.slurm.signals import Signals
from miles.slurm.srun import SrunComponent, SrunRunner, Step, addresses, job_nodes
from miles.slurm.step import own_address

PROBE = "miles.slurm.preflight.node.probe"
WAIT_SECONDS = 30.0  # for what the others do
MEGABYTES = 64
ROUNDS = 8
NCCL_SECONDS = 180.0  # a round of it
GRACE_SECONDS = 5.0  # for processes that have said all to end
LATE_SECONDS = 60.0  # start of Python on a cold file system, image import aside


def main(words: list[str]) -> int:
    """Entry point."""
    signals = Signals()
    folder = Path(words[0])
    config = load_config([folder / "run.yaml"])
    groups = [group for group in node_groups(config) if words[1:] in ([], [group.name])]
    result = Preflight(folder, config, groups, signals).run()
    seal_json(folder / f"result.{os.environ['SLURM_JOB_ID']}.json", result)
    return OK if not result["bad"] else AGAIN


class Preflight:
    """One job's tests."""

    def __init__(self, folder: Path, config: RunConfig, groups: list[NodeGroup], signals: Signals) -> None:
        self.folder, self.config, self.groups, self.signals = folder, config, groups, signals
        self.het = len(groups) > 1
        self.nodes = [job_nodes(number) for number in range(len(groups))]
        self.token = secrets.token_hex(16)

    def run(self) -> dict[str, Any]:
        """{"job", "nodes": by node the judged report, "bad": by node the reason}."""
        every = [node for nodes in self.nodes for node in nodes]
        os.environ["MILES_ADDRESSES"] = json.dumps(addresses())
        host = own_address()
        canaries = self.folder / f"canary.{os.environ['SLURM_JOB_ID']}"
        canaries.mkdir()
        runner = SrunRunner(self.folder / "submitit")
        with Hub(host, self.token) as hub:
            steps = []
            for number, group in enumerate(self.groups):
                plan = self.plan(group, self.nodes[number], every, (host, hub.port), canaries)
                steps.append(runner.submit(group.name, PROBE, asdict(plan), step=self.step(number, group)))
            self.begin(steps, hub)
            cut = self.wait(steps, hub)
            reports = {key.partition("/")[2]: value for key, value in list(hub.words.items()) if key.startswith("report/")}
        silent: dict[str, str] = {}
        for number, step in enumerate(steps):
            for rank, node in enumerate(self.nodes[number]):
                if node not in reports:
                    self.late(step, rank, node, cut, reports, silent)
        judged = judge(every, reports, silent)
        for path in canaries.iterdir():
            path.unlink()
        canaries.rmdir()
        return {"job": int(os.environ["SLURM_JOB_ID"]), "nodes": judged, "bad": bad(judged), "time": time.time()}

    def plan(self, group: NodeGroup, mine: list[str], every: list[str], hub: tuple[str, int], canaries: Path) -> Plan:
        """What the nodes of a group are told."""
        return Plan(
            hub=hub,
            token=self.token,
            folder=str(canaries),
            nodes=every,
            group=group.name,
            mine=mine,
            device=self.config.cluster.device,
            gpus=group.gpus_per_node,
            counts_gpus=counts_gpus(self.config, group),
            image=group.ask.container_image,
            read=read_by_nodes(self.config),
            port=self.config.cluster.port,
            seconds=WAIT_SECONDS,
            patience=LATE_SECONDS + WAIT_SECONDS,
            megabytes=MEGABYTES,
            rounds=ROUNDS,
        )

    def step(self, number: int, group: NodeGroup) -> Step:
        """One task on every node of a group, as the run's components are started there."""
        ask = group.ask
        return Step(
            het_group=number if self.het else None,
            first_node=0,
            nodes=len(self.nodes[number]),
            options=srun_options(group, self.config.cluster.device, mounts=(f"{self.folder}:{self.folder}",)),
            python=(ask.python or sys.executable,),
            setup=tuple(ask.setup),
            environment=ask.environment,
            architecture=ask.architecture,
        )

    def begin(self, steps: list[SrunComponent], hub: Hub) -> None:
        """Say who is tested together, as soon as all have come whose process hasn't failed, or after LATE_SECONDS."""
        until = time.monotonic() + LATE_SECONDS
        come: list[str] = []
        lost: set[str] = set()
        while self.signals.by is None:
            lost = set()
            for number, step in enumerate(steps):
                lost |= set(self.ended(number, step))
            come = [node for nodes in self.nodes for node in nodes if f"sink/{node}" in hub.words]
            if all(node in come or node in lost for nodes in self.nodes for node in nodes) or time.monotonic() > until:
                break
            time.sleep(0.05)
        hub.words[PRESENT] = [node for node in come if node not in lost]

    def ended(self, number: int, step: SrunComponent) -> list[str]:
        """Nodes of a group whose process is over."""
        step.listen()
        over = step.process.poll() is not None
        return [node for rank, node in enumerate(self.nodes[number]) if over or rank in step.failed or step.result(rank).exists()]

    def wait(self, steps: list[SrunComponent], hub: Hub) -> list[str]:
        """Until the nodes that are tested have said all, a signal says that the job must end, or it takes too long; returns whose process was killed then."""
        nccl = NCCL_SECONDS * (1 + min(ROUNDS, max(len(nodes) for nodes in self.nodes) - 1)) if self.config.cluster.device == "cuda" else 0.0
        until = time.monotonic() + WAIT_SECONDS + (3 + min(ROUNDS, sum(map(len, self.nodes)) - 1)) * WAIT_SECONDS + nccl
        told = False
        while any(step.process.poll() is None for step in steps) and time.monotonic() < until and self.signals.by is None:
            over = {node for number, step in enumerate(steps) for node in self.ended(number, step)}
            if not told and all(f"{DONE}/{node}" in hub.words or node in over for node in hub.words[PRESENT]):
                told, until = True, time.monotonic() + GRACE_SECONDS
            time.sleep(0.1)
        over = {node for number, step in enumerate(steps) for node in self.ended(number, step)}
        for step in steps:
            step.kill()
        return [node for nodes in self.nodes for node in nodes if node not in over]

    def late(self, step: SrunComponent, rank: int, node: str, cut: list[str], reports: dict[str, Any], silent: dict[str, str]) -> None:
        """A node that told the hub nothing: its result file has the report all the same, or what is known of its end. cut: who was not waited for any longer."""
        outcome: dict[str, Any] = {}
        with contextlib.suppress(OSError):  # its result lies on a file system that fails
            step.listen()
            step.asked = step.asked or time.monotonic()
            outcome = step.of_node(rank)
        if "report" in outcome:
            reports[node] = outcome["report"]
        elif node in cut:
            silent[node] = f"nothing heard of it within {LATE_SECONDS:g} s; its log is {step.log(rank)}"
        else:
            silent[node] = str(outcome.get("reason", "gave no answer in time"))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", flush=True)
        sys.exit(78)
