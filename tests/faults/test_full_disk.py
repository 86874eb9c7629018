"""A disk that becomes full at random moments of a run: one line, exit code 78; with room again the same command resumes, to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import shared
import whole_runs as runs
from shared import now, say

TOLD = ("step ", "waiting for ", "failed, step ", "stopped, step ", "report: ", "resuming ", "guarantee: ")  # what a launcher says besides
PER_RUN = 3.0  # how often the disk becomes full in the time of an undisturbed run


def test_full_at_random_moments(undisturbed: Callable[[int], shared.Undisturbed], tmp_path: Path, seed: int, count: int) -> None:
    calm, began, wanted = undisturbed(1), now(), max(2, count // 5)
    stops, made = 0, 0
    while stops < wanted:
        folder = tmp_path / f"{made:03d}"
        made += 1
        for launched in on_small_disk(folder, PER_RUN / calm.seconds, f"{seed} {made}", wanted - stops):
            if launched["code"] == 0:
                continue
            stops += 1
            said = [line for line in launched["lines"] if not line.startswith(TOLD)]
            say(f"  stop {stops}: after {launched['moment']:.1f} s, {launched['lines_of_metrics']} lines of metrics; ended {launched['seconds'] - launched['moment']:.1f} s later")
            assert launched["code"] == 78, launched
            line = f"disk full at {folder}/disk/run: free some space, then run the same command again; the run resumes from its last checkpoint"
            assert said in ([f"error: {line}"], [f"miles-submit: {line}"]), launched
        runs.same_run(calm.folder, folder / "copy")
        shared.no_draw_lost_or_used_twice(folder / "copy")
    say(f"\n{stops} full disks in {made} runs, {now() - began:.0f} s (seed {seed})\n")
    shared.summary(f"full_disk.{seed}", {"seed": seed, "stops": stops, "runs": made, "seconds": now() - began})


def in_a_mount_namespace() -> list[str]:
    """Words before a command that mounts something for itself."""
    return ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]


def on_small_disk(folder: Path, rate: float, seed: str, most: int) -> list[dict[str, object]]:
    """The launches of one run until its good end, in a mount namespace that ends with it."""
    folder.mkdir()
    driver = [sys.executable, str(Path(__file__).with_name("full_disk.py")), str(folder), str(rate), seed, str(most)]
    with shared.environment(folder / "generated"):
        done = subprocess.run([*in_a_mount_namespace(), *driver], capture_output=True, text=True)
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert launches
    assert launches[-1]["code"] == 0, launches[-1]
    return launches


def test_full_under_slurm(calm_steps: Path, tmp_path: Path) -> None:
    """The job ends with 78 and is not requeued, though its own output is on the disk; `status` has the line; with room again `resume` goes on."""
    done = subprocess.run([*in_a_mount_namespace(), sys.executable, str(Path(__file__).with_name("slurm_full_disk.py")), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["code"], told["restarts"], told["epoch"], told["epochs"]) == ("78:0", "0", 1, 2), told
    assert f"disk full at {tmp_path}/disk/run: free some space, then run the same command again; the run resumes from its last checkpoint" in told["status"], told
    assert "Traceback" not in told["log"]
    runs.same_run(calm_steps, tmp_path / "copy")
