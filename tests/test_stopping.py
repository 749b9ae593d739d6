"""Stop texts: ids end as those of transformers' own `generate`, the text ends with the stop text."""

import pytest
import torch

from plphp_cli import models
from plphp_cli.answer_text import AnswerText, until_stop
from plphp_cli.attention import prune
from plphp_cli.config import PLPHPConfig
from plphp_cli.decoding import Done, Token, decode_batch
from plphp_cli.errors import UsageError
from plphp_cli.generate import stream
from plphp_cli.prefilling import prefill
from plphp_cli.sampling import Settings

CUT = PLPHPConfig(r=0.3, delta_r=0.2, alpha=0.6, beta=0.3)


@pytest.fixture(scope="module")
def builtin():
    return models.load("builtin", device="cpu")


@pytest.fixture(scope="module")
def prompt(builtin, images):
    return models.prepare(builtin, images, "describe each image.")


def answer_of(loaded, prompt, *stop, **settings):
    *events, done = stream(loaded, prompt, CUT, Settings(24, stop=stop, **settings))
    assert isinstance(done, Done)
    assert "".join(event.text for event in events if isinstance(event, Token)) == done.text
    return done


def generated(loaded, prompt, *stop):
    with prune(loaded.model, CUT):
        output = loaded.model.generate(
            **prompt.inputs,
            max_new_tokens=24,
            do_sample=False,
            stop_strings=list(stop),
            tokenizer=loaded.processor.tokenizer,
        )
    return tuple(output[0, prompt.prompt_tokens :].tolist())


def test_ids_end_as_those_of_generate_with_stop_strings(builtin, prompt):
    whole = answer_of(builtin, prompt)
    assert len(whole.text) > 12
    for start in range(1, 10):
        for stop in (whole.text[start : start + 2], whole.text[start : start + 5]):
            done = answer_of(builtin, prompt, stop)
            assert done.token_ids == generated(builtin, prompt, stop)
            assert done.stop_reason == "stop"
            assert done.text == whole.text[: whole.text.index(stop) + len(stop)]


def test_generate_stops_in_a_prune_context_where_it_stops_without(builtin, prompt):
    tokenizer = builtin.processor.tokenizer
    options = {**prompt.inputs, "max_new_tokens": 24, "do_sample": False}
    whole = builtin.model.generate(**options)
    stop = tokenizer.decode(whole[0, prompt.prompt_tokens :], skip_special_tokens=True)[6:10]
    expected = builtin.model.generate(**options, stop_strings=[stop], tokenizer=tokenizer)
    assert expected.shape[1] < whole.shape[1]
    with prune(builtin.model, PLPHPConfig(r=1, delta_r=0)):
        output = builtin.model.generate(**options, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(output, expected)


def test_the_first_of_several_stop_texts_ends_the_answer(builtin, prompt):
    whole = answer_of(builtin, prompt).text
    early, late = whole[3:5], whole[8:11]
    assert whole.index(early) < whole.index(late)
    for stop in ((early, late), (late, early)):
        done = answer_of(builtin, prompt, *stop)
        assert done.text == whole[: whole.index(early) + 2]
        assert done.token_ids == generated(builtin, prompt, *stop)


def test_each_prompt_of_a_batch_ends_at_its_own_stop_text(builtin, images):
    prompts = [models.prepare(builtin, [image], "describe the image.") for image in images]
    words = [answer_of(builtin, prompt).text for prompt in prompts]
    stops = tuple({word[6:10] for word in words})
    expected = [answer_of(builtin, prompt, *stops) for prompt in prompts]
    assert {done.stop_reason for done in expected} == {"stop"}
    with prune(builtin.model, CUT) as pruner:
        runs = [prefill(builtin, prompt, pruner, 24) for prompt in prompts]
        rows = list(decode_batch(builtin, runs, Settings(24, stop=stops)))
    found = {row.index: row.event for row in rows if isinstance(row.event, Done)}
    assert [found[index] for index in range(len(prompts))] == expected


def test_a_stop_text_that_does_not_come_changes_nothing(builtin, prompt):
    assert answer_of(builtin, prompt, "zebra\n") == answer_of(builtin, prompt)


def test_an_end_of_sequence_is_told_from_a_stop_text(builtin, prompt):
    for stop in ((), ("<|eos|>",)):
        *_, done = stream(builtin, prompt, CUT, Settings(64, stop=stop))
        assert done.stop_reason == "eos"
        assert done.token_ids[-1] == builtin.processor.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("text", "piece", "stops", "shown"),
    [
        ("the last topper", " topper", ("stop", "top"), " top"),
        ("stop by stop", "stop", ("stop",), "stop"),
        ("a\nb", "\nb", ("\n",), "\n"),
        ("one.two", "e.two", ("ne.", "e.t"), "e."),
        ("nothing", "ing", ("x",), "ing"),
    ],
)
def test_the_text_ends_with_the_stop_text_that_ends_first(text, piece, stops, shown):
    assert until_stop(text, piece, stops) == shown


@pytest.mark.parametrize(("stop", "named"), [("", "empty"), ("\ud800", "UTF-8")])
def test_a_stop_text_that_no_answer_holds_is_refused(stop, named):
    with pytest.raises(UsageError, match=named):
        Settings(stop=("fine", stop))


def test_stop_texts_need_a_tokenizer():
    with pytest.raises(UsageError, match="tokenizer"):
        AnswerText(None, ["x"])
    assert AnswerText(None, eos={1}).take(1, torch.tensor([[1]]), last=False) == ("", "eos")


def test_what_a_checkpoints_own_config_asks_for_does_not_change_the_answer(builtin, prompt, monkeypatch):
    expected = answer_of(builtin, prompt)
    for name, value in (("num_beams", 4), ("num_return_sequences", 2), ("guidance_scale", 3.0)):
        monkeypatch.setattr(builtin.model.generation_config, name, value)
    assert answer_of(builtin, prompt) == expected
