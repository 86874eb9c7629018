"""The trainer in this process: it learns, splits don't show in the gradient, log-probs are those of transformers, files are right."""

import threading

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open

from miles.data.store.shard import open_shard
from miles.data.store.train_record import open_train_record
from miles.training.fsdp import FsdpTrainer
from miles.training.optimizer import Diverged
from miles.training.reader import Reader


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model") / "llama", "llama", tied=True)


def gradients(trainer, batch, step=0):
    """Gradients before clipping, as full tensors (the optimizer is kept from moving)."""
    caught = {}

    def catch(optimizer, *_):
        for name, parameter in trainer.model.named_parameters():
            caught[name] = parameter.grad.clone()

    hook = trainer.optimizer.register_step_pre_hook(catch)
    metrics = trainer.train_step(batch, step)
    hook.remove()
    return caught, metrics


def reference_logprobs(folder, samples, temperature=1.0):
    """Log-probs of every token but the first by transformers alone, one sequence at a time, in float64."""
    from transformers import AutoModelForCausalLM

    found = {}
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager")
    for sample in samples:
        tokens = torch.from_numpy(sample.token_id.astype(np.int64))
        with torch.no_grad():
            logits = network(input_ids=tokens[None]).logits[0, :-1] / temperature
        found[sample.draw, sample.sample] = torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0].numpy()
    return found


