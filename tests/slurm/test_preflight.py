"""Preflight: verdicts on two or more nodes' reports (pure), each probe on this machine, and a whole one on a real Slurm with a node that is broken."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from jobs import REPOSITORY

from miles.config.exits import UserError
from miles.data.store.run_dir import RunDir
from miles.slurm.minicluster import Cluster
from miles.slurm.preflight import clock, files, gpus, nccl, network, verdict
from miles.slurm.preflight.hub import Guest, Hub
from miles.slurm.preflight.infiniband import infiniband
from miles.slurm.preflight.job import new_folder
from miles.slurm.preflight.judge import bad, judge
from miles.slurm.preflight.pairs import partner, rounds

NODES = ["a", "b", "c", "d"]


def reports(**probes: dict[str, Any]) -> dict[str, Any]:
    """By node, of one group; probes: name to {node: verdict}, "_" for a blank."""
    return {node: {"node": node, "group": "all", "probes": {name.replace("_", " "): by[node] for name, by in probes.items() if node in by}} for node in NODES}


@pytest.mark.parametrize("number", [2, 3, 4, 7, 8])
def test_rounds_pair_everybody_once(number: int) -> None:
    found = rounds(number, 100)
    assert Counter(pair for pairs in found for pair in pairs) == Counter((a, b) for b in range(number) for a in range(b))
    assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in found)
    assert len(rounds(number, 1)) == 1
    assert partner([(0, 2), (1, 3)], 3) == 1
    assert partner([(0, 2)], 1) is None


def canary(missing: list[str]) -> dict[str, Any]:
    return {**verdict.ok("sees"), "missing": missing, "wrote": True, "seconds": 0.1}


def test_who_is_to_blame_for_a_file_that_is_not_seen() -> None:
    """b writes elsewhere: three miss its file, and it misses theirs. Nobody else is blamed."""
    judged = judge(NODES, reports(shared_files={"a": canary(["b"]), "b": canary(["a", "c", "d"]), "c": canary(["b"]), "d": canary(["b"])}), {})
    assert list(bad(judged)) == ["b"]
    late = judge(NODES, reports(shared_files={"a": canary([]), "b": canary(["c"]), "c": canary([]), "d": canary([])}), {})
    assert list(bad(late)) == ["b"]


def test_a_node_that_gives_no_answer_is_named_and_not_the_others() -> None:
    told = reports(shared_files={node: canary(["d"]) for node in "abc"})
    del told["d"]
    judged = judge(NODES, told, {"d": "No module named miles"})
    assert bad(judged) == {"d": "answer: No module named miles"}
    assert judged["a"]["probes"]["shared files"]["detail"] == "sees what 3 nodes wrote"


def test_a_node_alone_is_held_against_the_login_node() -> None:
    told = {"a": reports(shared_files={"a": canary([])}, clock={"a": clocked(0.0)})["a"]}
    judged = judge(["a"], told, {})
    assert judged["a"]["probes"]["shared files"]["status"] == verdict.OK
    assert judged["a"]["probes"]["clock"]["status"] == verdict.NOT_CHECKED


def clocked(seconds: float) -> dict[str, Any]:
    return verdict.ok("", seconds=seconds, bound=0.001)


@pytest.mark.parametrize(("clocks", "wrong"), [({"a": 0.0, "b": 0.01, "c": 30.0, "d": 0.0}, "c"), ({"a": 0.0, "b": 30.0, "c": 30.01, "d": 30.0}, "a"), ({"a": 0.0, "b": -2.0, "c": 0.3}, "b"), ({"a": 0.0, "b": 30.0}, "ab"), ({"a": 0.0, "b": 0.4}, "")])  # fmt: skip
def test_whose_clock_is_wrong(clocks: dict[str, float], wrong: str) -> None:
    """The first node's may be it; of two nobody knows, so both are left out."""
    told = {node: report for node, report in reports(clock={node: clocked(seconds) for node, seconds in clocks.items()}).items() if node in clocks}
    found = bad(judge(list(clocks), told, {}))
    assert "".join(sorted(found)) == wrong
    assert all("NTP" in why for why in found.values())


