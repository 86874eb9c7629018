"""A run with files of its own that nothing is wrong with, what may be done to it, and the command that is then refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
RECIPE = """\
defaults: [recipes/tiny]
name: own
num_rollout: 1
model: {hf_checkpoint: model, build: null}
warm_start: {steps: 0, reasoning_gym: null}
data: {reasoning_gym: null, reasoning_gym_config: {}, prompt_data: train.jsonl, exclude: []}
eval: {interval: null, reasoning_gym: null, reasoning_gym_config: {}}
rollout: {reward: {type: exact_match}}
checkpoint: {save_hf: false}
"""
ROWS = [f'{{"question": "{a} + {b} =", "answer": "{a + b}"}}\n' for a in range(4) for b in range(4)]


@dataclass(frozen=True)
class Case:
    """One fault. words: of the command line (a list where one has a space in it); make: puts the fault into the folder; parts: texts of the one line."""

    name: str
    words: str | list[str]
    parts: list[str]
    make: Callable[[Path], object] = field(default=lambda folder: None)

    @property
    def command(self) -> list[str]:
        """The words one by one."""
        return self.words.split() if isinstance(self.words, str) else self.words


def prepare(folder: Path, model: Path) -> None:
    """recipe.yaml, train.jsonl and a model (linked, since a fault replaces a file and never writes into it)."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "train.jsonl").write_text("".join(ROWS))
    (folder / "model").mkdir()
    for name in MODEL:
        os.link(model / name, folder / "model" / name)


def replace(path: Path, content: str | bytes) -> None:
    """New content under the name: links to the old content keep theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def submit(folder: Path, words: str | list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """`miles-submit` with the words, in the folder, to its end."""
    command = [sys.executable, "-m", "miles.cli", *(words.split() if isinstance(words, str) else words)]
    return subprocess.run(command, cwd=folder, env=_environment() | environment, capture_output=True, text=True, timeout=480, stdin=subprocess.DEVNULL)


def submit_all(commands: list[tuple[Path, list[str]]], at_once: int) -> list[subprocess.CompletedProcess[str]]:
    """The same for many, which are refused before they start anything: one process that has made their imports forks itself for each."""
    if not commands:
        return []
    asked = commands[0][0].with_name("commands.json")
    asked.write_text(json.dumps([{"folder": str(folder), "words": words} for folder, words in commands]))
    subprocess.run([sys.executable, str(Path(__file__).with_name("commands.py")), str(asked), str(at_once)], env=_environment(), check=True, timeout=600, stdin=subprocess.DEVNULL)
    return [subprocess.CompletedProcess(words, *(make(folder.with_name(folder.name + end).read_text()) for make, end in ((int, ".code"), (str, ".out"), (str, ".err")))) for folder, words in commands]


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "NO_COLOR": "1"}


def tree(folder: Path, but: tuple[str, ...] = ()) -> dict[str, str]:
    """Hash of every file below a folder (links as what they point at), kind of everything else; without the top names of `but`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(but) and but:
            continue
        if path.is_symlink():
            found[name] = f"link {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def fault_line(done: subprocess.CompletedProcess[str], parts: list[str]) -> str:
    """The one line of a fault that ended a command with 78: no other line but warnings, no traceback, every part in it."""
    shown = f"exit code {done.returncode}\n{done.stdout[-2000:]}\n--\n{done.stderr[-4000:]}"
    assert done.returncode == 78, shown
    assert "Traceback" not in done.stderr + done.stdout, shown
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, shown
    for part in parts:
        assert part in lines[0], shown
    return lines[0]
