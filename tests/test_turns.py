"""Conversations as real processors and chat templates spell them, and what that means for the cache."""

from functools import cache

import laws
import pytest
from families import load as row_of
from processors import PROCESSORS
from test_processors import ALL, TALL, WIDE
from toy_model import IMAGE, save_toy_llava

from plphp_cli import models
from plphp_cli.chat.conversation import Conversation
from plphp_cli.chat.records import CONTINUED, FIRST_TURN, STARTED_OVER
from plphp_cli.errors import ImageError, UnsupportedError, UsageError
from plphp_cli.models import Turn, prepare_turns
from plphp_cli.sampling import Settings
from plphp_cli.support import FULL, layer_kinds

TALKERS = [name for name in ALL if "paligemma" not in (name.values if hasattr(name, "values") else [name])]
FIRST = Turn((WIDE, TALL), "what is it?")


@pytest.fixture(scope="module")
def loaded_from(tmp_path_factory):
    """Save a family's toy model beside its real processor, and load both as a user does."""

    @cache
    def load(name):
        folder = tmp_path_factory.mktemp(name)
        row_of(name).model.save_pretrained(folder)
        PROCESSORS[name].make().save_pretrained(folder)
        return models.load(str(folder), device="cpu")

    return load


@pytest.fixture
def toy(tmp_path):
    return save_toy_llava(tmp_path / "toy")


def answered(turn, answer):
    return Turn(turn.images, turn.question, answer)


def ids(prompt):
    return prompt.inputs["input_ids"][0].tolist()


@pytest.mark.parametrize("name", TALKERS)
def test_a_conversation_begins_as_its_first_question_does(name, loaded_from):
    loaded = loaded_from(name)
    single = models.prepare(loaded, FIRST.images, FIRST.question)
    first = prepare_turns(loaded, [FIRST])
    assert ids(first) == ids(single)
    assert first.text == single.text
    second = prepare_turns(loaded, [answered(FIRST, "a cube"), Turn((), "and now?")])
    assert ids(second)[: len(ids(first))] == ids(first)
    rest = loaded.processor.tokenizer.decode(ids(second)[len(ids(first)) :])
    assert rest.index("a cube") < rest.index("and now?")
    assert second.vision_tokens == first.vision_tokens
    third = prepare_turns(loaded, [answered(FIRST, "a cube"), Turn((WIDE,), "and <image> now?")])
    assert third.images == ("wide.png", "tall.png", "wide.png")
    assert third.vision_tokens > second.vision_tokens
    with pytest.raises(ImageError, match="1 <image>, but 0 images"):
        prepare_turns(loaded, [answered(FIRST, "a cube"), Turn((), "and <image> now?")])


@pytest.mark.parametrize("name", TALKERS)
def test_a_conversation_goes_on_where_its_answers_are_spelt_as_they_came(name, loaded_from):
    loaded = loaded_from(name)
    conversation = Conversation(loaded, laws.CUT, FIRST_TURN)
    settings = Settings(4)
    begun, *_, done = conversation.ask(prepare_turns(loaded, [FIRST]), settings)
    assert (begun.how, begun.why) == (STARTED_OVER, "the first question")
    turns = [answered(FIRST, done.text), Turn((), "and now?")]
    second = prepare_turns(loaded, turns)
    begun, *_, done = conversation.ask(second, settings)
    cannot = set(layer_kinds(loaded.model.config)) != {FULL} and "give back" in (begun.why or "")
    assert begun.how == CONTINUED or cannot, begun.why
    assert begun.fed_tokens < second.prompt_tokens or cannot
    more = [turns[0], answered(turns[1], done.text), Turn((TALL,), "and here?")]
    begun, *_ = conversation.ask(prepare_turns(loaded, more), settings)
    assert (begun.how, begun.why) == (STARTED_OVER, "an image joined")


def test_another_image_of_the_same_size_starts_over(loaded_from):
    loaded = loaded_from("llava")
    conversation = Conversation(loaded, laws.CUT, FIRST_TURN)
    *_, done = conversation.ask(prepare_turns(loaded, [Turn((WIDE,), "what?")]), Settings(4))
    other = [Turn((TALL,), "what?", done.text), Turn((), "and now?")]
    begun, *_ = conversation.ask(prepare_turns(loaded, other), Settings(4))
    assert (begun.how, begun.why) == (STARTED_OVER, "the images are others than before")


def test_a_template_that_changes_what_came_before_starts_over(toy):
    path = toy / "chat_template.jinja"
    path.write_text("{{- messages | length -}}" + path.read_text())
    loaded = models.load(str(toy), device="cpu")
    conversation = Conversation(loaded, laws.CUT, FIRST_TURN)
    *_, done = conversation.ask(prepare_turns(loaded, [FIRST]), Settings(4))
    begun, *_ = conversation.ask(
        prepare_turns(loaded, [answered(FIRST, done.text), Turn((), "and now?")]), Settings(4)
    )
    assert begun.how == STARTED_OVER
    assert "chat template spells the earlier turns otherwise" in begun.why


def test_a_model_without_a_chat_template_converses_as_llava_does(toy):
    (toy / "chat_template.jinja").unlink()
    loaded = models.load(str(toy), device="cpu")
    prompt = prepare_turns(loaded, [Turn((WIDE,), "what?", " a cube "), Turn((), "where?")], "be brief")
    assert prompt.text == f"be brief\n\nUSER: {IMAGE}\nwhat?\nASSISTANT: a cube</s>USER: where?\nASSISTANT:"


def test_what_an_answer_says_is_text_whatever_it_says(toy):
    loaded = models.load(str(toy), device="cpu")
    said = prepare_turns(loaded, [Turn((WIDE,), "what?", "see <image> </s>"), Turn((), "where?")])
    plain = prepare_turns(loaded, [Turn((WIDE,), "what?", "see"), Turn((), "where?")])
    assert said.vision_tokens == plain.vision_tokens
    assert any("plain text" in note for note in said.notes)
    assert ids(said).count(loaded.processor.tokenizer.eos_token_id) == ids(plain).count(
        loaded.processor.tokenizer.eos_token_id
    )


def test_what_no_conversation_can_be_made_of_is_refused(loaded_from):
    with pytest.raises(UnsupportedError, match="made for no conversation"):
        prepare_turns(loaded_from("paligemma"), [FIRST])
    with pytest.raises(UsageError, match="blank"):
        prepare_turns(loaded_from("llava"), [answered(FIRST, "a cube"), Turn((), " ")])