def test_gpus_of_a_node_that_are_slow_together() -> None:
    figures = {"a": 350.0, "b": 340.0, "c": 90.0, "d": 345.0}
    assert list(bad(judge(NODES, reports(nccl_inside={node: verdict.ok("", gigabytes=rate) for node, rate in figures.items()}), {}))) == ["c"]


def rates(unit: str = "", **by: Any) -> dict[str, Any]:
    return {**verdict.ok(unit), "rates": by}


def test_a_slow_and_an_unreachable_node() -> None:
    slow = reports(network={"a": rates(b=1000.0, c=100.0, d=990.0), "b": rates(c=110.0, d=1010.0), "c": rates(d=105.0), "d": rates()})
    assert list(bad(judge(NODES, slow, {}))) == ["c"]
    lost = reports(network={"a": rates(b=1000.0, c=None, d=990.0), "b": rates(c=None, d=1010.0), "c": rates(d=None), "d": rates()})
    judged = judge(NODES, lost, {})
    assert list(bad(judged)) == ["c"]
    assert judged["a"]["probes"]["network"]["detail"] == "all but c, which others don't reach either"


def test_of_two_nodes_nobody_says_which_is_slow() -> None:
    found = judge(NODES[:2], {node: report for node, report in reports(nccl={"a": rates(b=3.0), "b": rates(a=3.0)}).items() if node in "ab"}, {})
    assert bad(found) == {}


def test_files_and_ports_that_differ_from_most() -> None:
    same, other = verdict.ok("2 files", files={"/m": [2, 10]}), verdict.ok("1 files", files={"/m": [1, 5]})
    up, down = {"mlx5_0/1": "ACTIVE 400 Gb/sec", "mlx5_1/1": "ACTIVE 400 Gb/sec"}, {"mlx5_0/1": "ACTIVE 400 Gb/sec", "mlx5_1/1": "DOWN 10 Gb/sec"}
    told = reports(files={"a": same, "b": same, "c": other, "d": same}, infiniband={"a": verdict.ok("", ports=up), "b": verdict.ok("", ports=down), "c": verdict.ok("", ports=up), "d": verdict.ok("", ports=up)})
    judged = judge(NODES, told, {})
    assert set(bad(judged)) == {"b", "c"}
    assert "mlx5_1/1 not active" in bad(judged)["b"]
    assert bad(judged)["c"] == "files: /m: 1 file, 5 bytes, on most nodes 2 files, 10 bytes"


def test_what_could_not_run_is_never_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_STEP_GPUS", raising=False)
    said = [gpus.health("cuda", 8), gpus.health("cpu", 8), gpus.fabric("cuda"), gpus.imex(False, tmp_path / "none"), gpus.granted(8, True), infiniband(tmp_path), files.readable([])]
    assert {each["status"] for each in said} == {verdict.NOT_CHECKED}
    assert all(each["detail"] for each in said)
    assert gpus.imex(True, tmp_path / "none")["status"] == verdict.BROKEN


COMPLAINTS = """Traceback (most recent call last):
[rank1]:   File "nccl.py", line 120, in main
[rank1]: torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:94, remote process exited or there was a network error, NCCL version 2.27.5
[rank1]:[W1122 07:00:00.000 ProcessGroupNCCL.cpp:1479] Warning: WARNING: destroy_process_group() was not called before program exit
"""


def test_the_line_that_says_why_nccl_failed() -> None:
    assert nccl.cause(COMPLAINTS).startswith("torch.distributed.DistBackendError: NCCL error in")
    assert nccl.cause("Killed\n") == "Killed"
    assert nccl.cause("") == ""


