"""A conversation goes on from the cut cache as the masked reference would, or starts over and says so."""

import contextlib

import pytest
import torch
from families import load
from reference import masked_reference
from runs import CUT

from plphp_cli.attention import prune
from plphp_cli.chat.conversation import Begun, Conversation
from plphp_cli.chat.quality import judge_turn
from plphp_cli.chat.records import CONTINUED, EACH_TURN, FIRST_TURN, STARTED_OVER
from plphp_cli.decoding import Done, Token
from plphp_cli.generate import stream
from plphp_cli.prefilling import prefill
from plphp_cli.prompt import Prompt
from plphp_cli.quality import along, kl, teacher_forced
from plphp_cli.sampling import Settings
from plphp_cli.vision import image_token_id

NEW_TOKENS = 6
SETTINGS = Settings(NEW_TOKENS, stop_at_eos=False)
PER_TOKEN = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
# As long as a chunk must be to leave the toys' sliding windows behind.
QUESTION = [5 + 7 * i % 280 for i in range(20)]
ANOTHER = [11, 12, 13]


@pytest.fixture(autouse=True)
def no_markers(request, monkeypatch):
    """Random weights do not know that an answer is text: keep them from writing images."""
    for name in {"family", "specimen"} & set(request.fixturenames):
        forbid_markers(monkeypatch, request.getfixturevalue(name).model)


def forbid_markers(monkeypatch, model):
    names = ("video_token_id", "vision_start_token_id", "vision_end_token_id")
    markers = {image_token_id(model.config), *(getattr(model.config, name, None) for name in names)} - {None}
    monkeypatch.setattr(model.generation_config, "suppress_tokens", sorted(markers))


@pytest.fixture
def llava(monkeypatch):
    family = load("llava")
    forbid_markers(monkeypatch, family.model)
    return family


def longer(inputs, *pieces):
    """The inputs of a prompt with more text at its end."""
    more = [token for piece in pieces for token in piece]
    longer = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], torch.tensor([more], dtype=torch.long)], dim=1),
    }
    for name, fill in PER_TOKEN.items():
        if name in inputs:
            rest = torch.full((1, len(more)), fill, dtype=inputs[name].dtype)
            longer[name] = torch.cat([inputs[name], rest], dim=1)
    return longer


def as_prompt(inputs):
    return Prompt(inputs, "", (), inputs["input_ids"].shape[1], 0, 0.0)


def ask(conversation, inputs, **options):
    """How a turn began, and its answer's ids."""
    begun, *_, done = conversation.ask(as_prompt(inputs), SETTINGS, **options)
    assert isinstance(begun, Begun)
    assert isinstance(done, Done)
    return begun, list(done.token_ids)


def logits_of(family, conversation, ids):
    """What the model expects along `ids` at the turn that went on, from the copy of its cache."""
    with prune(family.model, CUT):
        return along(family.loaded, conversation.start, ids)


def reference(family, layers, first, inputs, ids):
    """The same from one forward of the stock model over the whole conversation, dropped positions masked."""
    whole, origin = longer(inputs, ids[:-1]), first["input_ids"].shape[1]
    with masked_reference(family.model, layers, first, origin), torch.no_grad():
        logits = family.model(**whole).logits[0]
    return logits[inputs["input_ids"].shape[1] - 1 :]


def assert_close(logits, expected):
    assert logits.shape == expected.shape
    worst = (logits - expected).abs().max().item()
    assert worst <= 1e-4 * expected.abs().max().item(), f"logits differ by {worst}"


def second_turn_equals_masked_reference(family):
    for first in family.prompts:
        conversation = Conversation(family.loaded, CUT, FIRST_TURN)
        begun, answer = ask(conversation, first)
        assert (begun.how, begun.why) == (STARTED_OVER, "the first question")
        inputs = first
        for question in (QUESTION, ANOTHER):
            inputs = longer(inputs, answer, question)
            begun, answer = ask(conversation, inputs, keep_start=True)
            assert (begun.how, begun.why) == (CONTINUED, None)
            assert begun.fed_tokens == len(question) + 1, "the last token of an answer was not fed before"
            expected = reference(family, begun.layers, first, inputs, answer)
            assert_close(logits_of(family, conversation, answer), expected)
            assert begun.kv_bytes_held < begun.kv_bytes_full
            # The cut matters: the same turn on the whole cache expects something else.
            whole = teacher_forced(family.loaded, as_prompt(inputs), None, answer)
            assert not torch.allclose(whole, expected, rtol=1e-3, atol=1e-3)


