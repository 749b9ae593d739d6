import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from plphp_cli.cache import PrunableLayer, capacity_for, fork_cache
from plphp_cli.errors import UnsupportedError

HEADS, WIDTH = 2, 4


def states(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, HEADS, count, WIDTH, generator=generator).unbind(0)


def prefilled(count=10, kept=None, room=None):
    layer = PrunableLayer()
    layer.update(*states(count))
    layer.hold(kept, room)
    return layer


KEPT = torch.tensor([[0, 2, 3, 9], [1, 2, 5, 9]])


def test_seen_and_held_are_two_numbers():
    layer = prefilled(10, KEPT, room=3)
    assert (layer.seen, layer.held, layer.get_seq_length()) == (10, 4, 10)
    assert layer.get_mask_sizes(1) == (11, 0)
    layer.update(*states(1, seed=1))
    assert (layer.seen, layer.held) == (11, 5)


def test_each_head_holds_its_own_tokens_and_new_ones_come_after():
    keys, values = states(10)
    new_keys, new_values = states(2, seed=1)
    layer = prefilled(10, KEPT, room=5)
    held_keys, held_values = layer.update(new_keys, new_values)
    for head in range(HEADS):
        assert torch.equal(held_keys[0, head], torch.cat([keys[0, head, KEPT[head]], new_keys[0, head]]))
        assert torch.equal(
            held_values[0, head], torch.cat([values[0, head, KEPT[head]], new_values[0, head]])
        )


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.none() | st.integers(0, 40), st.lists(st.integers(1, 9), max_size=8))
def test_storage_is_as_large_as_predicted_whatever_comes(count, room, chunks):
    layer = prefilled(count, None, room)
    token_bytes = 2 * HEADS * WIDTH * 4
    assert layer.token_bytes == token_bytes
    assert layer.allocated_bytes == capacity_for(count, room) * token_bytes
    for chunk in chunks:
        before = layer.allocated_bytes
        layer.update(*states(chunk))
        if layer.allocated_bytes != before:
            assert layer.allocated_bytes == capacity_for(layer.held, None) * token_bytes
        assert layer.held_bytes <= layer.allocated_bytes
    assert layer.held == layer.seen == count + sum(chunks)
    needed = count + max(sum(chunks), room or 0)
    assert layer.allocated_bytes <= math.ceil(max(needed * 1.05, needed + 1)) * token_bytes


def test_writing_in_place_moves_nothing_while_there_is_room():
    layer = prefilled(10, None, room=4)
    places = layer.keys.data_ptr(), layer.values.data_ptr()
    for _ in range(4):
        layer.update(*states(1))
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == places
    before = layer.keys.clone()
    layer.update(*states(1))
    assert layer.keys.data_ptr() != places[0]
    assert torch.equal(layer.keys[:, :, :-1], before)


def test_a_fork_is_independent_of_its_original():
    original = prefilled(10, None, room=2)
    fork, cut = original.fork(room=2), original.fork(KEPT, room=7)
    fork.update(*states(1, seed=1))
    assert (original.held, fork.held, cut.held, cut.seen) == (10, 11, 4, 10)
    assert torch.equal(cut.keys[0, 1], original.keys[0, 1, KEPT[1]])
    assert cut.allocated_bytes == 11 * cut.token_bytes
    fork.keys.zero_()
    assert original.keys.abs().min() > 0


def test_forking_a_cache_copies_layers_of_any_kind():
    cache = DynamicCache()
    cache.layers = [prefilled(10), DynamicSlidingWindowLayer(sliding_window=4)]
    cache.layers[1].update(*states(10))
    twin = fork_cache(cache, room=3)
    twin.layers[0].update(*states(1))
    twin.layers[1].update(*states(1))
    assert [layer.get_seq_length() for layer in cache.layers] == [10, 10]
    assert [layer.get_seq_length() for layer in twin.layers] == [11, 11]


def test_new_tokens_can_be_taken_back_but_not_the_prompt():
    layer = prefilled(10, KEPT, room=4)
    layer.update(*states(3))
    layer.crop(-2)
    assert (layer.seen, layer.held, layer.keys.shape[2]) == (11, 5, 5)
    with pytest.raises(UnsupportedError):
        layer.crop(-2)


def test_reset_forgets_and_frees():
    layer = prefilled(10)
    layer.reset()
    assert (layer.seen, layer.held, layer.keys, layer.allocated_bytes) == (0, 0, None, 0)
    layer.update(*states(3))
    assert layer.get_seq_length() == 3


@pytest.mark.parametrize(
    "use",
    [
        lambda layer: layer.reorder_cache(torch.tensor([0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([0])),
        lambda layer: layer.update(*(t.repeat(2, 1, 1, 1) for t in states(1))),
    ],
)
def test_more_than_one_sequence_is_refused(use):
    with pytest.raises(UnsupportedError):
        use(prefilled())


def test_a_prompt_in_two_pieces_is_refused():
    layer = PrunableLayer()
    layer.update(*states(3))
    with pytest.raises(UnsupportedError):
        layer.update(*states(3))


def test_gradients_do_not_reach_the_cache():
    layer = PrunableLayer()
    keys, values = states(5)
    returned, _ = layer.update(keys.requires_grad_(), values)
    assert returned is keys
    layer.hold(None, 2)
    layer.update(keys[:, :, :1], values[:, :, :1])
    assert not layer.keys.requires_grad
