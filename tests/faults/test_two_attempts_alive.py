"""An attempt that is stopped, and goes on when a newer one has sealed: from then on it writes nothing, and ends with 75."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import shared
import whole_runs as runs
from shared import now, say
from trees import snapshot, written_alone, written_beside

from miles.data.store.files import read_json
from miles.data.store.run_dir import RunDir, read_provenance

PATIENCE = 400.0


class Attempt:
    """One launcher and everything below it: the first of a run is `miles-submit run`, the others are of another node."""

    def __init__(self, run_dir: Path, epoch: int) -> None:
        self.run_dir, self.epoch = run_dir, epoch
        self.out = run_dir.with_name(f"attempt.{epoch}.out").open("wb")
        command = ["-m", "miles.cli", "run", *shared.words(), "--run-dir"] if epoch == 1 else [str(Path(__file__).with_name("attempt.py"))]
        self.process = subprocess.Popen([sys.executable, *command, str(run_dir)], stdout=self.out, stderr=subprocess.STDOUT)
        self.stopped: list[psutil.Process] = []

    def stop(self) -> None:
        """SIGSTOP to all, launcher first, so that nobody sees another stand still; again until no new process is found."""
        found, self.stopped = [psutil.Process(self.process.pid)], []
        while found:
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGSTOP)
            self.stopped += found
            found = [process for process in self.stopped[0].children(recursive=True) if process not in self.stopped]

    def go_on(self, rng: random.Random) -> None:
        """SIGCONT to all, in any order: as of nodes that come back one by one."""
        for process in rng.sample(self.stopped, len(self.stopped)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)

    def kill(self) -> None:
        for process in [*self.stopped, psutil.Process(self.process.pid)]:
            with contextlib.suppress(psutil.Error):
                for each in [*process.children(recursive=True), process]:
                    each.kill()
        self.process.wait()


def sealed_by(run_dir: Path, epoch: int) -> bool:
    """Whether this attempt has sealed a batch, an evaluation or a checkpoint (its entry in provenance.json comes seconds earlier)."""
    manifests = [*run_dir.glob("batches/step_*/manifest.json"), *run_dir.glob("evals/step_*/manifest.json"), *run_dir.glob("checkpoints/step_*/state.json")]
    with contextlib.suppress(FileNotFoundError):  # retained no longer
        return any(read_json(path)["epoch"] == epoch for path in manifests)
    return False


def test_the_older_writes_nothing_after_the_newer_ones_first_seal(undisturbed: Callable[[int], shared.Undisturbed], tmp_path: Path, seed: int, count: int) -> None:
    """In long runs: the newer one of each round is the older one of the next."""
    rng = random.Random(f"{seed} two attempts")
    calm = undisturbed(1)
    rounds, made, began, ended = max(2, count // 2), 0, now(), []
    while made < rounds:
        folder = tmp_path / f"{made:03d}"
        folder.mkdir()
        made += overlap(folder, calm, rng, rounds - made, ended)
        say(f"{made} of {rounds} rounds; {now() - began:.0f} s")
    say(f"\n{made} rounds of two attempts alive at once in {now() - began:.0f} s: no write, renaming or deletion of an older one; exit codes {sorted(set(ended))} (seed {seed})\n")
    shared.summary(f"two_attempts.{seed}", {"seed": seed, "rounds": made, "seconds": now() - began, "exit_codes": sorted(set(ended))})


def overlap(folder: Path, calm: shared.Undisturbed, rng: random.Random, most: int, ended: list[int]) -> int:
    """One run with as many rounds as it has; returns how many. At its end it has the undisturbed bits."""
    run_dir = folder / "run"
    done = 0
    with shared.environment(folder / "generated"):
        attempts = [Attempt(run_dir, 1)]
        try:
            while done < most and moment(attempts[-1], rng):
                old = attempts[-1]
                old.stop()
                attempts.append(Attempt(run_dir, shared.newest(run_dir) + 1))
                if not first_seal(attempts[-1]):
                    break
                round_of(run_dir, old, attempts[-1], rng)
                ended.append(old.process.returncode)
                done += 1
            assert attempts[-1].process.wait(PATIENCE) == 0, attempts[-1].out.name
            for attempt in attempts[:-1]:  # one that was stopped when nothing was left to seal for the newer one; perhaps not for itself either
                before = snapshot(run_dir, {attempt.epoch})
                attempt.go_on(rng)
                assert attempt.process.wait(PATIENCE) in (0, 75)
                assert not written_alone(before, snapshot(run_dir, {attempt.epoch}), attempt.epoch)
        finally:
            for attempt in attempts:
                if attempt.process.poll() is None:
                    attempt.kill()
    runs.same_run(calm.folder, run_dir)
    shared.no_draw_lost_or_used_twice(run_dir)
    epochs = [entry["epoch"] for entry in read_provenance(RunDir(run_dir))["attempts"]]
    assert epochs == list(range(1, len(attempts) + 1))
    return done


def moment(attempt: Attempt, rng: random.Random) -> bool:
    """Let an attempt go on for a random time after it has sealed something; False when it has ended meanwhile."""
    if not first_seal(attempt):
        return False
    until = now() + rng.expovariate(0.7)
    while now() < until:
        if attempt.process.poll() is not None:
            return False
        time.sleep(0.005)
    return attempt.process.poll() is None


def first_seal(attempt: Attempt) -> bool:
    deadline = now() + PATIENCE
    while not sealed_by(attempt.run_dir, attempt.epoch):
        if attempt.process.poll() is not None:
            return False
        assert now() < deadline, f"attempt {attempt.epoch} seals nothing\n{runs.logs(attempt.run_dir)}"
        time.sleep(0.005)
    return True


def round_of(run_dir: Path, old: Attempt, newer: Attempt, rng: random.Random) -> None:
    """The newer one has sealed: the older one goes on at a random moment, writes nothing, and ends by itself.

    In half of the rounds the newer one stands still meanwhile, so that any difference is the older one's; in the others both are at work.
    """
    until = now() + rng.expovariate(2.0)
    while now() < until and newer.process.poll() is None:
        time.sleep(0.005)
    alone = rng.random() < 0.5
    if alone:
        newer.stop()
    apart = {old.epoch} if alone else None
    before = snapshot(run_dir, apart)
    old.go_on(rng)
    code = old.process.wait(PATIENCE)
    _, alive = psutil.wait_procs(old.stopped, timeout=30)
    after = snapshot(run_dir, apart)
    if alone:
        newer.go_on(rng)
    text = Path(old.out.name).read_text()
    assert code == 75, f"exit code {code}\n{text}"
    assert not alive, f"{alive} outlived their launcher"
    assert "superseded by attempt" in text
    assert not (written_alone(before, after, old.epoch) if alone else written_beside(before, after, old.epoch, newer.epoch))
    assert (run_dir / "latest").resolve().name == f"{newer.epoch:06d}"
    ending = read_json(RunDir(run_dir).attempt(old.epoch) / "exit.json")
    assert ending["code"] == 75, ending
