"""Conversions killed at random moments, on a full disk, and where direct writing is not to be had."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from convert_models import write_model
from shared import say

from miles.config.exits import UserError
from miles.convert.hf_to_torch_dist import hf_to_torch_dist
from miles.convert.look import inspect
from miles.convert.quantize import Target, quantize
from miles.convert.verify import verify

KILLS = 20  # at steps on the disk, and again as many by the clock
LAST = {"hf_to_torch_dist": "naming latest_checkpointed_iteration.txt", "torch_dist_to_hf": "naming config.json"}
TOOL = Path(__file__).parents[2] / "tools/convert/hf_to_torch_dist.py"


@dataclass(frozen=True)
class Ended:
    """How a conversion ended: exit code, the phases of its steps on the disk, how long it took [s]."""

    code: int
    seen: list[str]
    seconds: float


class Conversions:
    """Conversions of one source, each in a process of its own that may be killed. A killed one leaves nothing that looks whole and is not."""

    def __init__(self, way: str, source: Path, folder: Path) -> None:
        self.way, self.source, self.folder = way, source, folder
        self.hit, self.whole, self.wanted = Counter[str](), False, dict[str, bytes]()
        driver = Path(__file__).with_name("killed_conversion.py")
        self.process = subprocess.Popen([sys.executable, str(driver)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def run(self, target: Path, kind: str = "", step: int = 0, seconds: float = 0.0) -> Ended:
        """One conversion, killed before its step number `step` of phase `kind` ("": of any), or after `seconds`."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps([self.way, str(self.source), str(target), kind, step, seconds]), file=self.process.stdin, flush=True)
        ended = Ended(*json.loads(self.process.stdout.readline()))
        assert ended.code in (0, -9)
        if ended.code:
            self.hit[ended.seen[-1] if ended.seen else "before the first step"] += 1
            self.look(target, ended.seen)
        return ended

    def look(self, target: Path, seen: list[str]) -> None:
        """Whole from the last name on, no checkpoint before it; killed between that step's beginning and its end, either."""
        last = LAST[self.way]
        try:
            inspect(target)
        except UserError:
            assert not self.whole
            assert last not in seen[:-1]
            return
        assert self.whole or last in seen
        self.whole = True
        assert verify(self.source, target).equal

    def life(self, rng: random.Random, kind: str = "", step: int = 0, seconds: float = 0.0) -> Ended:
        """A conversion that is killed so, then at random steps, until one comes to its end, with the bits of the undisturbed one."""
        target = self.folder / "target"
        self.whole = False
        first = ended = self.run(target, kind, step, seconds)
        while ended.code:
            ended = self.run(target, step=rng.choice([0, rng.randint(1, len(first.seen) + 1)]))
        if not self.wanted:
            self.wanted = content(target)
        assert content(target) == self.wanted
        shutil.rmtree(target)
        return first


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(params=LAST)
def conversions(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Conversions]:
    source = write_model(tmp_path / "hf", "deepseek_v3")
    if request.param == "torch_dist_to_hf":
        hf_to_torch_dist(source, tmp_path / "td")
        source = tmp_path / "td"
    made = Conversions(request.param, source, tmp_path)
    yield made
    made.close()


def test_killed_at_steps_in_every_phase_it_resumes_to_equal_bits(conversions: Conversions, seed: int) -> None:
    rng = random.Random(f"{seed} {conversions.way}")
    calm = conversions.life(rng).seen
    phases = Counter(calm)
    for kind, count in phases.items():
        assert conversions.life(rng, kind, rng.randint(1, count)).code
    rest = max(10, KILLS - len(phases))
    moments = [rng.randint(i * len(calm) // rest + 1, (i + 1) * len(calm) // rest) for i in range(rest)]
    for moment in moments:
        assert len(conversions.life(rng, step=moment).seen) == moment
    assert set(conversions.hit) >= set(phases)
    tell("steps", conversions, len(phases) + rest + 1, f"of {len(calm)} steps, seed {seed}")


def test_killed_at_moments_spread_over_the_run_it_resumes_to_equal_bits(conversions: Conversions, seed: int) -> None:
    rng = random.Random(f"{seed} {conversions.way} seconds")
    calm = min(conversions.life(rng).seconds for _ in range(4))
    reached, lives = [], 4
    while len(reached) < KILLS:
        lives += 1
        assert lives <= 5 * KILLS, "most moments lie within the run"
        ended = conversions.life(rng, seconds=rng.uniform(0, calm))
        if ended.code:
            reached.append(len(ended.seen))
    assert len(set(reached)) >= 5
    tell("moments", conversions, lives, f"after {min(reached)} to {max(reached)} steps, within {calm:.2f} s, seed {seed}")


def tell(what: str, conversions: Conversions, lives: int, more: str) -> None:
    where = ", ".join(f"{kind} {count}" for kind, count in sorted(conversions.hit.items()))
    say(f"\n{conversions.way} killed at random {what}: {sum(conversions.hit.values())} kills in {lives} conversions ({more}): {where}")


def in_mount(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    """A shell script in a mount namespace of its own."""
    space = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    return subprocess.run([*space, "bash", "-euc", script, "bash", *map(str, args)], capture_output=True, text=True)


SCRIPTS = {  # words of each script, and the name of its result that makes it whole
    "hf_to_torch_dist": ("--hf {source} --output {target}", "latest_checkpointed_iteration.txt"),
    "torch_dist_to_hf": ("--torch-dist {source} --output {target}", "config.json"),
    "quantize": ("{source} {target} --method int4", "config.json"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_full_disk_is_one_line_and_with_room_the_same_command_goes_on(tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "hf", "qwen3", vocab_size=40_000, tie_word_embeddings=False)
    hf_to_torch_dist(model, tmp_path / "td")
    words, last = SCRIPTS[name]
    (tmp_path / "disk").mkdir()
    source = tmp_path / "td" if name == "torch_dist_to_hf" else model
    command = [sys.executable, TOOL.with_name(f"{name}.py"), *words.format(source=source, target=tmp_path / "disk" / "made").split()]
    script = """
        disk=$1 said=$2 last=$3; shift 3
        mount -t tmpfs -o size=4m small "$disk"
        "$@" 2>"$said/said" || echo "code $?"
        find "$disk" -name .metadata -o -name "$last"
        mount -o remount,size=40m "$disk"
        "$@" 2>"$said/again"
        cp -r "$disk/made" "$said/made"
    """
    done = in_mount(script, tmp_path / "disk", tmp_path, last, *command)
    assert done.returncode == 0, done.stderr + (tmp_path / "again").read_text()
    assert done.stdout.splitlines()[0] == "code 78"
    assert len(done.stdout.splitlines()) == 2, "the second line is the good end's; a full disk leaves nothing that looks whole"
    (line,) = (tmp_path / "said").read_text().splitlines()
    assert line.startswith(f"error: disk full at {tmp_path}/disk/made/")
    if name == "quantize":
        quantize(model, tmp_path / "calm", Target("int4"))
        assert {path.name: path.read_bytes() for path in (tmp_path / "made").glob("*.*")} == {path.name: path.read_bytes() for path in (tmp_path / "calm").glob("*.*")}
    else:
        assert verify(model, tmp_path / "made").equal


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
