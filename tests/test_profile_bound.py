import dataclasses

import pytest

from plphp_cli.profiling.bound import Limits, Load, Measured, bound, cache_bytes, step_time
from plphp_cli.profiling.records import FASTER, NO_DIFFERENCE, PRUNED, STOCK, UNPRUNED, RatioProfile

GIB, KIB = 1 << 30, 1 << 10


def load_of(**changes):
    """Weights of 8 MB, a prompt of 1000 tokens of 1 kB, of which 400 are held when pruned."""
    values = {
        "weight_bytes": 8_000_000,
        "weight_operations": 4e6,
        "model_bytes": 10_000_000,
        "kv_bytes_held": {PRUNED: 400_000, UNPRUNED: 1_000_000},
        "kv_bytes_allocated": {PRUNED: 500_000, UNPRUNED: 1_100_000},
        "kv_bytes_full": 1_000_000.0,
        "token_bytes": 1000.0,
        "operations_per_kv_byte": 1.0,
        "prompt_tokens": 1000.0,
        "vision_tokens": 900.0,
        "images": 3.0,
        "new_tokens": 100,
    }
    return Load(**{**values, **changes})


def measured(pruned=None, unpruned=None, decode=None, prune_s=None):
    return Measured({PRUNED: pruned, UNPRUNED: unpruned}, decode, prune_s)


def ratio(value, verdict=FASTER, low=None):
    return RatioProfile(value, low or value, value, "", "", verdict=verdict)


def test_a_step_reads_weights_and_cache_and_the_answers_half():
    assert cache_bytes(load_of(), PRUNED) == 450_000
    assert cache_bytes(load_of(), UNPRUNED) == 1_050_000
    assert cache_bytes(load_of(kv_bytes_held={PRUNED: 1, STOCK: 1_000_000}), STOCK) == 3 * 1_050_000
    found = bound(load_of(), Limits(), measured())
    assert found.ideal_decode_ratio == found.ideal_decode_ratio_by_bytes == pytest.approx(9.05 / 8.45)
    assert found.kv_share_of_step[UNPRUNED] == pytest.approx(1.05 / 9.05)
    assert found.attained == {PRUNED: None, UNPRUNED: None, STOCK: None}


def test_a_part_takes_the_longer_of_reading_and_computing():
    load = load_of()
    assert step_time(load, Limits(1e9), 1e6) == pytest.approx(0.009)
    assert step_time(load, Limits(1e9, 1e8), 1e6) == pytest.approx(0.04 + 0.01)
    assert step_time(load, Limits(1e9, 2e8), 1e6, batch=4) == pytest.approx(0.08 + 0.02)


def test_attained_is_the_least_time_over_the_measured_one():
    found = bound(load_of(), Limits(1e9), measured(pruned=0.0845, unpruned=0.01810))
    assert found.attained[PRUNED] == pytest.approx(0.1)
    assert found.attained[UNPRUNED] == pytest.approx(0.5)


def test_a_measurement_that_beats_the_bound_names_the_assumption():
    fast = measured(0.001, 0.002, ratio(2.0))
    assert bound(load_of(), Limits(1e9), fast).beaten_by == 2.0
    said = {
        "fit in the last-level cache": Limits(1e9, cache_bytes=1 << 30),
        "reads faster": Limits(1e9),
        "bound by arithmetic": Limits(1e8, cpu=True),
    }
    slow = measured(1.0, 2.0, ratio(2.0))
    for words, limits in said.items():
        times = slow if limits.cpu else fast
        assert words in bound(load_of(), limits, times).failed_assumption
    for harmless in (ratio(2.0, NO_DIFFERENCE), ratio(1.05), ratio(2.0, low=1.0)):
        assert bound(load_of(), Limits(1e9), measured(1.0, 2.0, harmless)).failed_assumption is None


def test_pruning_is_repaid_when_the_saved_time_covers_it():
    found = bound(load_of(), Limits(), measured(0.010, 0.011, ratio(1.1), prune_s=0.0205))
    assert found.repaid_after_tokens == 1 + 21
    for never in (
        measured(0.010, 0.011, ratio(1.1, NO_DIFFERENCE), 0.02),
        measured(0.011, 0.010, None, 0.02),
    ):
        assert bound(load_of(), Limits(), never).repaid_after_tokens is None


