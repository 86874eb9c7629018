"""Trainer to two real embedded engines, by folder and by socket: the same bits arrive, and what does not arrive is named."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import tiny

from miles.config.exits import TryAgain
from miles.engine.client import EngineClient
from miles.sync.contract import SyncError
from miles.sync.disk import DiskTransport
from miles.sync.engines import Engines
from miles.sync.tensor import TensorTransport
from miles.training.distributed import start_ranks, stop_ranks
from miles.training.fsdp import FsdpTrainer

TOKEN = "sesame"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    ranks = start_ranks(0, 1, threads=1)
    folder = tmp_path_factory.mktemp("model")
    trainer = FsdpTrainer(tiny.make_config(warm_start={"steps": 9, "optimizer": {"lr": 1e-2}}), tiny.make_model(folder / "hf"), ranks)
    trainer.start_phase("sft")
    trainer.batch_folder = folder / "batch"
    trainer.manifest = tiny.make_batch(trainer.batch_folder, tiny.make_samples(0), kind="sft")
    yield trainer
    stop_ranks()


def move(trainer):
    """One step of training, so that the weights are new."""
    batch = trainer.open_batch(trainer.manifest, trainer.batch_folder)
    trainer.train_step(batch, 0)
    batch.close()


@pytest.fixture(scope="module")
def urls(trainer):
    command = [sys.executable, str(Path(__file__).with_name("engine_process.py")), str(trainer.model_folder), TOKEN]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(2)]
    try:
        yield [process.stdout.readline().strip() for process in processes]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)


def ask(url, function):
    async def once():
        async with EngineClient(url, TOKEN) as client:
            return await function(client)

    return asyncio.run(once())


def greedy(client):
    sampling = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}
    return client.generate({"input_ids": [5, 6, 7, 8], "sampling_params": sampling, "return_logprob": True})


def engine_logprobs(url):
    return [entry[0] for entry in ask(url, greedy)["meta_info"]["output_token_logprobs"]]


@pytest.mark.parametrize("kind", ["disk", "tensor", "small_buckets"])
@pytest.mark.parametrize("mode", ["abort", "retract"])
def test_engines_hold_the_trainers_weights(trainer, urls, tmp_path, kind, mode):
    if kind == "disk":
        transport = DiskTransport(tmp_path / "sync", urls, TOKEN, mode)
    else:
        transport = TensorTransport(urls, TOKEN, mode, bucket_bytes=4096 if kind == "small_buckets" else 1 << 20)
    before = engine_logprobs(urls[0])
    move(trainer)
    checksum = transport.push(trainer, 41)
    assert checksum == trainer.weight_checksum()
    for url in urls:
        assert ask(url, lambda client: client.checksums())["per_engine_checksum"] == checksum
        assert ask(url, lambda client: client.model_info())["weight_version"] == "41"
    after = engine_logprobs(urls[0])
    assert after != before, "the prefix cache does not answer for old weights"
    assert after == engine_logprobs(urls[1])


def test_folder_of_the_version_before_goes(trainer, urls, tmp_path):
    transport = DiskTransport(tmp_path / "sync", urls, TOKEN)
    transport.push(trainer, 1)
    transport.push(trainer, 2)
    assert [path.name for path in (tmp_path / "sync").iterdir()] == ["version_000002"]


def test_running_requests_outlive_a_retracting_sync(trainer, urls, tmp_path):
    answers = []

    def long(client):
        return client.generate({"input_ids": [9, 10], "sampling_params": {"temperature": 1.0, "max_new_tokens": 110, "ignore_eos": True}, "return_logprob": True})

    threads = [threading.Thread(target=lambda url=url: answers.append(ask(url, long))) for url in urls for _ in range(2)]
    for thread in threads:
        thread.start()
    move(trainer)
    TensorTransport(urls, TOKEN, "retract").push(trainer, 77)
    for thread in threads:
        thread.join(120)
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [110] * 4
    assert {answer["meta_info"]["finish_reason"]["type"] for answer in answers} == {"length"}


def test_wrong_weights_are_named(trainer, urls, tmp_path):
    DiskTransport(tmp_path / "sync", urls, TOKEN).push(trainer, 5)
    move(trainer)
    with pytest.raises(SyncError, match=rf"{urls[0]} holds weights \w+, the trainer {trainer.weight_checksum()}.*{urls[1]}"):
        Engines(urls, TOKEN).verify(trainer.weight_checksum(), 5)
    with pytest.raises(SyncError, match="serves weight version 5, not 6"):
        Engines(urls, TOKEN).verify(trainer.weight_checksum(), 6)


class Tampering(DiskTransport):
    """Changes one weight on its way."""

    def end(self):
        path = self._target / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, path)
        super().end()


def test_tampered_weights_are_noticed_and_the_engines_stay_paused(trainer, urls, tmp_path):
    with pytest.raises(SyncError, match="holds weights"):
        Tampering(tmp_path / "sync", urls, TOKEN).push(trainer, 8)
    late = []
    thread = threading.Thread(target=lambda: late.append(ask(urls[0], greedy)))
    thread.start()
    thread.join(1.0)
    assert not late, "nothing is generated by wrong weights"
    DiskTransport(tmp_path / "sync", urls, TOKEN).push(trainer, 9)
    thread.join(120)
    assert late


def test_engine_that_is_not_there_is_named(trainer, urls):
    with pytest.raises(TryAgain, match=r"engine http://127.0.0.1:9: .*no answer"):
        TensorTransport(["http://127.0.0.1:9", urls[0]], TOKEN).push(trainer, 3)
    Engines(urls, TOKEN).resume()


def test_wrong_token_is_named(trainer, urls):
    with pytest.raises(SyncError, match="401"):
        TensorTransport(urls, "other").push(trainer, 3)
