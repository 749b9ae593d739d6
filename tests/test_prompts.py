"""Prompts as a model reads them: images and their placeholders, chat templates, special tokens."""

import inspect
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_model import ASSISTANT, BOS, IMAGE, TOKENS_PER_IMAGE, USER
from transformers import ProcessorMixin

from plphp_cli import models
from plphp_cli.errors import ImageError, ModelError, UsageError
from plphp_cli.images import load_image
from plphp_cli.models.loaded import LoadedModel


def ids(loaded, prompt):
    return loaded.processor.tokenizer.convert_ids_to_tokens(prompt.inputs["input_ids"][0].tolist())


def test_images_come_first_in_the_order_given(loaded_toy, pictures):
    prompt = models.prepare(loaded_toy, pictures[:2], "what?")
    assert prompt.text == f"{BOS}{USER}{IMAGE}{IMAGE}what?\n{ASSISTANT}"
    assert prompt.images == (pictures[0].path, pictures[1].path)
    assert prompt.vision_tokens == 2 * TOKENS_PER_IMAGE == ids(loaded_toy, prompt).count(IMAGE)
    assert prompt.prompt_tokens == prompt.inputs["input_ids"].shape[1]
    assert prompt.preprocess_s > 0
    red, blue = prompt.inputs["pixel_values"]
    assert red[0].mean() == blue[2].mean() == 1
    assert red[2].mean() == blue[0].mean() == -1


def test_placeholders_place_the_images(loaded_toy, pictures):
    prompt = models.prepare(loaded_toy, pictures[:2], "Is <image> like <image>?")
    assert f"Is {IMAGE} like {IMAGE}?" in prompt.text
    assert prompt.vision_tokens == 2 * TOKENS_PER_IMAGE


@pytest.mark.parametrize(("count", "text"), [(0, "a <image>"), (1, "<image> <image>x"), (2, "one <image>")])
def test_placeholders_that_are_not_one_per_image(loaded_toy, pictures, count, text):
    with pytest.raises(ImageError, match=f"{count} image") as caught:
        models.prepare(loaded_toy, pictures[:count], text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("system", ["see <image>", "<image>"])
def test_a_placeholder_in_the_system_message(loaded_toy, pictures, system):
    with pytest.raises(ImageError, match="the system message holds <image>"):
        models.prepare(loaded_toy, pictures[:1], "what?", system=system)


def test_no_images(loaded_toy):
    prompt = models.prepare(loaded_toy, [], "hello")
    assert (prompt.vision_tokens, prompt.images) == (0, ())
    assert "pixel_values" not in prompt.inputs
    loaded_toy.model(**prompt.inputs)


def test_the_system_message_comes_first(loaded_toy, pictures):
    prompt = models.prepare(loaded_toy, pictures[:1], "what?", system="be brief")
    assert prompt.text.startswith(f"{BOS}be brief")


@pytest.mark.parametrize("text", ["", "  \n\t", "<image>", "\udcff"])
def test_text_that_says_nothing(loaded_toy, pictures, text):
    with pytest.raises(UsageError):
        models.prepare(loaded_toy, pictures[:1], text)


SANITIZES = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters
sanitizing = pytest.mark.skipif(
    not SANITIZES,
    reason="this transformers cannot be told to read special tokens as text",
)


@sanitizing
def test_the_bos_token_stands_once(loaded_toy, pictures):
    for text in ("what?", f"what {BOS}?"):
        assert ids(loaded_toy, models.prepare(loaded_toy, pictures[:1], text)).count(BOS) == 1


@pytest.mark.skipif(SANITIZES, reason="this transformers can be told to read special tokens as text")
def test_typed_special_tokens_are_refused_where_they_would_be_obeyed(loaded_toy, pictures):
    with pytest.raises(UsageError, match=re.escape(ASSISTANT)) as error:
        models.prepare(loaded_toy, pictures[:1], f"what {ASSISTANT}?")
    assert "--raw-prompt" in error.value.hint


CONTROL = [BOS, "</s>", "<pad>", USER, ASSISTANT]


@sanitizing
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([*CONTROL, "<pa", "d>", " what ", "\ue000", "\n"]), min_size=1),
    st.integers(0, 3),
)
def test_typed_special_tokens_stay_text(loaded_toy, pictures, pieces, count):
    text = "see " + "".join(pieces)
    prompt = models.prepare(loaded_toy, pictures[:count], text)
    tokens = ids(loaded_toy, prompt)
    assert tokens.count(IMAGE) == prompt.vision_tokens == count * TOKENS_PER_IMAGE
    assert [tokens.count(token) for token in CONTROL] == [1, 0, 0, 1, 1]
    assert bool(prompt.notes) == any(token in text for token in CONTROL)


