import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from plphp_cli import results
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import PLPHPError
from plphp_cli.results import (
    ArmRecord,
    BoundRecord,
    GenerationRecord,
    ImageRecord,
    LayerRecord,
    MemoryByArm,
    MemoryRecord,
    RatioRecord,
    RecordError,
    RunRecord,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
BYTES = st.integers(min_value=0, max_value=2**53)


def maybe(strategy):
    return st.none() | strategy


LAYERS = st.builds(
    LayerRecord,
    index=st.integers(0, 100),
    gamma=maybe(FINITE),
    group=maybe(st.text()),
    rate=maybe(FINITE),
    vision_tokens_kept=maybe(BYTES),
    kv_bytes_held=maybe(BYTES),
    kv_bytes_held_per_head=maybe(BYTES),
    kv_bytes_full=maybe(BYTES),
    kv_bytes_allocated=maybe(BYTES),
    kv_heads=maybe(BYTES),
    clamped=st.booleans(),
)
ARMS = st.builds(
    ArmRecord,
    text=st.text(),
    new_tokens=BYTES,
    stop_reason=maybe(st.text()),
    prefill_s=maybe(FINITE),
    decode_tokens_per_s=maybe(FINITE),
    kv_bytes_held=maybe(BYTES),
    token_ids=st.lists(BYTES, max_size=3).map(tuple),
)
IMAGES = st.builds(
    ImageRecord,
    path=st.text(),
    sha256=st.text(),
    width=BYTES,
    height=BYTES,
    original_width=BYTES,
    original_height=BYTES,
    notes=st.lists(st.text(), max_size=2).map(tuple),
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
CONFIGS = st.builds(
    PLPHPConfig,
    r=st.floats(0, 1),
    alpha=st.floats(0.5, 1),
    beta=st.floats(0, 0.5),
    skip_layers=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    calibrated=st.booleans(),
    calibrated_on=maybe(st.text()),
)
RUNS = st.builds(
    RunRecord,
    model=st.text(),
    config=CONFIGS,
    prompt=st.text(),
    system=maybe(st.text()),
    generation=st.builds(GenerationRecord, max_new_tokens=BYTES, temperature=maybe(FINITE)),
    prompt_tokens=maybe(BYTES),
    vision_tokens=maybe(BYTES),
    images=st.lists(IMAGES, max_size=2).map(tuple),
    pruned=ARMS,
    unpruned=maybe(ARMS),
    layers=st.lists(LAYERS, max_size=2).map(tuple),
    memory=st.builds(MemoryByArm, pruned=maybe(st.builds(MemoryRecord, rss_bytes=maybe(BYTES)))),
    environment=st.dictionaries(st.text(), JSON_VALUES, max_size=3),
    ratios=st.dictionaries(
        st.text(), st.builds(RatioRecord, maybe(FINITE), st.text(), st.text()), max_size=2
    ),
    bound=maybe(st.builds(BoundRecord, BYTES, BYTES, BYTES, FINITE, FINITE)),
    notes=st.lists(st.text(), max_size=2).map(tuple),
    interrupted=st.booleans(),
)


def a_run(**changes):
    layer = LayerRecord(0, 0.3, "attentive", 0.7, 7, 700, 350, 1000, 900, 2)
    record = RunRecord(
        model="builtin",
        config=PLPHPConfig(),
        prompt="What?",
        system=None,
        generation=GenerationRecord(max_new_tokens=128),
        prompt_tokens=20,
        vision_tokens=10,
        images=(ImageRecord("a.png", "0" * 64, 4, 3, 8, 6),),
        pruned=ArmRecord(text="a <b> [bold]", new_tokens=3),
        unpruned=None,
        layers=(layer,),
    )
    return dataclasses.replace(record, **changes)


@settings(max_examples=60, deadline=None)
@given(RUNS)
def test_json_round_trip(record):
    assert results.from_json(results.to_json(record)) == record


def test_the_json_has_the_documented_keys():
    data = json.loads(results.to_json(a_run(unpruned=ArmRecord("x", 1))))
    assert next(iter(data)) == "schema_version"
    arm = {"text", "new_tokens", "ttft_s", "decode_tokens_per_s", "kv_bytes_held", "kv_bytes_allocated"}
    layer = {"index", "gamma", "group", "rate", "vision_tokens_kept", "kv_bytes_held"}
    assert {
        *(
            "schema_version",
            "model",
            "config",
            "prompt_tokens",
            "vision_tokens",
            "images",
            "pruned",
            "unpruned",
        ),
        *("layers", "memory", "environment", "interrupted", "prompt", "system", "generation", "ratios"),
        *("bound", "notes"),
    } <= data.keys()
    assert {"r", "delta_r", "alpha", "beta", "scope", "head_reduce", "calibrated"} <= data["config"].keys()
    assert {*arm, "prefill_s", "preprocess_s", "stop_reason", "decode_steps"} <= data["pruned"].keys()
    assert data["pruned"].keys() == data["unpruned"].keys()
    assert {*layer, "kv_bytes_held_per_head", "kv_bytes_full"} <= data["layers"][0].keys()
    assert json.loads(results.to_json(a_run()))["unpruned"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_refused_by_name(value):
    record = a_run(environment={"load": [1.0, value]})
    with pytest.raises(PLPHPError, match=r"environment\.load\[1\]"):
        results.to_json(record)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_that_is_not_strict_is_refused(number):
    text = results.to_json(a_run()).replace('"prompt_tokens": 20', f'"prompt_tokens": {number}')
    assert number in text
    with pytest.raises(RecordError):
        results.from_json(text)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: data.pop("model"), "model"),
        (lambda data: data.update(surprise=1), "surprise"),
        (lambda data: data.update(model=3), "model"),
        (lambda data: data.update(interrupted=0), "interrupted"),
        (lambda data: data.update(prompt_tokens=True), "prompt_tokens"),
        (lambda data: data["layers"][0].update(gamma="high"), r"layers\[0\]\.gamma"),
        (lambda data: data.update(schema_version=99), "99"),
    ],
)
def test_a_record_that_does_not_fit_is_an_error_that_names_the_place(change, named):
    data = json.loads(results.to_json(a_run()))
    change(data)
    with pytest.raises(RecordError, match=named):
        results.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_text_that_is_no_record_is_an_error(text):
    with pytest.raises(RecordError):
        results.from_json(text)