SMI = """#!{python}
import sys
rows = {rows!r}
query = next((word for word in sys.argv if word.startswith("--query-gpu=")), "")
fields = query.partition("=")[2].split(",")
if any(field not in rows[0] for field in fields):
    print(f'Field "{{fields[0]}}" is not a valid field to query.')
    sys.exit(2)
for row in rows:
    print(", ".join(row[field] for field in fields))
"""


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [({}, "ok", "2 GPUs"), ({"ecc.errors.uncorrected.volatile.total": "3"}, "broken", "GPU 1: uncorrected"), ({"clocks_event_reasons.hw_thermal_slowdown": "Active"}, "slow", "GPU 1: hw thermal slowdown"), (None, "broken", "1 GPUs, 2 wanted")],
)  # fmt: skip
def test_the_drivers_word(change: dict[str, str] | None, status: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that answers as nvidia-smi does, one field unknown to it."""
    row = {"index": "0", "uuid": "GPU-1", "memory.total": "143771", "ecc.errors.uncorrected.volatile.total": "0", "remapped_rows.pending": "No", "clocks_event_reasons.hw_thermal_slowdown": "Not Active", "clocks_event_reasons.hw_slowdown": "Not Active"}
    rows = [row] if change is None else [row, {**row, "index": "1", **change}]
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI.format(python=sys.executable, rows=rows))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gpus.health("cuda", 2)
    assert found["status"] == status
    assert words in found["detail"]
    assert status != "ok" or "doesn't tell remapped_rows.failure" in found["detail"]


def test_the_fabrics_state() -> None:
    section = "GPU 00000000:{}\n    Fabric\n        State                             : {}\n        Status                            : {}\n"
    good, bad_one, none = section.format("18", "Completed", "Success"), section.format("2A", "In Progress", "N/A"), section.format("18", "N/A", "N/A")
    assert gpus.fabric_state(good)["status"] == "ok"
    assert gpus.fabric_state(good + bad_one)["detail"].startswith("GPU 1: In Progress")
    assert gpus.fabric_state(none)["status"] == "not checked"


def test_infiniband_ports_of_the_kernel(tmp_path: Path) -> None:
    for device, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / device / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert infiniband(tmp_path)["ports"] == {"mlx5_0/1": "ACTIVE 400 Gb/sec", "mlx5_1/1": "DOWN 400 Gb/sec"}
    (tmp_path / "mlx5_0" / "ports" / "1" / "state").write_text("1: DOWN\n")
    assert infiniband(tmp_path)["status"] == "broken"


@pytest.mark.parametrize("ahead", [0.0, -2.0, 30.0])
def test_a_clock_that_is_off(ahead: float) -> None:
    with Hub("127.0.0.1", "t", clock=lambda: time.time() - ahead) as hub:
        guest = Guest("127.0.0.1", hub.port, "t")
        found = clock.skew(guest)
        assert found["seconds"] == pytest.approx(ahead, abs=0.2)
        assert 0 < found["bound"] < 0.2
        with pytest.raises(ConnectionError):
            Guest("127.0.0.1", hub.port, "another").ask()


def test_ports_and_the_way_between() -> None:
    with network.Sink("127.0.0.1") as sink:
        assert network.send("127.0.0.1", sink.port, 4) > 1
        port = sink.port
        assert network.ports("127.0.0.1", port)["status"] == "broken"
    assert network.ports("127.0.0.1", 0)["status"] == "ok"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        network.send("127.0.0.1", port, 1)


def test_canaries_and_files(tmp_path: Path) -> None:
    files.canary_write(tmp_path, "a")
    assert files.canary_seen(tmp_path, ["a", "b"], 0.3)[1] == ["b"]
    (tmp_path / "b").write_text("something else")
    assert files.canary_seen(tmp_path, ["a", "b"], 0.0)[1] == ["b"]
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(bytes(200_000))
    assert files.readable([str(model)])["files"] == {str(model): [1, 200_000]}
    (model / "lost").symlink_to(tmp_path / "nowhere")
    found = files.readable([str(model)])
    assert (found["status"], "lost: no such file" in found["detail"]) == ("broken", True)


NODE = "import json, sys; from miles.slurm.preflight.node import probe; assert 'pydantic' not in sys.modules and 'submitit' not in sys.modules; probe(json.loads(sys.argv[1]))"


def test_nodes_that_meet(tmp_path: Path) -> None:
    """Three nodes as processes with the standard library alone; the second never comes, the others are tested without it."""
    with Hub("127.0.0.1", "t") as hub:
        (tmp_path / "canaries").mkdir()
        files.canary_write(tmp_path, files.LOGIN)
        plan = {"hub": ["127.0.0.1", hub.port], "token": "t", "folder": str(tmp_path / "canaries"), "nodes": ["a", "b", "c"], "group": "all", "mine": ["a", "b", "c"], "device": "cpu", "gpus": 1, "counts_gpus": False}
        plan |= {"image": None, "read": [str(Path(__file__))], "port": 0, "seconds": 10.0, "patience": 20.0, "megabytes": 1, "rounds": 8}
        env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
        running = [subprocess.Popen([sys.executable, "-S", "-c", NODE, json.dumps(plan)], env={**env, "SLURMD_NODENAME": name, "MILES_HOST": host}) for name, host in (("a", "127.0.0.2"), ("c", "127.0.0.3"))]
        deadline = time.monotonic() + 60
        while not {"sink/a", "sink/c"} <= hub.words.keys() and time.monotonic() < deadline:
            time.sleep(0.02)
        hub.words["present"] = ["a", "c"]
        assert [each.wait(120) for each in running] == [0, 0]
        told = {node: hub.words[f"report/{node}"] for node in "ac"}
    judged = judge(["a", "b", "c"], told, {})
    assert bad(judged) == {"b": "answer: gave no answer"}
    probes = judged["a"]["probes"]
    assert {name for name, each in probes.items() if each["status"] == "ok"} == {"shared files", "clock", "files", "ports", "network"} | ({"infiniband"} & {name for name, each in probes.items() if "ports" in each})
    assert probes["network"]["rates"].keys() == {"c"}


def test_each_preflight_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Two at once delete nothing of each other, nor of one before."""
    run = RunDir(tmp_path / "run")
    (new_folder(run) / "run.yaml").write_text("of the first")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: new_folder(run), range(40)))
    assert sorted(int(folder.name) for folder in found) == list(range(2, 42))
    assert (tmp_path / "run" / "slurm" / "preflight" / "1" / "run.yaml").read_text() == "of the first"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be made"):
        new_folder(RunDir(tmp_path / "file"))


