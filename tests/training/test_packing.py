"""Packing: alignment, masks, ragged and empty sequences, and that only the slices asked for are read."""

import numpy as np
import pytest
import tiny
import torch

from miles.data.store.shard import Shard, open_shard, write_shard
from miles.training.packing import Part, pack, unpack
from miles.training.reader import Reader

CPU = torch.device("cpu")


class Opened:
    """A shard as a batch of its own."""

    def __init__(self, path, advantage):
        with open_shard(path) as shard:
            table = shard.sequences()
        self.reader = Reader([path])
        self.part = Part(table["offset"], advantage, table["trained_tokens"])

    def pack(self, rows):
        [tokens] = self.reader.micro_batches([rows])
        return pack([self.part], rows, tokens, CPU)


@pytest.fixture
def opened(tmp_path):
    samples = tiny.make_samples(0)
    write_shard(tmp_path / "a.h5", samples)
    return samples, Opened(tmp_path / "a.h5", np.arange(len(samples), dtype=np.float32))


def test_every_prediction_is_the_next_token_of_its_own_sequence(opened):
    samples, part = opened
    batch = part.pack([(0, 2, 7), (0, 9, 12)])
    chosen = samples[2:7] + samples[9:12]
    expected = []
    start = 0
    for index, sample in enumerate(chosen):
        for t in range(1, len(sample.token_id)):
            if not np.isnan(sample.rollout_logprob[t]):
                expected.append((start + t - 1, int(sample.token_id[t]), bool(sample.loss_mask[t]), float(sample.rollout_logprob[t]), index))
        start += len(sample.token_id)
    got = list(zip(batch.row.tolist(), batch.target.tolist(), batch.mask.tolist(), batch.rollout_logprob.tolist(), batch.sequence.tolist(), strict=True))
    assert got == expected
    assert batch.token_id.tolist() == [int(t) for sample in chosen for t in sample.token_id]
    assert batch.position_id.tolist() == [t for sample in chosen for t in range(len(sample.token_id))]
    assert batch.cu_seqlens.tolist() == np.cumsum([0] + [len(sample.token_id) for sample in chosen]).tolist()
    assert batch.tokens.tolist() == [int(sample.loss_mask.sum()) for sample in chosen]
    assert batch.advantage.tolist() == [2, 3, 4, 5, 6, 9, 10, 11]
    assert batch.shard_row.tolist() == [2, 3, 4, 5, 6, 9, 10, 11]


def test_unpack_puts_values_at_their_tokens(opened):
    samples, part = opened
    batch = part.pack([(0, 0, 6)])
    values = unpack(batch, batch.rollout_logprob, float("nan"))
    np.testing.assert_array_equal(values, np.concatenate([sample.rollout_logprob for sample in samples[:6]]))


def test_prompt_token_that_the_loss_counts_is_predicted_but_a_first_token_never(opened, tmp_path):
    samples, _ = opened
    samples[0].loss_mask[:] = 1
    write_shard(tmp_path / "b.h5", samples[:1])
    batch = Opened(tmp_path / "b.h5", np.zeros(1, np.float32)).pack([(0, 0, 1)])
    assert batch.row.tolist() == list(range(len(samples[0].token_id) - 1))
    assert batch.tokens.tolist() == [len(samples[0].token_id) - 1]


def test_nothing_to_predict_keeps_one_masked_row(opened):
    samples, part = opened
    empty = next(index for index, sample in enumerate(samples) if sample.response_length == 0)
    batch = part.pack([(0, empty, empty + 1)])
    assert batch.mask.tolist() == [False]
    assert np.isnan(unpack(batch, torch.ones(1), float("nan"))).all()
    assert len(unpack(batch, torch.ones(1), 0.0)) == len(samples[empty].token_id)


def test_empty_micro_batch(opened):
    batch = opened[1].pack([])
    assert (batch.sequences, batch.mask.tolist()) == (0, [False])
    assert len(unpack(batch, torch.ones(1), 0.0)) == 0


def test_only_the_slice_is_read(opened, monkeypatch):
    _, part = opened
    asked = []
    real = Shard.tokens
    monkeypatch.setattr(Shard, "tokens", lambda self, first, last, names: asked.append((first, last)) or real(self, first, last, names))
    part.pack([(0, 3, 4), (0, 8, 9)])
    assert asked == [(3, 4), (8, 9)]