def test_decode_rate_counts_steps_after_the_first_token():
    assert results.decode_rate([5.0 + 0.5 * step for step in range(17)]) == pytest.approx(2.0)


@given(st.integers(0, 40))
def test_decode_rate_is_unknown_when_too_short(tokens):
    rate = results.decode_rate([0.25 * step for step in range(tokens)])
    assert (rate is None) == (tokens - 1 < 16)


def test_an_arm_from_a_stream():
    layers = [LayerRecord(i, None, None, 1.0, 4, 100 + i, 50, 200, 120, 2) for i in range(2)]
    elapsed = [1.0 + 0.1 * step for step in range(21)]
    arm = ArmRecord.from_stream(
        text="t",
        token_ids=range(21),
        elapsed_s=elapsed,
        preprocess_s=0.25,
        prefill_s=0.9,
        stop_reason="length",
        layers=layers,
    )
    assert (arm.ttft_s, arm.new_tokens, arm.decode_steps) == (1.25, 21, 20)
    assert arm.decode_tokens_per_s == pytest.approx(10.0)
    assert (arm.kv_bytes_held, arm.kv_bytes_full, arm.kv_bytes_allocated) == (201, 400, 240)


def test_an_arm_broken_off_in_prefill_knows_nothing():
    arm = ArmRecord.from_stream(
        text="", token_ids=(), elapsed_s=(), preprocess_s=0.1, prefill_s=None, stop_reason="interrupted"
    )
    assert (arm.ttft_s, arm.kv_bytes_held, arm.decode_tokens_per_s, arm.decode_s) == (None,) * 4
    assert arm.new_tokens == arm.decode_steps == 0


def test_a_layer_record_from_a_state():
    state = SimpleNamespace(
        index=3, gamma=math.nan, group=None, rate=None, vision_tokens=5, held_bytes=640, full_bytes=1280
    )
    state.allocated_bytes, state.kv_heads, state.clamped = 700, 4, True
    layer = LayerRecord.from_state(state)
    assert layer.gamma is None
    assert (layer.kv_bytes_held_per_head, layer.clamped) == (160, True)