def test_a_preflight_on_a_real_slurm_names_the_broken_node(slurm: Cluster, tmp_path: Path) -> None:
    """Het job of two kinds of node; one node starts nothing. It is left out of what `render` writes next."""
    # The nodes share this machine's files and devices: what can be broken on one of them alone is what its shell does.
    broken = "if [ $SLURMD_NODENAME = train1 ]; then exit 9; fi"
    words = ["recipes/tiny", "cluster.executor=slurm", "cluster.placement=het", "train.num_nodes=3", "cluster.groups.train.partition=gb300", "cluster.groups.rollout.partition=h200"]
    words += ["cluster.groups.train.nodelist=train[0-2]", "cluster.groups.all.mem=100", f'cluster.groups.train.setup=["{broken}"]']
    run = tmp_path / "run"
    done = slurm.run([sys.executable, "-m", "miles.cli", "preflight", *words, "--run-dir", str(run), "--json"], env=slurm.env() | {"PYTHONPATH": str(REPOSITORY)}, cwd=REPOSITORY, check=False, timeout=300)
    assert done.returncode == 78, done.stderr
    said = json.loads(done.stdout)
    assert list(said["bad"]) == ["train1"]
    good = {name: probes for name, report in said["nodes"].items() if name != "train1" for probes in [report["probes"]]}
    assert len(good) == 3
    for probes in good.values():
        assert {name for name, each in probes.items() if each["status"] == "ok"} >= {"shared files", "clock", "ports", "network"}
        assert {name for name, each in probes.items() if each["status"] == "not checked"} >= {"gpu health", "container", "nccl"}
    assert list(json.loads((run / "slurm" / "exclude.json").read_text())["nodes"]) == ["train1"]
    written = [word for word in words if "nodelist" not in word]
    slurm.run([sys.executable, "-m", "miles.cli", "render", str(run), *written], env=slurm.env() | {"PYTHONPATH": str(REPOSITORY)}, cwd=REPOSITORY, timeout=300)
    assert (run / "slurm" / "train-rollout.sbatch").read_text().count("#SBATCH --exclude=train1") == 2
    assert slurm.run(["squeue", "-h", "--states=PENDING,RUNNING"]).stdout == ""
