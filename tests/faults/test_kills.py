"""kill -9 at random moments, uniform over the wall time of an undisturbed run: all end with its bits, and waste little."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phases
import psutil
import shared
import timeline
import whole_runs as runs
from shared import now, say

from miles.config.schema import RunConfig
from miles.run.role import load_run

VICTIMS = ("worker", "service", "trainer 0", "trainer 1", "engine", "supervisors", "all")
PATIENCE = 600.0  # of a run without kills
MOST_AIMS = 6  # runs for phases that chance has left out
PER_RUN = 10  # kills


class Disturbed:
    """A run that is killed again and again."""

    def __init__(self, folder: Path, ranks: int, rng: random.Random) -> None:
        folder.mkdir()
        self.ranks, self.rng = ranks, rng
        self.run_dir, self.generated = folder / "run", folder / "generated"
        self.journals = shared.Journals(self.run_dir, folder / "journals")
        self.kills: list[dict[str, Any]] = []
        self.config: RunConfig | None = None
        self.launch()

    def launch(self) -> None:
        """The command that a person gives, the first time and again."""
        with shared.environment(self.generated):
            self.launched = runs.Launched(self.run_dir, *shared.words(self.ranks))

    def rest(self, seconds: float) -> bool:
        """Let the run go on so long; returns whether it is finished."""
        until = now() + seconds
        while self.launched.process.poll() is None:
            self.journals.look()
            if now() >= until:
                return False
            time.sleep(min(0.05, max(0.0, until - now())))
        return True

    def reach(self, moment: timeline.Moment) -> bool:
        """Let the run come to the moment's place in the work, then as far into it; returns whether it is finished."""
        deadline, last = now() + PATIENCE, self.kills[-1]["attempt"] if self.kills else 0
        while not timeline.reached(self.run_dir, moment, last):
            if self.rest(0.002):
                return True
            assert now() < deadline, f"the run hangs before {moment}\n{self.launched.text()}\n{runs.logs(self.run_dir)}"
        if moment.after:
            return self.rest(moment.offset)
        until = now() + moment.offset
        while now() < until and not timeline.working(self.run_dir):  # where the machine has become faster, start-up ends before
            if self.rest(0.01):
                return True
        return False

    def phase(self) -> str:
        if self.config is None and (self.run_dir / "run.yaml").exists():
            self.config = load_run(self.run_dir)
        return "start" if self.config is None else phases.phase_now(self.config, self.run_dir)

    def kill(self, aimed: bool = False) -> None:
        """One kill -9 of the first of the victims, in random order, that lives."""
        living = shared.family(psutil.Process(self.launched.process.pid))
        victim = next(name for name in self.rng.sample(VICTIMS, len(VICTIMS)) if name == "all" or name in living)
        phase, epoch = self.phase(), shared.newest(self.run_dir)
        if any(each["attempt"] == epoch for each in self.kills):
            phase = "between"  # the attempt is ending already
        killed = [process for name in living for process in living[name]] if victim == "all" else living[victim]
        for process in killed:
            kill_9(process)
        self.kills.append({"attempt": epoch, "victim": victim, "phase": phase, "aimed": aimed})
        if victim == "all":
            self.launched.process.wait()
            self.launched.file.close()
            self.launch()

    def check(self, undisturbed: Path) -> dict[str, int]:
        """After the good end: bits, draws, journals."""
        assert self.launched.wait() == 0, self.launched.text()[-3000:] + runs.logs(self.run_dir)
        self.journals.look()
        outlived = [process for process in psutil.process_iter() if runs.belongs(process, self.run_dir)]
        assert not psutil.wait_procs(outlived, timeout=30)[1], "processes outlive their run"
        assert "Traceback" not in self.launched.text()
        runs.same_run(undisturbed, self.run_dir)
        shared.no_draw_lost_or_used_twice(self.run_dir)
        return shared.repeats(shared.generated_groups(self.generated), self.journals.groups())


