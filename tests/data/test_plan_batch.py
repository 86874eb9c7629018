import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data.plan_batch import assign, first_fit_decreasing


@st.composite
def batches(draw):
    """Groups of 1 to 4 siblings, scattered over shards; rows of a shard sorted by (draw, sample), as write_shard leaves them."""
    groups = draw(st.lists(st.integers(1, 4), min_size=1, max_size=14))
    keys = [(3 * number, sample) for number, size in enumerate(groups) for sample in range(size)]
    lengths = draw(st.lists(st.integers(0, 60), min_size=len(keys), max_size=len(keys)))
    shards = draw(st.lists(st.integers(0, 2), min_size=len(keys), max_size=len(keys)))
    return keys, lengths, shards


def place(keys, shards):
    rows, count = [], {}
    for _, shard in zip(keys, shards, strict=True):
        rows.append(count.get(shard, 0))
        count[shard] = rows[-1] + 1
    return rows


def run(batch, order=None, **options):
    keys, lengths, shards = batch
    rows = place(keys, shards)
    order = list(range(len(keys))) if order is None else order
    columns = [[column[index] for index in order] for column in (lengths, [key[0] for key in keys], [key[1] for key in keys], shards, rows)]
    return assign(*columns, **options)


def expand(micro, batch):
    """Positions in (draw, sample) order that a micro-batch holds, in its order."""
    keys, _, shards = batch
    at = {place: index for index, place in enumerate(zip(shards, place(keys, shards), strict=True))}
    return [at[shard, row] for shard, first, last in micro for row in range(first, last)]


MODES = st.one_of(st.builds(lambda tokens: {"max_tokens": tokens}, st.integers(1, 150)), st.builds(lambda size: {"micro_batch_size": size}, st.integers(1, 5)))


@settings(max_examples=300, deadline=None)
@given(batch=batches(), mode=MODES, dp_size=st.integers(1, 5), balance=st.booleans(), data=st.data())
def test_what_every_assignment_holds(batch, mode, dp_size, balance, data):
    keys, lengths, _ = batch
    number_of_draws = len({key[0] for key in keys})
    steps = data.draw(st.integers(1, number_of_draws))
    found = run(batch, dp_size=dp_size, steps=steps, balance=balance, **mode)
    assert len(found) == steps
    everything, step_of_draw, draws_of_step = [], {}, []
    for number, ranks in enumerate(found):
        assert len(ranks) == dp_size
        assert len({len(micros) for micros in ranks}) == 1, "equal numbers of micro-batches"
        members = [[expand(micro, batch) for micro in micros] for micros in ranks]
        flat = [position for micros in members for micro in micros for position in micro]
        draws_of_step.append(len({keys[position][0] for position in flat}))
        for position in flat:
            assert step_of_draw.setdefault(keys[position][0], number) == number, "siblings in one step"
        everything += flat
        for micro in (micro for micros in members for micro in micros):
            assert micro == sorted(micro), "(draw, sample) order"
            if "max_tokens" in mode:
                assert len(micro) <= 1 or sum(lengths[position] for position in micro) <= mode["max_tokens"]
            else:
                assert len(micro) <= mode["micro_batch_size"]
        places = sum(len(micros) for micros in members)
        if len(flat) >= places and balance:
            assert all(micro for micros in members for micro in micros), "none empty when there are enough sequences"
        if balance:
            loads = [sum(lengths[position] for micro in micros for position in micro) for micros in members]
            largest = max((sum(lengths[position] for position in micro) for micros in members for micro in micros), default=0)
            assert max(loads) - min(loads) <= largest
    assert sorted(everything) == list(range(len(keys))), "every sequence exactly once"
    assert max(draws_of_step) - min(draws_of_step) <= 1


@settings(max_examples=150, deadline=None)
@given(batch=batches(), mode=MODES, dp_size=st.integers(1, 3), balance=st.booleans(), data=st.data())
def test_the_same_whichever_worker_sealed_what(batch, mode, dp_size, balance, data):
    keys, lengths, _ = batch
    other = (keys, lengths, data.draw(st.lists(st.integers(0, 2), min_size=len(keys), max_size=len(keys))))
    order = data.draw(st.permutations(range(len(keys))))
    one = run(batch, dp_size=dp_size, balance=balance, **mode)
    two = run(other, order, dp_size=dp_size, balance=balance, **mode)
    assert [[[expand(micro, batch) for micro in micros] for micros in ranks] for ranks in one] == [
        [[expand(micro, other) for micro in micros] for micros in ranks] for ranks in two
    ]


