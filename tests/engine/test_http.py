"""The HTTP side within this process: malformed bodies, text, tensors over HTTP, health."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from miles.engine.control import Control
from miles.engine.engine import EngineThread
from miles.engine.server import build_app

PROMPT = [5, 17, 200, 33]


@pytest.fixture
def serve(make_engine) -> Callable[..., Any]:
    """Runs an async test body with an HTTP client on a fresh engine."""

    def run(body: Callable[[httpx.AsyncClient], Awaitable[Any]], **options: Any) -> Any:
        async def inner() -> Any:
            thread = EngineThread(make_engine(**options))
            app = build_app(thread)
            thread.start()
            try:
                transport = httpx.ASGITransport(app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as http:
                    return await asyncio.wait_for(body(http), 120)
            finally:
                await asyncio.get_running_loop().run_in_executor(None, thread.stop)

        return asyncio.run(inner())

    return run


ROUTES = ["/generate", "/pause_generation", "/continue_generation", "/abort_request", "/update_weights_from_disk", "/update_weights_from_tensor",
          "/update_weight_version", "/release_memory_occupation", "/weights_checker"]  # fmt: skip


def malformed(rng: random.Random) -> bytes:
    good = json.dumps({"input_ids": PROMPT, "sampling_params": {"temperature": 0.5}, "rid": "x"}).encode()
    kind = rng.randrange(5)
    if kind == 0:
        return good[: rng.randrange(1, len(good))]
    if kind == 1:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
    if kind == 2:
        at = rng.randrange(len(good))
        return good[:at] + rng.choice([b'"', b"{", b"]", b"\x00", b"\xff", b",,"]) + good[at:]
    return rng.choice([b"[]", b"3", b'"text"', b"[1, 2]", b"NaN", b"{]", b"{'a': 1}", b"true"])


def test_malformed_json_is_400_everywhere(serve):
    rng = random.Random(0)

    async def body(http: httpx.AsyncClient) -> None:
        for _ in range(150):
            content = malformed(rng)
            try:
                if isinstance(json.loads(content), dict):
                    continue
            except ValueError:
                pass
            reply = await http.post(rng.choice(ROUTES), content=content)
            assert reply.status_code == 400, content
            assert reply.json()["object"] == "error"
        good = await http.post("/generate", json={"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2}})
        assert good.status_code == 200

    serve(body)


def test_a_bug_is_not_the_requests_fault(serve, monkeypatch):
    async def broken(self, http):
        return [].index("what a programmer thought was there")

    monkeypatch.setattr(Control, "ping", broken)

    async def body(http: httpx.AsyncClient) -> None:
        assert (await http.get("/ping")).status_code == 500
        assert (await http.get("/model_info")).status_code == 200

    serve(body)


@pytest.mark.parametrize(
    ("route", "content"),
    [
        ("/pause_generation", {"mode": 3}),
        ("/pause_generation", {"mode": "sleep"}),
        ("/update_weights_from_disk", {}),
        ("/update_weights_from_disk", {"model_path": 5}),
        ("/update_weights_from_disk", {"model_path": "/nowhere"}),
        ("/update_weights_from_disk", {"model_path": "/nowhere", "weight_version": 3}),
        ("/update_weights_from_disk", {"model_path": "/nowhere", "load_format": "gguf"}),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["gAR9lC4="]}),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["gAR9lC4="], "load_format": "flattened_bucket"}),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["gAR9lC4="], "load_format": "safetensors"}),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["", ""], "load_format": "safetensors"}),
        ("/update_weights_from_tensor", {"serialized_named_tensors": "", "load_format": "safetensors"}),
        ("/update_weight_version", {}),
        ("/release_memory_occupation", {"tags": ["everything"]}),
        ("/resume_memory_occupation", {"tags": ["weights"]}),
        ("/weights_checker", {"action": "compare"}),
        ("/flush_cache?timeout=soon", {}),
    ],
)
def test_wrong_control_calls_are_400(serve, route, content):
    async def body(http: httpx.AsyncClient) -> None:
        reply = await http.post(route, json=content)
        assert reply.status_code == 400
        assert reply.json()

    serve(body)


def test_tensors_over_http(serve, make_engine, tmp_path):
    tensors = {"model.norm.weight": make_engine().runner.model.state_dict()["model.norm.weight"] * 2}

    async def body(http: httpx.AsyncClient) -> None:
        before = (await http.post("/weights_checker")).json()["per_engine_checksum"]
        payload = {"serialized_named_tensors": [base64.b64encode(save(tensors)).decode()], "load_format": "safetensors", "weight_version": "5"}
        reply = await http.post("/update_weights_from_tensor", json=payload)
        assert reply.json() == {"success": True, "message": "Success"}
        assert (await http.get("/model_info")).json()["weight_version"] == "5"
        assert (await http.post("/weights_checker")).json()["per_engine_checksum"] != before

    serve(body)


def test_released_engines_refuse_requests_and_health_probes(serve, tiny_folder):
    async def body(http: httpx.AsyncClient) -> None:
        ask = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2}}
        assert (await http.post("/release_memory_occupation", json={})).content == b"null"
        reply = await http.post("/generate", json=ask)
        assert reply.status_code == 503
        assert "released" in reply.json()["message"]
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/health_generate")).status_code == 503
        assert (await http.post("/weights_checker")).status_code == 400
        assert (await http.post("/resume_memory_occupation", json={})).content == b"null"
        assert (await http.post("/generate", json=ask)).status_code == 503
        assert (await http.post("/update_weights_from_disk", json={"model_path": str(tiny_folder)})).status_code == 200
        assert (await http.post("/generate", json=ask)).status_code == 200
        assert (await http.get("/health_generate")).status_code == 200

    serve(body)


def test_loads(serve):
    async def body(http: httpx.AsyncClient) -> None:
        (load,) = (await http.get("/v1/loads")).json()["loads"]
        assert load["num_total_reqs"] == 0
        assert (await http.get("/get_load")).json() == [{"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}]
        assert (await http.get("/ping")).status_code == 200
        assert (await http.get("/get_model_info")).json() == (await http.get("/model_info")).json()
        assert "token" not in (await http.get("/server_info")).json()

    serve(body, token="")


def test_memory_goes_only_when_idle(serve):
    async def body(http: httpx.AsyncClient) -> None:
        long = asyncio.create_task(http.post("/generate", json={"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}))
        while not (await http.get("/get_load")).json()[0]["num_reqs"]:
            await asyncio.sleep(0.001)
        await http.post("/pause_generation", json={"mode": "in_place"})
        assert (await http.post("/release_memory_occupation", json={})).status_code == 400
        aborted = asyncio.create_task(http.post("/abort_request", json={"abort_all": True}))
        assert (await long).json()["meta_info"]["finish_reason"]["type"] == "abort"
        assert (await aborted).content == b""
        await http.post("/continue_generation", json={})

    serve(body)


@pytest.fixture
def text_folder(tiny_folder, tmp_path):
    """The tiny model with a tokenizer of one token a byte, so that texts are known beforehand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, "<eos>": 1, "<pad>": 2} | {letter: index + 3 for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab | {f"<extra{i}>": len(vocab) + i for i in range(384 - len(vocab))}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path / "text"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).symlink_to(file)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


def test_text_and_stop_strings(serve, text_folder):
    async def body(http: httpx.AsyncClient) -> None:
        async def generate(**sampling: Any) -> dict[str, Any]:
            ask = {"text": "hello", "sampling_params": {"temperature": 0.9, "sampling_seed": 4, "max_new_tokens": 60, "ignore_eos": True, **sampling}}
            return (await http.post("/generate", json=ask)).json()

        free = await generate()
        assert free["meta_info"]["prompt_tokens"] == 5
        text = free["text"]
        stop = next(text[i : i + 2] for i in range(5, len(text)) if text[i : i + 2].isascii() and text.find(text[i : i + 2]) == i)
        cut = await generate(stop=[stop, "never seen"])
        assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert cut["text"] == text[: text.index(stop)]
        assert cut["output_ids"] == free["output_ids"][: len(cut["output_ids"])]
        kept = await generate(stop=stop, no_stop_trim=True)
        assert kept["output_ids"] == cut["output_ids"]
        assert kept["text"].startswith(text[: text.index(stop) + 2])  # the token that completed the stop string may be longer

    serve(body, folder=str(text_folder), skip_tokenizer_init=False)