def test_capacity_counts_what_fits_beside_the_weights():
    found = bound(load_of(), Limits(memory_bytes=20_000_000), measured()).capacity
    assert found[PRUNED].prompts == 20
    assert found[UNPRUNED].prompts == 9
    # 200 tokens of text and answer, and a third of the rest for each image.
    assert found[UNPRUNED].images == int((10_000_000 - 200_000) / 300_000)
    assert (
        bound(load_of(images=0.0), Limits(memory_bytes=20_000_000), measured()).capacity[PRUNED].images
        is None
    )
    assert bound(load_of(), Limits(), measured()).capacity[PRUNED].prompts is None
    small = bound(load_of(), Limits(memory_bytes=5_000_000), measured()).capacity
    assert small[PRUNED].prompts == 0


def test_capacity_leaves_room_for_a_prefill_which_grows_with_the_prompt():
    limits = Limits(memory_bytes=20_000_000)
    held = {"kv_bytes_allocated": {PRUNED: 500_000, UNPRUNED: 1_100_000, STOCK: 1_000_000}}
    load = load_of(**held, transient_bytes={PRUNED: 1_000_000, UNPRUNED: 2_000_000})
    found = bound(load, limits, measured()).capacity
    assert found[PRUNED].prompts == 9_000_000 // 500_000
    assert found[UNPRUNED].prompts == 8_000_000 // 1_100_000
    # Stock has no room to spare, but its cache grows by 100 tokens all the same.
    assert found[STOCK].prompts == 10_000_000 // 1_100_000
    # 2 kB of prefill a token: beside 300 kB of cache, 600 kB for the 300 tokens of an image.
    assert found[UNPRUNED].images == int((10_000_000 - 200_000 - 200_000) / 900_000)
    assert found[UNPRUNED].images_limit == "memory"
    short = bound(dataclasses.replace(load, context_tokens=1500), limits, measured()).capacity[UNPRUNED]
    assert (short.images, short.images_limit) == ((1500 - 100 - 100) // 300, "context window")


def test_stock_moves_its_cache_thrice_and_computes_with_it_once():
    load = load_of(kv_bytes_held={PRUNED: 400_000, UNPRUNED: 1_000_000, STOCK: 1_000_000})
    found = bound(load, Limits(1e9, 1e8), measured())
    assert found.operations_per_step[STOCK] == found.operations_per_step[UNPRUNED] == 4e6 + 1_050_000
    assert found.ideal_step_s[STOCK] == found.ideal_step_s[UNPRUNED] == pytest.approx(0.04 + 0.0105)
    reading = bound(load, Limits(1e9), measured()).ideal_step_s
    assert reading[STOCK] - reading[UNPRUNED] == pytest.approx(2 * 0.00105)


def test_the_table_finds_the_context_from_which_a_gain_is_passed():
    rows = {row.batch: row for row in bound(load_of(), Limits(), measured()).table}
    for gain, tokens in rows[1].reached_at_tokens.items():
        gained = (8000 + tokens) / (8000 + 0.4 * tokens)
        before = (8000 + tokens - 1) / (8000 + 0.4 * (tokens - 1))
        assert before < float(gain) <= gained
    assert rows[4].reached_at_tokens["1.1"] == -(-rows[1].reached_at_tokens["1.1"] // 4)
    uncut = load_of(kv_bytes_held={PRUNED: 1_000_000, UNPRUNED: 1_000_000})
    found = bound(uncut, Limits(), measured())
    assert set(found.table[0].reached_at_tokens.values()) == {None}
    assert found.speed_up_expected.startswith("No speed-up")


def test_expectation_says_what_an_ideal_loop_and_a_real_step_allow():
    many = load_of(kv_bytes_held={PRUNED: 10_000_000, UNPRUNED: 40_000_000}, kv_bytes_full=4e7)
    assert "at most is to be expected" in bound(many, Limits(1e9), measured()).speed_up_expected
    assert "A speed-up is to be expected" in bound(many, Limits(1e9), measured(0.03, 0.06)).speed_up_expected
    one = dataclasses.replace(many, new_tokens=1)
    assert "nothing is decoded" in bound(one, Limits(1e9), measured()).speed_up_expected
    # The pruned arm alone tells the same: 30 ms less of reading beside 9.97 s.
    alone = bound(many, Limits(1e9), measured(pruned=9.97))
    assert alone.speed_up_expected.startswith("Hardly any")
    assert alone.expected_decode_ratio == pytest.approx(10 / 9.97)
    slow = bound(many, Limits(1e9), measured(9.9, 10.0))
    assert slow.speed_up_expected.startswith("Hardly any")
    assert slow.expected_decode_ratio == pytest.approx(10 / (10 - 0.03))


def test_what_an_arm_that_did_not_run_reads_is_not_known():
    alone = dataclasses.replace(load_of(), kv_bytes_held={PRUNED: 400_000})
    found = bound(alone, Limits(), measured())
    assert found.kv_bytes_per_step[STOCK] is None
    assert found.kv_bytes_per_step[UNPRUNED] == 1_050_000
