"""Conversions killed at random moments, on a full disk, and where direct writing is not to be had."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from convert_models import write_model
from shared import say

from miles.config.exits import UserError
from miles.convert.hf_to_torch_dist import hf_to_torch_dist
from miles.convert.look import inspect
from miles.convert.verify import verify

KILLS = 20
LAST = {"hf_to_torch_dist": "naming latest_checkpointed_iteration.txt", "torch_dist_to_hf": "naming config.json"}
TOOL = Path(__file__).parents[2] / "tools/convert/hf_to_torch_dist.py"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def convert(way: str, source: Path, target: Path, step: int = 0) -> tuple[int, list[str]]:
    """(exit code, phases of the steps that it came to)."""
    driver = [sys.executable, str(Path(__file__).with_name("killed_conversion.py")), way, str(source), str(target), str(step)]
    done = subprocess.run(driver, capture_output=True, text=True)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("way", LAST)
def test_killed_at_random_moments_it_resumes_to_equal_bits(tmp_path: Path, seed: int, way: str) -> None:
    source = write_model(tmp_path / "hf", "deepseek_v3")
    if way == "torch_dist_to_hf":
        hf_to_torch_dist(source, tmp_path / "td")
        source = tmp_path / "td"
    rng, hit, lives = random.Random(f"{seed} {way}"), Counter[str](), 0
    code, calm = convert(way, source, tmp_path / "calm")
    assert code == 0
    wanted = content(tmp_path / "calm")
    kinds = sorted(set(calm))
    while sum(hit.values()) < KILLS or set(kinds) - set(hit):
        lives += 1
        target = tmp_path / f"killed-{lives}"
        code, whole = -9, False
        while code:
            # The first kill of a life in a phase that no kill has hit, the others anywhere.
            missing = [kind for kind in kinds if kind not in hit]
            steps = [i for i, kind in enumerate(calm, 1) if not missing or kind == missing[0]]
            step = rng.choice(steps) if missing or sum(hit.values()) < KILLS else 0
            code, seen = convert(way, source, target, step)
            if code:
                hit[seen[-1]] += 1
                whole |= LAST[way] in seen[:-1]
                if whole:
                    assert verify(source, target).equal
                else:
                    with pytest.raises(UserError):
                        inspect(target)
        assert content(target) == wanted
    say(f"\n{way}: {sum(hit.values())} kills in {lives} conversions (seed {seed}): " + ", ".join(f"{kind} {count}" for kind, count in sorted(hit.items())))


def in_mount(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    """A shell script in a mount namespace of its own."""
    space = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    return subprocess.run([*space, "bash", "-euc", script, "bash", *map(str, args)], capture_output=True, text=True)


def test_a_full_disk_is_one_line_and_with_room_the_same_command_goes_on(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "qwen3", vocab_size=40_000, tie_word_embeddings=False)
    (tmp_path / "disk").mkdir()
    script = """
        mount -t tmpfs -o size=4m small "$4"
        "$1" "$2" --hf "$3" --output "$4/td" 2>"$5/said" || echo "code $?"
        find "$4" -name .metadata -o -name latest_checkpointed_iteration.txt
        mount -o remount,size=40m "$4"
        "$1" "$2" --hf "$3" --output "$4/td" 2>"$5/again"
        cp -r "$4/td" "$5/td"
    """
    done = in_mount(script, sys.executable, TOOL, source, tmp_path / "disk", tmp_path)
    assert done.returncode == 0, done.stderr + (tmp_path / "again").read_text()
    assert done.stdout.splitlines()[0] == "code 78"
    assert len(done.stdout.splitlines()) == 2, "the second line is the good end's; a full disk leaves nothing that looks whole"
    (line,) = (tmp_path / "said").read_text().splitlines()
    assert line.startswith(f"error: disk full at {tmp_path}/disk/td/release/.convert/__")
    assert verify(source, tmp_path / "td").equal


def test_a_file_system_without_direct_writes_will_do(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "qwen3")
    (tmp_path / "disk").mkdir()
    script = """
        mount -t ramfs none "$4"
        ! dd if=/dev/zero of="$4/probe" bs=4096 count=1 oflag=direct 2>/dev/null || exit 9
        rm -f "$4/probe"
        "$1" "$2" --hf "$3" --output "$4/td"
        cp -r "$4/td" "$5/td"
    """
    done = in_mount(script, sys.executable, TOOL, source, tmp_path / "disk", tmp_path)
    assert done.returncode == 0, done.stderr
    assert verify(source, tmp_path / "td").equal
