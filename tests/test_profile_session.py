"""The harness against known quantities: a model whose costs are known on a clock of its own."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from families import as_prompt, load
from PIL import Image
from toy_model import save_toy_llava

from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import PLPHPError
from plphp_cli.images import load_image
from plphp_cli.profiling import session as session_module
from plphp_cli.profiling.fresh import FreshJob, FreshPeaks, FreshPrompt, measure_fresh
from plphp_cli.profiling.layers import check_bytes, head_overlap, image_shares
from plphp_cli.profiling.machine import Machine, buffer_bytes, read_bandwidth
from plphp_cli.profiling.peaks import LiveBytes, measure_peaks
from plphp_cli.profiling.records import FASTER, NO_DIFFERENCE, PRUNED, SLOWER, STOCK, UNPRUNED, from_json
from plphp_cli.profiling.session import ProfileSession
from plphp_cli.profiling.state import ProfileRequest, Question
from plphp_cli.profiling.statistics import MIN_PAIRS
from plphp_cli.serialize import to_json

ALL = (PRUNED, UNPRUNED, STOCK)
CPU = torch.device("cpu")
TOKENS = 20


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_toy_llava(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    Image.radial_gradient("L").save(folder / "ring.png")
    return tuple(load_image(str(folder / name)) for name in ("red.png", "ring.png"))


@pytest.fixture
def quick(monkeypatch):
    """Without fresh processes and bandwidth, which have tests of their own."""
    monkeypatch.setattr(
        session_module, "measure_machine", lambda device, dtype: Machine(1e9, 1e9, None, 1 << 30)
    )
    monkeypatch.setattr(session_module, "measure_fresh", lambda job: [FreshPeaks(1, 2, 3)] * len(job.prompts))


def request(toy, images, **changes):
    base = ProfileRequest(
        questions=(Question(images, "what changed?", answer="the circle is red."),),
        config=PLPHPConfig(),
        arms=ALL,
        model=toy,
        device="cpu",
        repeats=MIN_PAIRS,
        max_new_tokens=TOKENS,
        command=("plphp", "profile"),
    )
    return dataclasses.replace(base, **changes)


def profiled(asked, clock=None, before=None):
    session = ProfileSession(asked, clock=clock)
    session.load()
    if before is not None:
        before(session)
    session.run()
    return session.record()


class Costs:
    """A clock that moves only when the model runs, by what prefill and a step cost."""

    def __init__(self, prefill=0.0, step=0.0, unpruned_step=None):
        self.now = 0.0
        self._prefill, self._step, self._unpruned = prefill, step, unpruned_step

    def __call__(self):
        return self.now

    def install(self, session):
        decoder = session._loaded.model.get_decoder()
        decoder.register_forward_pre_hook(self._run, with_kwargs=True)

    def _run(self, decoder, args, kwargs):
        cache, embeds = kwargs["past_key_values"], kwargs["inputs_embeds"]
        if embeds.shape[1] > 1:
            self.now += self._prefill
            return
        layer = cache.layers[0]
        whole = getattr(layer, "held", None) in (None, layer.get_seq_length())
        self.now += self._step if self._unpruned is None or not whole else self._unpruned


def with_costs(asked, **costs):
    clock = Costs(**costs)
    return profiled(asked, clock, clock.install)


def test_known_costs_come_out_exactly(toy, images, quick):
    record = with_costs(request(toy, images), prefill=2.0, step=0.25)
    for name, arm in record.arms.items():
        assert arm.prefill_s == 2.0
        assert arm.ttft_s == 2.0 + arm.preprocess_s
        assert arm.tpot_s.p50 == arm.tpot_s.p99 == 0.25, name
        assert arm.decode_s == 0.25 * (TOKENS - 1)
        assert arm.decode_tokens_per_s == 4.0
        assert arm.new_tokens == TOKENS
        assert arm.end_to_end_s == pytest.approx(arm.ttft_s + arm.decode_s)
        assert len(arm.samples.prefill_s) == len(arm.samples.step_s) == MIN_PAIRS
    assert record.arms.pruned.prune_s == 0.0
    for name in ("decode", "ttft", "end_to_end", "loop_decode"):
        assert record.ratios[name].median == 1.0
        assert record.ratios[name].verdict == NO_DIFFERENCE


def test_a_doubled_decode_cost_yields_one_half(toy, images, quick):
    record = with_costs(request(toy, images, arms=(PRUNED, UNPRUNED)), step=0.5, unpruned_step=0.25)
    found = record.ratios["decode"]
    assert (found.median, found.low, found.high, found.verdict) == (0.5, 0.5, 0.5, SLOWER)
    assert found.control_low == found.control_high == 1.0
    assert record.ratios["ttft"].verdict == NO_DIFFERENCE
    assert record.arms.stock is None


def test_a_saving_names_when_pruning_is_repaid(toy, images, quick):
    record = with_costs(request(toy, images, arms=(PRUNED, UNPRUNED)), step=0.25, unpruned_step=0.5)
    assert record.ratios["decode"].median == 2.0
    assert record.ratios["decode"].verdict == FASTER
    assert record.bound.repaid_after_tokens == 1
    assert record.bound.attained[PRUNED] == record.bound.ideal_step_s[PRUNED] / 0.25


def test_the_record_has_every_key_and_round_trips(toy, images, quick):
    record = profiled(request(toy, images))
    text = to_json(record)
    assert from_json(text) == record
    found = json.loads(text)
    assert found["command"] == "profile"
    assert {"schema_version", "config", "layers", "environment"} <= found.keys()
    figures = {"prefill_s", "prune_s", "ttft_s", "decode_tokens_per_s", "tpot_s", "kv_bytes_held"}
    figures |= {"kv_bytes_allocated", "peak_bytes", "samples"}
    for arm in ALL:
        assert figures <= found["arms"][arm].keys()
        assert {"p50", "p90", "p99"} == found["arms"][arm]["tpot_s"].keys()
    for name in ("decode", "ttft", "end_to_end", "kv"):
        assert {"median", "low", "high"} <= found["ratios"][name].keys()
    bound = {"weight_bytes", "kv_bytes_per_step", "ideal_decode_ratio", "bandwidth_bytes_per_s", "attained"}
    assert bound <= found["bound"].keys()
    quality = {"kl_mean", "kl_p95", "kl_max", "top1_agreement", "first_divergence", "texts"}
    assert quality <= found["quality"].keys()
    assert found["environment"]["command"] == "plphp profile"
    assert found["environment"]["image_sha256"] == [image.sha256 for image in images]


def test_two_profiles_agree_to_the_last_digit_but_for_times(toy, images, quick):
    one, two = (profiled(request(toy, images, repeats=1)) for _ in range(2))
    assert one.quality == two.quality
    assert one.layers == two.layers
    assert one.quality.kl_mean > 0
    for (_, first), (_, second) in zip(one.arms.items(), two.arms.items(), strict=True):
        assert (first.kv_bytes_held, first.kv_bytes_allocated) == (
            second.kv_bytes_held,
            second.kv_bytes_allocated,
        )


def test_bytes_are_predicted_exactly_and_anything_else_is_an_error(toy, images, quick):
    for config in (PLPHPConfig(), PLPHPConfig(scope="image", r=0.3), PLPHPConfig(skip_layers=(1,))):
        record = profiled(request(toy, images, config=config, repeats=1))
        arm = record.arms.pruned
        assert (
            arm.kv_bytes_held
            == arm.kv_bytes_held_predicted
            == sum(layer.kv_bytes_held for layer in record.layers)
        )
        assert arm.kv_bytes_allocated == arm.kv_bytes_allocated_predicted > arm.kv_bytes_held
    layer = SimpleNamespace(
        index=0, held_bytes=96, allocated_bytes=120, prunable=True, full_bytes=100, rate=None
    )
    vision = SimpleNamespace(positions=torch.arange(3), spans=None)
    state = SimpleNamespace(layers=[layer], prompt_tokens=10, vision=vision)
    with pytest.raises(PLPHPError, match="layer 0 of the pruned arm holds 96"):
        check_bytes(state, 2, PLPHPConfig(), "pruned")


def test_with_everything_kept_nothing_differs(toy, images, quick):
    record = profiled(request(toy, images, config=PLPHPConfig(r=1.0, delta_r=0.0), repeats=1))
    assert record.quality.kl_max == 0.0
    assert record.quality.top1_agreement == 1.0
    assert record.quality.texts.pruned == record.quality.texts.unpruned
    assert record.ratios["kv"].median == 1.0
    assert "No speed-up" in record.bound.speed_up_expected


def test_one_new_token_has_no_decoding_and_no_quality(toy, images, quick):
    record = profiled(request(toy, images, max_new_tokens=1, repeats=1))
    assert record.arms.pruned.decode_s is None
    assert record.arms.pruned.ttft_s == record.arms.pruned.end_to_end_s
    assert record.ratios["decode"] is None
    assert record.quality.kl_mean is None
    assert record.quality.first_token_agrees


def test_short_decodes_are_not_rated(toy, images, quick):
    record = profiled(request(toy, images, max_new_tokens=16, repeats=1))
    assert (record.arms.pruned.decode_tokens_per_s, record.arms.pruned.tpot_s) == (None, None)
    assert record.ratios["decode"] is None
    assert len(record.arms.pruned.samples.step_s[0]) == 15


def test_a_prompt_without_images_prunes_nothing(toy, quick):
    asked = request(toy, (), questions=(Question((), "what colour?"),), repeats=1)
    record = profiled(asked)
    assert [layer.gamma for layer in record.layers] == [None] * 3
    assert record.ratios["kv"].median == 1.0
    assert record.bound.capacity[PRUNED].images is None
    assert from_json(to_json(record)) == record


@pytest.mark.parametrize("arm", [PRUNED, UNPRUNED])
def test_an_arm_without_memory_leaves_the_other(toy, images, quick, monkeypatch, arm):
    class Full(session_module.PathArm):
        def decode(self):
            if (self._policy is None) == (arm == UNPRUNED):
                raise torch.OutOfMemoryError("out of memory")
            return super().decode()

    monkeypatch.setattr(session_module, "PathArm", Full)
    record = profiled(request(toy, images, arms=(PRUNED, UNPRUNED), repeats=2))
    other = UNPRUNED if arm == PRUNED else PRUNED
    assert record.arms[arm].failed == "out of memory"
    assert record.arms[arm].decode_s is None
    assert record.arms[other].failed is None
    assert record.arms[other].decode_tokens_per_s is not None
    assert record.ratios["decode"] is None
    assert any("out of memory" in warning for warning in record.warnings)


def test_an_interrupted_profile_holds_what_was_measured(toy, images, quick):
    session = ProfileSession(request(toy, images))
    session.load()
    pieces = []

    def check():
        pieces.append(1)
        if session.started and len(session.states[0].prefills) == 4 and session.states[0].decodes:
            raise KeyboardInterrupt

    session._check = check
    with pytest.raises(KeyboardInterrupt):
        session.run()
    record = session.record(interrupted=True)
    assert record.interrupted
    assert record.ratios["ttft"].median > 0
    assert record.quality.kl_mean is not None
    assert from_json(to_json(record)) == record


def test_a_first_token_that_differs_is_a_fault_of_the_tool(toy, images, quick):
    session = ProfileSession(request(toy, images, repeats=1))
    session.load()
    session.run()
    assert session.record().faults == ()
    session.states[0].answers.first_tokens["pruned answer"] += 1
    record = session.record()
    assert "fault of the tool" in record.faults[0]
    assert record.quality.first_token_agrees is False


def test_several_prompts_give_totals_spread_and_the_worst(toy, images, quick):
    questions = tuple(
        Question(images[:count], text) for count, text in ((1, "what?"), (2, "where?"), (1, "why?"))
    )
    record = profiled(request(toy, images, questions=questions, arms=(PRUNED, UNPRUNED), repeats=2))
    held = [prompt.arms.pruned.kv_bytes_held for prompt in record.prompts]
    assert record.totals[PRUNED]["kv_bytes_held"] == sum(held)
    assert record.arms.pruned.kv_bytes_held == round(sum(held) / 3)
    means = {prompt.index: prompt.quality.kl_mean for prompt in record.prompts}
    assert record.worst["kl"] == tuple(sorted(means, key=lambda index: -means[index]))
    assert record.spread["kl_mean"].maximum == max(means.values())
    assert record.quality.kl_mean_over_prompts == pytest.approx(sum(means.values()) / 3)
    prefills = [
        sum(column) for column in zip(*(p.arms.pruned.samples.prefill_s for p in record.prompts), strict=True)
    ]
    assert record.arms.pruned.samples.prefill_s == pytest.approx(prefills)


def test_an_allocation_of_known_size_is_seen():
    with LiveBytes(CPU) as live:
        one = torch.empty(1 << 20, dtype=torch.uint8)
        assert live.live == 1 << 20
        view = one.view(2, -1)[0]
        two = one + 1
        assert live.live == 2 << 20
        del one, two
        assert live.live == 1 << 20  # the view holds its storage
        del view
        assert (live.live, live.peak) == (0, 2 << 20)


def test_peaks_hold_the_weights_and_the_cache():
    family = load("llava")
    loaded = SimpleNamespace(model=family.model, processor=None, device=CPU)
    prompt = as_prompt(family.prompts[0])
    weights = sum({t.data_ptr(): t.nbytes for t in family.model.parameters()}.values())
    peaks = {arm: measure_peaks(loaded, prompt, arm, config, TOKENS) for arm, config in
             ((PRUNED, PLPHPConfig(r=0.3)), (UNPRUNED, None), (STOCK, None))}  # fmt: skip
    for found in peaks.values():
        assert weights < found.decode_bytes < found.prefill_decoder_bytes <= found.prefill_bytes < 2 * weights
    assert peaks[PRUNED].decode_bytes < peaks[UNPRUNED].decode_bytes
    # Stock holds one cache, too: what it concatenates anew is a part of one layer at a time.
    text = family.model.config.get_text_config()
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    cache = token * (prompt.prompt_tokens + TOKENS)
    assert abs(peaks[STOCK].decode_bytes - peaks[UNPRUNED].decode_bytes) < cache / 2


def test_a_fresh_process_measures_each_prompt_and_says_why_it_cannot(toy, images):
    prompts = (FreshPrompt(tuple(image.path for image in images), "what?"), FreshPrompt((), "what?"))
    job = FreshJob(PRUNED, PLPHPConfig(), prompts, None, TOKENS, toy, "float32", "cpu", "sdpa")
    first, second = measure_fresh(job)
    assert first.failed is None
    assert first.peak_bytes == max(first.prefill_bytes, first.decode_bytes) > second.peak_bytes
    assert first.memory.rss_peak_bytes > first.peak_bytes
    lost = measure_fresh(dataclasses.replace(job, model=toy + "/nowhere"))
    assert [peaks.peak_bytes for peaks in lost] == [None, None]
    assert "nowhere" in lost[0].failed


def test_the_bandwidth_buffer_is_large_and_fits():
    assert buffer_bytes(CPU, None) == 1 << 30
    assert read_bandwidth(CPU, 1 << 24) > 1e6


def test_overlap_and_shares_are_of_what_heads_keep():
    kept = torch.tensor([[0, 1, 4], [1, 2, 5]])
    assert head_overlap(kept) == pytest.approx(1 / 5)
    assert head_overlap(kept[:1]) is None
    assert image_shares(kept, torch.arange(6), ((0, 4), (4, 6))) == [[0.5, 0.5], [0.5, 0.5]]