def test_a_second_and_third_turn_equal_the_masked_reference(family):
    if family.name.startswith("paligemma"):
        pytest.skip("starts over")
    second_turn_equals_masked_reference(family)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "lfm2_vl"])
def test_layers_with_a_state_of_their_own_go_on_rightly(name, monkeypatch):
    family = load(name)
    forbid_markers(monkeypatch, family.model)
    second_turn_equals_masked_reference(family)


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_a_prompt_whose_tokens_all_see_each_other_starts_over(name, monkeypatch):
    family = load(name)
    forbid_markers(monkeypatch, family.model)
    conversation = Conversation(family.loaded, CUT, FIRST_TURN)
    _, answer = ask(conversation, family.prompts[0])
    inputs = longer(family.prompts[0], answer, QUESTION)
    begun, again = ask(conversation, inputs)
    assert begun.how == STARTED_OVER
    assert "every token" in begun.why
    assert again == fresh_answer(family, inputs)


def fresh_answer(family, inputs):
    """Of a prompt that nothing came before."""
    *_, done = stream(family.loaded, as_prompt(inputs), CUT, SETTINGS)
    return list(done.token_ids)


def assert_fresh(family, begun, answer, conversation, inputs):
    """The turn is, to the bit, what a prefill of its prompt is that nothing came before."""
    with prune(family.model, CUT) as pruner:
        expected = prefill(family.loaded, as_prompt(inputs), pruner, NEW_TOKENS)
    assert begun.fed_tokens == begun.prompt_tokens == expected.state.prompt_tokens
    held = conversation._taken.held
    assert torch.equal(held.logits, expected.logits)
    for ours, theirs in zip(begun.layers, expected.state.layers, strict=True):
        assert (ours.gamma, ours.group, ours.rate) == (theirs.gamma, theirs.group, theirs.rate)
        assert ours.kept is theirs.kept is None or torch.equal(ours.kept, theirs.kept)
    assert answer == fresh_answer(family, inputs)


def test_a_cut_for_each_turn_equals_a_fresh_prefill_bit_for_bit(specimen):
    conversation = Conversation(specimen.loaded, CUT, EACH_TURN)
    inputs, answer = specimen.prompts[0], []
    for question in ([], QUESTION, ANOTHER):
        inputs = longer(inputs, answer, question)
        begun, answer = ask(conversation, inputs)
        assert begun.how == STARTED_OVER
        assert_fresh(specimen, begun, answer, conversation, inputs)
    assert begun.why == "each question gets its own cut"


@pytest.mark.parametrize(
    "change", ["an earlier token", "a shorter prompt", "another image", "one image more"]
)
def test_what_the_cut_cache_cannot_stand_for_starts_over(llava, change):
    first = llava.prompts[1]
    conversation = Conversation(llava.loaded, CUT, FIRST_TURN)
    _, answer = ask(conversation, first)
    inputs = longer(first, answer, QUESTION)
    if change == "an earlier token":
        inputs["input_ids"][0, 2] += 1
    elif change == "a shorter prompt":
        inputs = {**first, "input_ids": first["input_ids"][:, :-1]}
    elif change == "another image":
        inputs["pixel_values"] = inputs["pixel_values"] + 0.01
    else:
        image = [image_token_id(llava.model.config)] * 16
        inputs = longer(inputs, image, ANOTHER)
        inputs["pixel_values"] = torch.cat([inputs["pixel_values"], llava.prompts[0]["pixel_values"][:1]])
    begun, answer = ask(conversation, inputs)
    assert begun.how == STARTED_OVER
    assert ("images" if "image" in change else "template") in begun.why
    assert_fresh(llava, begun, answer, conversation, inputs)
    # From there the conversation goes on.
    begun, _ = ask(conversation, longer(inputs, answer, ANOTHER))
    assert begun.how == CONTINUED