def kill_9(process: psutil.Process) -> None:
    """kill -9; one that is gone already is no matter."""
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def test_kills_at_random_moments(undisturbed: Callable[[int], shared.Undisturbed], tmp_path: Path, seed: int, count: int) -> None:
    """Rounds of PER_RUN kills; what chance has left out of phases.ALL is aimed at in the end."""
    rng = random.Random(seed)
    began, kills, rounds, aims = now(), [], [], 0
    missing: list[str] = []
    while len(kills) < count or missing:
        ranks = 1 + len(rounds) % 2
        calm = undisturbed(ranks)
        line = timeline.Timeline(calm.folder)
        disturbed = Disturbed(tmp_path / f"{len(rounds):03d}", ranks, rng)
        if missing:
            aim(disturbed, missing)
        else:
            disturb(disturbed, line.moments(rng, min(PER_RUN, count - len(kills))), len(kills))
        assert disturbed.rest(PATIENCE), f"the run hangs\n{disturbed.launched.text()}\n{runs.logs(disturbed.run_dir)}"
        figures = disturbed.check(calm.folder)
        kills += disturbed.kills
        rounds.append({"ranks": ranks, "kills": len(disturbed.kills), "attempts": shared.newest(disturbed.run_dir), **figures})
        say(f"run {len(rounds)} ({ranks} rank(s)): {rounds[-1]}; {now() - began:.0f} s")
        missing = [phase for phase in phases.ALL if phase not in {kill["phase"] for kill in kills}] if len(kills) >= count else []
        if missing:
            aims += 1
            assert aims <= MOST_AIMS, f"no kill hits {missing}"
            say(f"no kill has hit {', '.join(missing)} yet: they are aimed at")
    report(seed, kills, rounds, now() - began)


def disturb(disturbed: Disturbed, moments: list[timeline.Moment], before: int) -> None:
    """Kill at each moment in turn, as long as the run lasts."""
    for moment in moments:
        if disturbed.reach(moment):
            return
        disturbed.kill()
        last = disturbed.kills[-1]
        say(f"  kill {before + len(disturbed.kills):3d}: {last['victim']} in {last['phase']}, attempt {last['attempt']} ({moment.seconds:.1f} s of an undisturbed run)")


def aim(disturbed: Disturbed, missing: list[str]) -> None:
    """Kill once in each phase that chance has left out, for as long as the run has one."""
    left = list(missing)
    while left and not disturbed.rest(0.0):
        if disturbed.phase() in left:
            disturbed.kill(aimed=True)
            left = [phase for phase in left if phase != disturbed.kills[-1]["phase"]]
            disturbed.rest(2.0)
        time.sleep(0.001)


def report(seed: int, kills: list[dict[str, Any]], rounds: list[dict[str, int]], seconds: float) -> None:
    """The table at the end, and the same as a file."""
    victims, found = Counter(str(kill["victim"]) for kill in kills), Counter(str(kill["phase"]) for kill in kills)
    totals = {name: sum(each[name] for each in rounds) for name in ("attempts", "generated", "again", "in_flight")}
    say(f"\n{len(kills)} kills in {len(rounds)} runs, {totals['attempts']} attempts, {seconds:.0f} s (seed {seed})")
    say("by victim: " + ", ".join(f"{name} {victims[name]}" for name in VICTIMS))
    say("by phase:  " + ", ".join(f"{name} {number}" for name, number in found.most_common()))
    say(f"groups generated {totals['generated']}, of these again {totals['again']}; in flight at the ends of attempts {totals['in_flight']}, at most {max(each['most_samples'] for each in rounds)} samples at once\n")
    aimed = sum(bool(kill["aimed"]) for kill in kills)
    shared.summary(f"kills.{seed}", {"seed": seed, "kills": len(kills), "aimed": aimed, "seconds": seconds, "victims": victims, "phases": found, **totals, "rounds": rounds})
