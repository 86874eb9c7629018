"""Logits are the largest tensors of a step: one copy is kept for the backward pass, none after it."""

import gc

import tiny
import torch

from miles.training.fsdp import FsdpTrainer


def wide(tensor, rows):
    """Whether a tensor is as large as the logits of `rows` predicted tokens, and no weight."""
    return tensor.ndim >= 2 and tensor.shape[-1] == tiny.VOCABULARY and tensor.numel() >= rows * tiny.VOCABULARY


def test_one_copy_of_the_logits_for_backward_and_none_afterwards(ranks, tmp_path):
    model = tiny.make_model(tmp_path / "hf", "llama")
    algorithm = {"use_kl_loss": True, "kl_loss_type": "k3", "kl_loss_coef": 0.1, "entropy_coef": 0.01, "use_tis": True}
    trainer = FsdpTrainer(tiny.make_config(algorithm=algorithm), model, ranks)
    trainer.load_reference(model)
    trainer.start_phase("rollout")
    manifest = tiny.make_batch(tmp_path / "batch", tiny.make_samples(0), max_tokens=10_000)
    batch = trainer.open_batch(manifest, tmp_path / "batch")
    rows = len(next(batch.packed(0)).row)
    saved, left = set(), []

    def pack(tensor):
        if wide(tensor, rows):
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    def before_update(*_):
        gc.collect()
        left.extend(tuple(each.shape) for each in gc.get_objects() if type(each) is torch.Tensor and wide(each, rows))

    hook = trainer.optimizer.register_step_pre_hook(before_update)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.train_step(batch, 0)
    hook.remove()
    assert len(saved) == 1
    assert left == []


def test_logits_are_made_where_a_token_is_predicted_and_nowhere_else(ranks, tmp_path):
    trainer = FsdpTrainer(tiny.make_config(), tiny.make_model(tmp_path / "hf", "llama"), ranks)
    trainer.start_phase("rollout")
    samples = tiny.make_samples(1)
    manifest = tiny.make_batch(tmp_path / "batch", samples, max_tokens=10_000)
    batch = trainer.open_batch(manifest, tmp_path / "batch")
    made = []
    hook = trainer.model.register_forward_hook(lambda module, arguments, output: made.append(output.logits.numel() // tiny.VOCABULARY))
    trainer.train_step(batch, 0)
    hook.remove()
    generated = sum(sample.response_length for sample in samples)
    total = sum(len(sample.token_id) for sample in samples)
    assert sum(made) == generated < total
