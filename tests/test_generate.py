from types import SimpleNamespace

import laws
import pytest
import torch
from families import as_prompt
from laws import CUT, answer, snapshot
from toy_model import toy_tokenizer

from plphp_cli.answer_text import AnswerText
from plphp_cli.attention import prune
from plphp_cli.decoding import Done, Token, decode
from plphp_cli.errors import UnsupportedError, UsageError
from plphp_cli.generate import PrefillDone, decode_after, own_place, stream
from plphp_cli.prefilling import advance, prefill
from plphp_cli.quality import along
from plphp_cli.sampling import Settings


def tokens_of(loaded, prompt, policy, **settings):
    return list(stream(loaded, prompt, policy, Settings(**settings)))[-1].token_ids


def test_greedy_tokens_are_those_of_generate(specimen):
    for inputs in specimen.prompts:
        for policy in (None, *laws.settings_of(specimen).values()):
            with prune(specimen.model, policy):
                expected, _ = answer(specimen.model, inputs)
            tokens = tokens_of(
                specimen.loaded, as_prompt(inputs), policy, max_new_tokens=laws.NEW_TOKENS, stop_at_eos=False
            )
            assert list(tokens) == expected.tolist()


def test_logits_are_those_of_generate(specimen):
    inputs = specimen.prompts[0]
    with prune(specimen.model, CUT) as pruner:
        tokens, logits = answer(specimen.model, inputs)
        run = prefill(specimen.loaded, as_prompt(inputs), pruner)
        rows = [run.logits] + [advance(specimen.loaded, run, token[None, None])[-1] for token in tokens[:-1]]
    assert torch.equal(torch.stack(rows), logits)


def test_events_come_in_order_and_tell_what_they_promise(llava):
    prompt = as_prompt(llava.prompts[0])
    first, *tokens, last = stream(llava.loaded, prompt, CUT, Settings(max_new_tokens=5))
    assert isinstance(first, PrefillDone)
    assert (first.prompt_tokens, first.vision_tokens) == (47, 32)
    assert [layer.index for layer in first.layers] == [0, 1, 2, 3]
    assert all(isinstance(token, Token) for token in tokens)
    assert [token.index for token in tokens] == [0, 1, 2, 3, 4]
    assert isinstance(last, Done)
    assert last.token_ids == tuple(token.token_id for token in tokens)
    assert last.stop_reason == "length"
    assert 0 < first.prefill_s < tokens[0].elapsed_s < tokens[-1].elapsed_s


@pytest.mark.parametrize("taken_back", [True, False])
def test_an_answer_goes_on_from_where_a_chunk_leaves_another(family, taken_back):
    """As if it were decoded anew, whether the cache gives tokens back or they are fed to another."""
    left = 0
    for prompt in map(as_prompt, family.prompts):
        ids = tokens_of(family.loaded, prompt, None, max_new_tokens=laws.NEW_TOKENS)
        for policy in laws.settings_of(family).values():
            expected = tokens_of(family.loaded, prompt, policy, max_new_tokens=laws.NEW_TOKENS)
            with prune(family.model, policy) as pruner:
                run = prefill(family.loaded, prompt, pruner, len(ids))
                logits = along(family.loaded, run, ids)
                place = own_place(family.loaded, run, ids, logits)
                if place is None:
                    assert expected == ids
                    continue
                left += 1
                assert expected[:place] == ids[:place]
                if not taken_back or not run.take_back(len(ids) - 1 - place):
                    run = prefill(family.loaded, prompt, pruner, len(ids))
                    advance(family.loaded, run, torch.tensor([ids[:place]]))
                done = decode_after(family.loaded, run, ids[:place], logits[place], laws.NEW_TOKENS)
            assert done.token_ids == expected
    assert left > 0


def test_it_stops_at_the_end_of_sequence_unless_told_not_to(llava):
    family = llava.fresh()
    prompt = as_prompt(family.prompts[0])
    whole = tokens_of(family.loaded, prompt, CUT, max_new_tokens=8)
    stop = next(i for i in range(2, 8) if whole[i] not in whole[:i])
    family.model.generation_config.eos_token_id = [whole[stop], 2]
    *_, token, done = stream(family.loaded, prompt, CUT, Settings(max_new_tokens=8))
    assert (done.token_ids, done.stop_reason) == (whole[: stop + 1], "eos")
    assert token.token_id == whole[stop]
    longer = tokens_of(family.loaded, prompt, CUT, max_new_tokens=8, stop_at_eos=False)
    assert len(longer) == 8
    assert longer[:stop] == whole[:stop]
    assert whole[stop] not in longer