def test_by_hand_packing_and_dealing():
    # Eight sequences, budget 10: at least 4 micro-batches (39 tokens); longest first into the emptiest: 9|9|6+4|5+3+2+1.
    lengths = [9, 6, 4, 3, 9, 5, 2, 1]
    found = assign(lengths, [0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3] * 2, [0] * 8, range(8), dp_size=2, max_tokens=10)
    tokens = [[sum(lengths[row] for _, first, last in micro for row in range(first, last)) for micro in micros] for micros in found[0]]
    assert sum(map(sum, tokens)) == 39
    assert [len(micros) for micros in tokens] == [2, 2]
    assert max(max(micros) for micros in tokens) <= 10
    assert abs(sum(tokens[0]) - sum(tokens[1])) <= 1


def test_neighbours_become_one_range():
    found = assign([1] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2] * 2, [0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 2, 2], dp_size=1, max_tokens=100)
    assert found == [[[[(0, 0, 2), (1, 0, 3), (0, 2, 3)]]]]


def test_sequence_over_the_budget_is_alone():
    found = assign([50, 3, 3, 3], [0, 0, 1, 1], [0, 1, 0, 1], [0] * 4, range(4), dp_size=1, max_tokens=10)
    assert sorted(found[0][0]) == [[(0, 0, 1)], [(0, 1, 4)]]


def test_even_spread_that_breaks_the_budget_falls_back_to_first_fit():
    # 6+4, 4+3+3: only exact packing fits two bins of 10; emptiest-first makes 6+3+3 | 4+4, over the budget.
    lengths = [6, 4, 4, 3, 3]
    found = assign(lengths, [0] * 5, range(5), [0] * 5, range(5), dp_size=1, max_tokens=10)
    assert sorted(sum(lengths[row] for _, first, last in micro for row in range(first, last)) for micro in found[0][0]) == [10, 10]


def test_step_with_fewer_sequences_than_ranks_has_empty_micro_batches():
    assert assign([4, 5], [0, 1], [0, 0], [0, 0], [0, 1], dp_size=3, max_tokens=10) == [[[[(0, 1, 2)]], [[(0, 0, 1)]], [[]]]]


def test_more_steps_than_draws_is_the_users_fault():
    with pytest.raises(ValueError, match="2 prompt draws can't be divided over 3 optimizer steps; lower num_steps_per_rollout"):
        assign([1, 1, 1], [0, 0, 1], [0, 1, 0], [0] * 3, range(3), dp_size=1, steps=3, max_tokens=5)


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=12))
def test_first_fit_decreasing_is_near_the_least_number_of_bins(lengths):
    bins = first_fit_decreasing(np.array(lengths), np.arange(len(lengths)), 100)
    least = fewest_bins(sorted(lengths, reverse=True), 100)
    assert least <= len(bins) <= (11 * least + 6) / 9
    assert sorted(index for bin in bins for index in bin) == list(range(len(lengths)))


def fewest_bins(lengths, capacity):
    """Exact, by trying everything with cuts."""
    best = len(lengths)

    def place(index, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(lengths):
            best = len(rooms)
            return
        for room in sorted(set(rooms)):
            if room >= lengths[index]:
                rest = list(rooms)
                rest[rest.index(room)] -= lengths[index]
                place(index + 1, rest)
        place(index + 1, [*rooms, capacity - lengths[index]])

    place(0, [])
    return best


def test_a_full_scale_step_is_balanced_and_quick():
    generator = np.random.default_rng(0)
    lengths = generator.integers(100, 32_000, 4096)
    found = assign(lengths, np.arange(4096) // 8, np.arange(4096) % 8, np.zeros(4096), np.arange(4096), dp_size=64, max_tokens=32_768)
    loads = [sum(int(lengths[first:last].sum()) for micro in micros for _, first, last in micro) for micros in found[0]]
    assert max(loads) / np.mean(loads) < 1.01