def test_an_answer_that_is_spelt_otherwise_is_taken_back_first(specimen):
    """The template may trim an answer, or the tokenizer split it in another way; the prompt stays."""
    if specimen.name.startswith("paligemma"):
        pytest.skip("starts over")
    first = specimen.prompts[0]
    conversation = Conversation(specimen.loaded, CUT, FIRST_TURN)
    _, answer = ask(conversation, first)
    inputs = longer(first, answer[:2], QUESTION)
    begun, answer = ask(conversation, inputs, keep_start=True)
    if specimen.name == "gemma3":  # what has left the window of a sliding layer is gone
        assert (begun.how, begun.why) == (
            STARTED_OVER,
            "the cache cannot give back tokens of the last answer",
        )
        assert_fresh(specimen, begun, answer, conversation, inputs)
        return
    assert begun.how == CONTINUED
    assert begun.fed_tokens == len(QUESTION)
    assert_close(
        logits_of(specimen, conversation, answer),
        reference(specimen, begun.layers, first, inputs, answer),
    )


@contextlib.contextmanager
def interrupted_at(model, call, layer):
    """Ctrl-C as the decoder's n-th forward (from 1) reaches a layer: those before it have their tokens."""
    calls = 0

    def hook(module, arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    handle = model.get_decoder().layers[layer].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "builtin"])
def test_an_answer_interrupted_within_a_step_leaves_the_conversation_usable(name, call, monkeypatch):
    family = load(name)
    forbid_markers(monkeypatch, family.model)
    conversation = Conversation(family.loaded, CUT, FIRST_TURN)
    first, shown, layers = family.prompts[0], [], None
    with interrupted_at(family.model, call, 1), contextlib.suppress(KeyboardInterrupt):
        for event in conversation.ask(as_prompt(first), SETTINGS):
            layers = event.layers if isinstance(event, Begun) else layers
            shown += [event.token_id] if isinstance(event, Token) else []
    assert len(shown) == call - 1
    inputs = longer(first, shown, QUESTION)
    begun, answer = ask(conversation, inputs, keep_start=True)
    if call == 1 or name == "gemma3":
        assert begun.how == STARTED_OVER
        assert_fresh(family, begun, answer, conversation, inputs)
        return
    assert begun.how == CONTINUED
    assert_close(logits_of(family, conversation, answer), reference(family, layers, first, inputs, answer))


def test_an_answer_that_is_broken_off_between_tokens_goes_on_everywhere(specimen):
    if specimen.name.startswith("paligemma"):
        pytest.skip("starts over")
    conversation = Conversation(specimen.loaded, CUT, FIRST_TURN)
    first, shown = specimen.prompts[0], []
    events = conversation.ask(as_prompt(first), SETTINGS)
    for event in events:
        shown += [event.token_id] if isinstance(event, Token) else []
        if len(shown) == 3:
            events.close()
    inputs = longer(first, shown, QUESTION)
    begun, answer = ask(conversation, inputs, keep_start=True)
    assert begun.how == CONTINUED
    assert_close(
        logits_of(specimen, conversation, answer),
        reference(specimen, begun.layers, first, inputs, answer),
    )