def test_the_record_of_a_real_run_adds_up_and_round_trips(tmp_path):
    from toy_model import save_toy_llava

    from plphp_cli import models
    from plphp_cli.environment import environment
    from plphp_cli.generate import stream
    from plphp_cli.images import load_image
    from plphp_cli.memory import MemorySampler
    from plphp_cli.sampling import Settings

    Image.new("RGB", (9, 5), "red").save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    loaded = models.load(str(save_toy_llava(tmp_path / "toy")), device="cpu")
    prompt = models.prepare(loaded, [image], "what?")
    config = PLPHPConfig()
    with MemorySampler(loaded.device) as sampler:
        settings = Settings(max_new_tokens=20, stop_at_eos=False)
        prefill, *tokens, done = stream(loaded, prompt, config, settings)
    layers = tuple(LayerRecord.from_state(state) for state in prefill.layers)
    arm = ArmRecord.from_stream(
        text=done.text,
        token_ids=done.token_ids,
        elapsed_s=[token.elapsed_s for token in tokens],
        preprocess_s=prompt.preprocess_s,
        prefill_s=prefill.prefill_s,
        stop_reason=done.stop_reason,
        layers=layers,
    )
    record = a_run(
        pruned=arm,
        layers=layers,
        images=(ImageRecord.from_image(image),),
        memory=MemoryByArm(pruned=sampler.record()),
        environment=environment(loaded=loaded, config=config, images=[image], prompt="what?"),
        bound=results.decode_bound(models.decoder_weight_bytes(loaded), arm.kv_bytes_held, arm.kv_bytes_full),
    )
    assert results.from_json(results.to_json(record)) == record
    assert arm.ttft_s >= arm.prefill_s
    assert arm.decode_tokens_per_s > 0
    # 3 layers, 2 KV heads of 8 float32 keys and values.
    assert arm.kv_bytes_full == 3 * 2 * 8 * 4 * 2 * prompt.prompt_tokens
    assert arm.kv_bytes_held < arm.kv_bytes_full
    assert [layer.kv_bytes_held_per_head * layer.kv_heads for layer in layers] == [
        layer.kv_bytes_held for layer in layers
    ]


def test_ratios_name_both_arms_and_favour_pruning_above_one():
    fast = ArmRecord("", 20, ttft_s=1.0, decode_tokens_per_s=20.0, kv_bytes_held=40)
    slow = ArmRecord("", 20, ttft_s=2.0, decode_tokens_per_s=10.0, kv_bytes_held=100)
    ratios = results.run_ratios(fast, slow)
    assert {name: ratio.value for name, ratio in ratios.items()} == {"decode": 2.0, "ttft": 2.0, "kv": 0.4}
    assert ratios["ttft"].numerator == "unpruned.ttft_s"
    assert ratios["kv"].denominator == "unpruned.kv_bytes_held"
    assert results.run_ratios(fast, None) == {}
    assert results.run_ratios(ArmRecord("", 0), slow)["decode"].value is None


def test_the_bound_is_the_ratio_of_bytes_read():
    bound = results.decode_bound(weight_bytes=9000, kv_bytes_pruned=500, kv_bytes_unpruned=1000)
    assert bound.ideal_decode_ratio == pytest.approx(10000 / 9500)
    assert bound.kv_share_unpruned == pytest.approx(0.1)
    assert results.decode_bound(0, 0, 0) is None


def test_the_bound_gives_the_method_s_table():
    # Vicuna-7B in bfloat16: 512 KiB a token, 22 % of a step at 7.3k tokens, 1.12x from halving.
    cache = 7300 * 512 * 1024
    weights = round(cache / 0.22 - cache)
    assert results.decode_bound(weights, cache // 2, cache).ideal_decode_ratio == pytest.approx(
        1.12, abs=0.005
    )


@given(st.integers(1, 10**12), st.integers(0, 10**12), st.floats(0, 1), st.floats(0, 1e9))
def test_the_bound_lies_between_one_and_the_byte_ratio(weights, cache, kept, new):
    bound = results.decode_bound(weights, int(cache * kept), cache, new)
    assert 1 <= bound.ideal_decode_ratio <= (cache + 1) / (int(cache * kept) + 1) * (1 + 1e-9)
