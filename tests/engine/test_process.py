"""The engine as a process: how it starts, refuses, and ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from miles.config.exits import WRONG, UserError
from miles.engine.options import EngineOptions, options_from

PROMPT = [5, 17, 200, 33]


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "miles.run.engine", *options]


def environment(**more: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("MILES_")} | {"OMP_NUM_THREADS": "1", **more}


def refused(*options: str) -> str:
    result = subprocess.run(command(*options), capture_output=True, text=True, env=environment(), timeout=300)
    assert result.returncode == WRONG, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("engine: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]


def test_a_port_in_use_is_one_line_and_78(tiny_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in refused(str(tiny_folder), "--port", str(port))


def test_an_unknown_family_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    line = refused(str(tmp_path), "--port", "0")
    assert "gpt2" in line
    assert "qwen3_moe" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["f", "--port", "70000"], "port is 70000"),
        (["f", "--dtype", "int4"], "dtype is 'int4'"),
        (["f", "--threads", "0"], "threads is 0"),
        (["f", "--kv-cache-tokens", "0"], "kv_cache_tokens is 0"),
    ],
)
def test_wrong_options_are_named(arguments, words):
    with pytest.raises(UserError, match=words):
        options_from(arguments, {})


def test_a_missing_folder_is_named(make_engine):
    with pytest.raises(UserError, match=r"/nowhere is no Hugging Face folder: config.json is missing"):
        make_engine(folder="/nowhere")


def test_a_context_beyond_the_model_is_refused(make_engine):
    with pytest.raises(UserError, match="context_length is 9999"):
        make_engine(context_length=9999)


def test_a_folder_without_weights_is_named(make_engine, tiny_folder, tmp_path):
    shutil.copy(tiny_folder / "config.json", tmp_path)
    with pytest.raises(UserError, match="safetensors"):
        make_engine(folder=str(tmp_path))


def test_a_crash_in_the_loop_ends_the_process(tiny_folder, tmp_path):
    """An exception in a model step must not leave a server that answers nothing."""
    code = (
        "import sys\nfrom miles.engine.options import EngineOptions\nfrom miles.engine.server import serve\n"
        "def ready(url, engine):\n    engine.runner.step = None\n    print(url, flush=True)\n"
        f"serve(EngineOptions({str(tiny_folder)!r}, port=0, skip_tokenizer_init=True), ready)\n"
    )
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment())
    url = process.stdout.readline().strip()
    with pytest.raises(httpx.TransportError):
        httpx.post(f"{url}/generate", json={"input_ids": PROMPT}, timeout=60, trust_env=False)
    assert process.wait(timeout=60) == 1
    said = (tmp_path / "errors").read_text()
    assert "Traceback" in said
    assert "'NoneType' object is not callable" in said


def test_memory_stays_flat_over_http_and_sigterm_ends_it_cleanly(tiny_folder, tmp_path):
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            command(str(tiny_folder), "--port", "0", "--skip-tokenizer-init"), stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()
        )
    url = process.stdout.readline().split()[-1]

    def resident() -> float:
        with open(f"/proc/{process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        for index in range(200):
            reply = http.post("/generate", json={"input_ids": [index + 3, *PROMPT], "sampling_params": {"max_new_tokens": 8}, "return_logprob": True})
            assert reply.status_code == 200
            if index == 49:
                before = resident()
        assert resident() - before < 16
        http.post("/pause_generation", json={"mode": "in_place"})  # a request that never ends must not hold up the end
        held = threading.Thread(target=hold, args=(url,))
        held.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, (tmp_path / "errors").read_text()[-2000:]
        held.join(timeout=60)
        assert not held.is_alive()


def hold(url: str) -> None:
    """A call that the engine can't answer; the server may drop it or answer with an error."""
    with contextlib.suppress(httpx.TransportError):
        assert httpx.post(f"{url}/generate", json={"input_ids": PROMPT}, trust_env=False, timeout=60).status_code >= 500


def test_options_from_a_command_line():
    given = options_from(["folder", "--port", "0", "--no-batch-invariant", "--kv-cache-tokens", "99"], {"MILES_TOKEN": "secret", "OMP_NUM_THREADS": "3"})
    assert given == EngineOptions("folder", port=0, batch_invariant=False, kv_cache_tokens=99, token="secret", threads=3)