def test_a_question_broken_off_before_its_answer_is_why_the_next_starts_over(llava):
    conversation = Conversation(llava.loaded, CUT, FIRST_TURN)
    events = conversation.ask(as_prompt(llava.prompts[0]), SETTINGS)
    assert isinstance(next(events), Begun)
    events.close()
    # It is not part of what is asked next.
    shorter = {
        name: value[:, :-1] if name == "input_ids" or name in PER_TOKEN else value
        for name, value in llava.prompts[0].items()
    }
    inputs = longer(shorter, ANOTHER)
    begun, answer = ask(conversation, inputs)
    assert begun.why == "the last question was broken off before its answer"
    assert_fresh(llava, begun, answer, conversation, inputs)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_question_interrupted_while_it_is_fed_can_be_asked_again(llava, layer):
    conversation, twin = (Conversation(llava.loaded, CUT, FIRST_TURN) for _ in range(2))
    first = llava.prompts[0]
    _, answer = ask(conversation, first)
    ask(twin, first)
    inputs = longer(first, answer, QUESTION)
    with interrupted_at(llava.model, 1, layer), pytest.raises(KeyboardInterrupt):
        ask(conversation, inputs)
    begun, again = ask(conversation, inputs)
    assert begun.how == CONTINUED
    assert again == ask(twin, inputs)[1]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_conversations_take_turns_on_one_model(name, monkeypatch):
    family = load(name)
    forbid_markers(monkeypatch, family.model)

    def turns(conversation, first):
        inputs, answer = first, []
        for question in ([], QUESTION, ANOTHER):
            inputs = longer(inputs, answer, question)
            begun, answer = ask(conversation, inputs)
            yield begun.how, answer

    alone = [list(turns(Conversation(family.loaded, CUT, FIRST_TURN), first)) for first in family.prompts]
    both = [turns(Conversation(family.loaded, CUT, FIRST_TURN), first) for first in family.prompts]
    for expected in zip(*alone, strict=True):
        assert tuple(next(each) for each in both) == expected


def test_the_quality_of_a_turn_is_that_of_its_cut(llava):
    first = llava.prompts[0]
    conversation = Conversation(llava.loaded, CUT, FIRST_TURN)
    _, answer = ask(conversation, first, keep_start=True)
    found = judge_turn(llava.loaded, conversation, as_prompt(first), SETTINGS)
    whole = Conversation(llava.loaded, None, FIRST_TURN)
    ids = list(
        next(e for e in whole.ask(as_prompt(first), Settings(NEW_TOKENS)) if isinstance(e, Done)).token_ids
    )
    unpruned, pruned = (teacher_forced(llava.loaded, as_prompt(first), policy, ids) for policy in (None, CUT))
    assert found.positions == len(ids) - 1
    assert found.kl_mean == pytest.approx(kl(unpruned, pruned)[1:].mean().item(), rel=1e-4)
    assert found.kl_mean_cut_anew is None
    inputs = longer(first, answer, QUESTION)
    begun, _ = ask(conversation, inputs, keep_start=True)
    found = judge_turn(llava.loaded, conversation, as_prompt(inputs), SETTINGS)
    unpruned = teacher_forced(llava.loaded, as_prompt(inputs), None, ids := unpruned_ids(llava, inputs))
    continued = reference(llava, begun.layers, first, inputs, ids)
    anew = teacher_forced(llava.loaded, as_prompt(inputs), CUT, ids)
    assert found.positions == len(ids)
    assert found.kl_mean == pytest.approx(kl(unpruned, continued).mean().item(), rel=1e-3)
    assert found.kl_max == pytest.approx(kl(unpruned, continued).max().item(), rel=1e-3)
    assert found.kl_mean_cut_anew == pytest.approx(kl(unpruned, anew).mean().item(), rel=1e-3)
    assert found.kl_mean != found.kl_mean_cut_anew
    # Judging takes nothing from the conversation.
    assert ask(conversation, longer(inputs, fresh_answer(llava, inputs), ANOTHER))[0].how == CONTINUED


def unpruned_ids(family, inputs):
    *_, done = stream(family.loaded, as_prompt(inputs), None, Settings(NEW_TOKENS))
    return list(done.token_ids)


def test_a_conversation_that_cuts_nothing_costs_nothing(llava):
    conversation = Conversation(llava.loaded, None, FIRST_TURN)
    _, answer = ask(conversation, llava.prompts[0])
    inputs = longer(llava.prompts[0], answer, QUESTION)
    begun, _ = ask(conversation, inputs, keep_start=True)
    found = judge_turn(llava.loaded, conversation, as_prompt(inputs), SETTINGS)
    assert (begun.how, begun.kv_bytes_held) == (CONTINUED, begun.kv_bytes_full)
    assert found.kl_max < 1e-6
    assert found.top1_agreement == 1