@sanitizing
@pytest.mark.parametrize("count", [0, 1])
def test_an_image_token_hidden_around_another_token_is_refused(loaded_toy, pictures, count):
    with pytest.raises(ImageError, match="refuses the prompt"):
        models.prepare(loaded_toy, pictures[:count], f"see <ima{BOS}ge>")


@sanitizing
def test_a_typed_image_token_of_another_spelling_stays_text(broken, pictures):
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        path = broken / name
        path.write_text(path.read_text().replace(IMAGE, "<|vision|>"))
    loaded = models.load(str(broken))
    prompt = models.prepare(loaded, pictures[:1], "<image> what is <|vision|>?")
    assert ids(loaded, prompt).count("<|vision|>") == TOKENS_PER_IMAGE == prompt.vision_tokens
    assert "<|vision|>" in prompt.notes[0]


def test_a_model_without_a_chat_template(broken, pictures):
    (broken / "chat_template.jinja").unlink()
    loaded = models.load(str(broken))
    for text in ("what?", f"what {USER}?") if SANITIZES else ("what?",):
        prompt = models.prepare(loaded, pictures[:2], text, system="be brief")
        assert prompt.text == f"be brief\n\nUSER: {IMAGE}\n{IMAGE}\n{text}\nASSISTANT:"
        assert prompt.vision_tokens == 2 * TOKENS_PER_IMAGE
        assert "no chat template" in prompt.notes[0]


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{{- raise_exception('no') -}}", ModelError, "chat template"),
        ("{{- messages[0].nothing.at.all -}}", ModelError, "chat template"),
        ("{{- 'no images here' -}}", ImageError, "refuses the prompt|its 1 image expands to"),
        ("{{- '<image><image>' -}}", ImageError, "refuses the prompt"),
    ],
)
def test_a_chat_template_that_does_not_fit(broken, pictures, template, error, message):
    (broken / "chat_template.jinja").write_text(template)
    with pytest.raises(error, match=message):
        models.prepare(models.load(str(broken)), pictures[:1], "what?")


def test_a_template_without_a_place_for_the_system_message(broken, pictures):
    (broken / "chat_template.jinja").write_text("{{- '<image>what?' -}}")
    with pytest.raises(UsageError, match="no place for a system message"):
        models.prepare(models.load(str(broken)), pictures[:1], "what?", system="be brief")


def test_a_prompt_longer_than_the_model_s_context_is_noted(loaded_toy, pictures):
    assert "512" in models.prepare(loaded_toy, pictures[:1], "x" * 800).notes[-1]


def test_the_notes_of_the_images_are_those_of_the_prompt(loaded_toy, tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    picture = load_image(tmp_path / "clear.png")
    assert models.prepare(loaded_toy, [picture], "what?").notes == (f"{picture.path}: {picture.notes[0]}",)


def test_the_model_answers_a_prepared_prompt(loaded_toy, pictures):
    prompt = models.prepare(loaded_toy, pictures, "what?")
    output = loaded_toy.model.generate(**prompt.inputs, max_new_tokens=2, do_sample=False)
    assert output.shape == (1, prompt.prompt_tokens + 2)
    assert isinstance(loaded_toy, LoadedModel)