def test_sampling_depends_on_its_seed_alone(llava):
    prompt = as_prompt(llava.prompts[0])
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(samples))
        state = torch.get_rng_state()
        samples.append(tokens_of(llava.loaded, prompt, CUT, max_new_tokens=8, temperature=2.0, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
    assert samples[0] == samples[1] != samples[2]


def test_sampling_is_that_of_transformers(llava):
    inputs, options = llava.prompts[0], {"temperature": 1.3, "top_p": 0.9}
    torch.manual_seed(5)
    expected = llava.model.generate(**inputs, max_new_tokens=8, do_sample=True, **options)[0, 47:]
    tokens = tokens_of(llava.loaded, as_prompt(inputs), None, max_new_tokens=8, seed=5, **options)
    assert list(tokens) == expected.tolist()


def test_temperature_zero_and_a_tiny_nucleus_are_greedy(llava):
    prompt = as_prompt(llava.prompts[0])
    greedy = tokens_of(llava.loaded, prompt, CUT, max_new_tokens=8)
    assert tokens_of(llava.loaded, prompt, CUT, max_new_tokens=8, temperature=0) == greedy
    assert tokens_of(llava.loaded, prompt, CUT, max_new_tokens=8, top_p=1e-6) == greedy


def test_logits_processors_of_the_generation_config_are_used(llava):
    family = llava.fresh()
    # Certain to change the answer, whatever the toy's weights: its first token may not come.
    likeliest = tokens_of(llava.loaded, as_prompt(llava.prompts[0]), CUT, max_new_tokens=1)
    family.model.generation_config.suppress_tokens = list(likeliest)
    with prune(family.model, CUT):
        expected = family.model.generate(**family.prompts[0], max_new_tokens=16, do_sample=False)[0, 47:]
    tokens = tokens_of(family.loaded, as_prompt(family.prompts[0]), CUT, max_new_tokens=16)
    assert list(tokens) == expected.tolist()


@pytest.mark.parametrize("events", [1, 2, 4])
def test_closing_early_restores_the_model(llava, events):
    before = snapshot(llava.model)
    run = stream(llava.loaded, as_prompt(llava.prompts[0]), CUT, Settings(max_new_tokens=8))
    for _ in range(events):
        next(run)
    assert snapshot(llava.model) != before
    run.close()
    assert snapshot(llava.model) == before
    assert torch.is_grad_enabled()


def test_an_error_restores_the_model(llava):
    before = snapshot(llava.model)
    with pytest.raises(RuntimeError, match="broken"):
        list(
            stream(
                llava.loaded, as_prompt(llava.prompts[0]), laws._Broken(RuntimeError("broken")), Settings()
            )
        )
    assert snapshot(llava.model) == before


def test_one_prefill_is_decoded_many_times(llava):
    prompt = as_prompt(llava.prompts[0])
    expected = tokens_of(llava.loaded, prompt, CUT, max_new_tokens=6)
    with prune(llava.model, CUT) as pruner:
        run = prefill(llava.loaded, prompt, pruner)
        for _ in range(3):
            *_, done = decode(llava.loaded, run.fork(6), Settings(max_new_tokens=6))
            assert done.token_ids == expected


def test_a_cut_cache_cannot_be_cut_anew(llava):
    with prune(llava.model, CUT, keep_attention=True) as pruner:
        run = prefill(llava.loaded, as_prompt(llava.prompts[0]), pruner)
        with pytest.raises(UnsupportedError, match="not whole"):
            run.cut(CUT)
    with prune(llava.model, None) as pruner:
        run = prefill(llava.loaded, as_prompt(llava.prompts[0]), pruner)
        with pytest.raises(UnsupportedError, match="not kept"):
            run.cut(CUT)


def test_time_that_the_consumer_takes_does_not_count(llava):
    now = [0.0]

    def clock():
        now[0] += 1.0
        return now[0]

    def elapsed(pause):
        times = []
        for event in stream(
            llava.loaded, as_prompt(llava.prompts[0]), None, Settings(max_new_tokens=4), clock=clock
        ):
            times.append(getattr(event, "prefill_s", None) or getattr(event, "elapsed_s", None))
            now[0] += pause
        return times[:-1]

    assert elapsed(0) == elapsed(1000)


@pytest.mark.parametrize(
    "text",
    [
        "the circle is red.",
        "  two  spaces\nand a line",
        "naïve café 漢字 🙂👍🏽 ñ",
        "the <|user|> is </s>special",
    ],
)
def test_pieces_of_text_join_to_the_whole(text):
    tokenizer = toy_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = AnswerText(SimpleNamespace(tokenizer=tokenizer))
    joined = [pieces.add(token, flush=i + 1 == len(ids)) for i, token in enumerate(ids)]
    assert "".join(joined) == pieces.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in joined)
    assert any(joined[:-1])


def test_an_incomplete_character_waits_and_is_shown_at_the_end():
    tokenizer = toy_tokenizer()
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(ids) == 4
    pieces = AnswerText(tokenizer)
    assert [pieces.add(token) for token in ids] == ["", "", "", "🙂"]
    pieces = AnswerText(tokenizer)
    assert [pieces.add(ids[0]), pieces.add(ids[1], flush=True)] == ["", "\ufffd"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"max_new_tokens": -3}, "max_new_tokens = -3"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, named):
    with pytest.raises(UsageError, match=named):
        Settings(**settings)


def test_a_padded_prompt_is_refused(llava):
    inputs = llava.prompts[0]
    padded = {
        **inputs,
        "attention_mask": torch.ones_like(inputs["input_ids"]).index_fill(1, torch.tensor([0]), 0),
    }
    with pytest.raises(UnsupportedError, match="padded"):
        list(stream(llava.loaded, as_prompt(padded), CUT, Settings()))
    whole = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    expected = tokens_of(llava.loaded, as_prompt(inputs), CUT, max_new_tokens=4)
    assert tokens_of(llava.loaded, as_prompt(whole), CUT, max_new_tokens=4) == expected