@pytest.mark.parametrize("family", ["model", "llama"])
def test_record_holds_the_log_probs_of_transformers_in_place(family, request, ranks, tmp_path):
    folder = request.getfixturevalue(family)
    samples = tiny.make_samples(3)
    manifest = tiny.make_batch(tmp_path / "batch", samples, temperature=0.7)
    trainer = FsdpTrainer(tiny.make_config(), folder, ranks)
    trainer.start_phase("rollout")
    batch = trainer.open_batch(manifest, tmp_path / "batch")
    trainer.train_step(batch, 0)
    trainer.close_batch(batch, tmp_path / "train")
    expected = reference_logprobs(folder, samples, 0.7)
    by_name = {(sample.draw, sample.sample): sample for sample in samples}
    identity = []
    for entry in manifest.shards:
        with open_shard(tmp_path / "batch" / entry.name) as shard:
            table = shard.sequences()
            identity.append(list(zip(table["draw"].tolist(), table["sample"].tolist(), strict=True)))
    with open_train_record(tmp_path / "train" / "node_0000.h5") as record:
        assert record.attrs["world_size"] == 1
        table = record.sequences()
        assert len(table["row"]) == len(samples)
        for index, (shard_index, row) in enumerate(zip(table["shard"], table["row"], strict=True)):
            sample = by_name[identity[shard_index][row]]
            got = record.tokens(index, index + 1, ["train_logprob", "advantage", "used", "entropy"])
            generated = ~np.isnan(sample.rollout_logprob)
            np.testing.assert_array_equal(np.isnan(got["train_logprob"]), ~generated)
            np.testing.assert_allclose(got["train_logprob"][generated], expected[sample.draw, sample.sample][generated[1:]], atol=2e-4)
            np.testing.assert_array_equal(got["used"], sample.loss_mask)
            group = np.array([s.reward for s in samples if s.draw == sample.draw])
            advantage = 0.0 if (group == group[0]).all() else (sample.reward - group.mean()) / (group.std(ddof=1) + 1e-6)
            np.testing.assert_allclose(got["advantage"][generated], advantage, rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_autograd_in_float64(llama, ranks, tmp_path):
    """Per-sample reduction, one optimizer step: the gradient is -Σ A/(T N) ∇log π, computed here by transformers alone."""
    from transformers import AutoModelForCausalLM

    samples = tiny.make_samples(4)
    manifest = tiny.make_batch(tmp_path / "batch", samples, max_tokens=50)
    trainer = FsdpTrainer(tiny.make_config(train={"optimizer": {"lr": 0.0, "clip_grad": 0.0}}), llama, ranks)
    trainer.start_phase("rollout")
    got, metrics = gradients(trainer, trainer.open_batch(manifest, tmp_path / "batch"))
    network = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64, attn_implementation="eager")
    total = 0.0
    for sample in samples:
        group = np.array([s.reward for s in samples if s.draw == sample.draw])
        advantage = 0.0 if (group == group[0]).all() else (sample.reward - group.mean()) / (group.std(ddof=1) + 1e-6)
        mask = torch.from_numpy(sample.loss_mask[1:] != 0)
        if not mask.any():
            continue
        tokens = torch.from_numpy(sample.token_id.astype(np.int64))
        logprob = torch.log_softmax(network(input_ids=tokens[None]).logits[0, :-1], -1).gather(1, tokens[1:, None])[:, 0]
        total = total - advantage * logprob[mask].sum() / mask.sum() / len(samples)
    total.backward()
    squares = 0.0
    for name, parameter in network.named_parameters():
        squares += float(parameter.grad.square().sum())
        torch.testing.assert_close(got[name].double(), parameter.grad, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert metrics["train/grad_norm"] == pytest.approx(squares**0.5, rel=1e-4)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", ["rollout", "sft"])
def test_splits_do_not_show_in_the_gradient(model, ranks, tmp_path, per_token, kind):
    samples = tiny.make_samples(5)
    algorithm = {"calculate_per_token_loss": per_token, "entropy_coef": 0.01, "use_tis": True, "use_kl_loss": True, "kl_loss_type": "k2", "kl_loss_coef": 0.1}
    config = tiny.make_config(algorithm=algorithm, train={"optimizer": {"lr": 0.0, "clip_grad": 0.0}}, warm_start={"steps": 1, "optimizer": {"lr": 0.0, "clip_grad": 0.0}})
    trainer = FsdpTrainer(config, model, ranks)
    trainer.start_phase(kind)
    trainer.load_reference(model)
    found = []
    for index, tokens in enumerate((10_000, 60, 25)):
        manifest = tiny.make_batch(tmp_path / str(index), samples, max_tokens=tokens, shards=1 + index, kind=kind)
        batch = trainer.open_batch(manifest, tmp_path / str(index))
        found.append((batch.micro_batches(0), *gradients(trainer, batch)))
        batch.close()
    counts = [count for count, _, _ in found]
    assert counts[0] == 1
    assert counts[0] < counts[1] < counts[2]
    scale = max(float(gradient.abs().max()) for gradient in found[0][1].values())
    for _, other, metrics in found[1:]:
        for name, gradient in found[0][1].items():
            assert float((other[name] - gradient).abs().max()) <= 1e-6 * max(scale, 1.0), name
        for name, value in found[0][2].items():
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_sft_loss_falls(model, ranks, tmp_path):
    manifest = tiny.make_batch(tmp_path / "batch", tiny.make_samples(6), kind="sft")
    trainer = FsdpTrainer(tiny.make_config(warm_start={"steps": 12, "optimizer": {"lr": 2e-2}}), model, ranks)
    trainer.start_phase("sft")
    losses = []
    for _ in range(12):
        batch = trainer.open_batch(manifest, tmp_path / "batch")
        losses.append(trainer.train_step(batch, 0)["train/loss"])
        batch.close()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("what", ["train_step", "score"])
def test_the_denominators_are_read_before_a_thread_reads_ahead(model, ranks, tmp_path, monkeypatch, what):
    """Both open shards, and a reader is for one caller at a time."""
    read, beside = Reader.first_tokens, []

    def note(reader, rows):
        beside.append([thread.name for thread in threading.enumerate() if thread.name == "prefetch"])
        return read(reader, rows)

    monkeypatch.setattr(Reader, "first_tokens", note)
    trainer = FsdpTrainer(tiny.make_config(), model, ranks)
    trainer.start_phase("rollout")
    batch = trainer.open_batch(tiny.make_batch(tmp_path, tiny.make_samples(5), max_tokens=25), tmp_path)
    getattr(trainer, what)(batch, 0)
    batch.close()
    assert beside == [[]]


def test_grpo_raises_the_probability_of_rewarded_samples(model, ranks, tmp_path):
    samples = tiny.make_samples(7, odd=False)
    manifest = tiny.make_batch(tmp_path / "batch", samples)
    trainer = FsdpTrainer(tiny.make_config(), model, ranks)
    trainer.start_phase("rollout")
    reward = np.array([sample.reward for sample in samples])

    def correlation():
        total = reference_logprobs(trainer_folder(trainer, tmp_path), samples)
        value = np.array([total[s.draw, s.sample][s.prompt_length - 1 :].mean() for s in samples])
        return np.corrcoef(value, reward)[0, 1]

    before = correlation()
    for _ in range(5):
        batch = trainer.open_batch(manifest, tmp_path / "batch")
        trainer.train_step(batch, 0)
        batch.close()
    assert correlation() > before + 0.1


def trainer_folder(trainer, tmp_path):
    folder = tmp_path / "export"
    trainer.export_hf(folder)
    return folder


def test_first_of_several_steps_has_ratio_one_and_later_ones_have_not(model, ranks, tmp_path):
    manifest = tiny.make_batch(tmp_path / "batch", tiny.make_samples(8), steps=3)
    trainer = FsdpTrainer(tiny.make_config(train={"num_steps_per_rollout": 3, "optimizer": {"lr": 5e-2}}), model, ranks)
    trainer.start_phase("rollout")
    batch = trainer.open_batch(manifest, tmp_path / "batch")
    assert batch.steps == 3
    found = [trainer.train_step(batch, index) for index in range(3)]
    trainer.close_batch(batch, tmp_path / "train")
    assert found[0]["train/ppo_kl"] == 0
    assert found[0]["train/ess_ratio"] == pytest.approx(1.0)
    assert found[1]["train/ppo_kl"] != 0
    assert found[2]["train/ess_ratio"] < 1
    assert trainer.phase_steps == 3


def stored_names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {(name, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118


def test_exported_folder_is_loaded_by_transformers(model, llama, ranks, tmp_path):
    from transformers import AutoModelForCausalLM

    for index, folder in enumerate((model, llama)):
        trainer = FsdpTrainer(tiny.make_config(), folder, ranks)
        trainer.start_phase("sft")
        manifest = tiny.make_batch(tmp_path / f"batch{index}", tiny.make_samples(9), kind="sft")
        batch = trainer.open_batch(manifest, tmp_path / f"batch{index}")
        trainer.train_step(batch, 0)
        batch.close()
        out = tmp_path / f"out{index}"
        trainer.export_hf(out)
        loaded, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert stored_names(out) == stored_names(folder), "names as transformers writes them, which SGLang reads too"
        mine = dict(trainer.model.named_parameters())
        theirs = dict(loaded.named_parameters())
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), name
        assert type(loaded).__name__ == AutoModelForCausalLM.from_pretrained(folder).__class__.__name__
        before = AutoModelForCausalLM.from_pretrained(folder)
        assert not torch.equal(before.model.norm.weight, loaded.model.norm.weight), "training moved it"


def test_checkpointed_activations_change_no_bit(model, ranks, tmp_path):
    manifest = tiny.make_batch(tmp_path / "batch", tiny.make_samples(10))
    sums = []
    for flag in (False, True):
        trainer = FsdpTrainer(tiny.make_config(train={"gradient_checkpointing": flag}), model, ranks)
        trainer.start_phase("rollout")
        batch = trainer.open_batch(manifest, tmp_path / "batch")
        trainer.train_step(batch, 0)
        batch.close()
        sums.append(trainer.weight_checksum())
        layers = [layer for layer in trainer.model.model.layers if layer.gradient_checkpointing]
        assert len(layers) == (2 if flag else 0)
    assert sums[0] == sums[1]


def test_diverged_gradient_leaves_the_weights(model, ranks, tmp_path):
    manifest = tiny.make_batch(tmp_path / "batch", tiny.make_samples(11))
    trainer = FsdpTrainer(tiny.make_config(), model, ranks)
    trainer.start_phase("rollout")
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("inf")
    before = trainer.weight_checksum()
    with pytest.raises(Diverged, match="gradient's norm is nan"):
        trainer.train_step(trainer.open_batch(manifest, tmp_path / "batch"), 0)
    assert trainer.weight_checksum() == before
    assert trainer.phase_steps == 0


def test_batch_for_other_ranks_is_refused(model, ranks, tmp_path):
    manifest = tiny.make_batch(tmp_path / "batch", tiny.make_samples(12), world=2)
    trainer = FsdpTrainer(tiny.make_config(), model, ranks)
    trainer.start_phase("rollout")
    with pytest.raises(ValueError, match="2 trainer ranks, and this run has 1"):
        trainer.open_batch(manifest, tmp_path / "batch")


def test_reward_that_is_not_finite_is_named(model, ranks, tmp_path):
    samples = tiny.make_samples(13)
    samples[5].reward = float("nan")
    manifest = tiny.make_batch(tmp_path / "batch", samples)
    trainer = FsdpTrainer(tiny.make_config(), model, ranks)
    trainer.start_phase("rollout")
    with pytest.raises(ValueError, match="reward of draw 1, sample 1 is nan"):
        trainer.open_batch(manifest, tmp_path / "batch")


def test_metrics_of_the_batch(model, ranks, tmp_path):
    samples = tiny.make_samples(14)
    manifest = tiny.make_batch(tmp_path / "batch", samples)
    trainer = FsdpTrainer(tiny.make_config(), model, ranks)
    trainer.start_phase("rollout")
    found = trainer.open_batch(manifest, tmp_path / "batch").metrics()
    lengths = [sample.response_length for sample in samples]
    assert found["rollout/raw_reward"] == pytest.approx(np.mean([sample.reward for sample in samples]))
    assert found["rollout/response_len/mean"] == pytest.approx(np.mean(lengths))
    assert found["rollout/response_len/median"] == np.median(lengths)
    assert (found["rollout/response_len/max"], found["rollout/response_len/min"]) == (max(lengths), 0)
    equal = [len({s.reward for s in samples if s.draw == draw}) == 1 for draw in range(6)]
    assert found["rollout/zero_std/ratio"] == pytest.approx(np.mean(equal))


def test_bfloat16_forward_with_float32_weights(llama, ranks, tmp_path):
    manifest = tiny.make_batch(tmp_path / "batch", tiny.make_samples(15), kind="sft")
    sections = {"model": {"dtype": "bfloat16"}, "rollout": {"batch_invariant": False}, "warm_start": {"steps": 8, "optimizer": {"lr": 1e-2}}}
    trainer = FsdpTrainer(tiny.make_config(**sections), llama, ranks)
    trainer.start_phase("sft")
    losses = []
    for _ in range(8):
        batch = trainer.open_batch(manifest, tmp_path / "batch")
        losses.append(trainer.train_step(batch, 0)["train/loss"])
        batch.close()
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert {tensor.dtype for _, tensor in trainer.named_weights()} == {torch.bfloat16}, "engines get the forward's dtype"
    folder = trainer.save(tmp_path / "c", 1, {})
    other = FsdpTrainer(tiny.make_config(**sections), llama, ranks)
    other.load(folder)
    assert other.weight_checksum() == trainer.weight_checksum()
