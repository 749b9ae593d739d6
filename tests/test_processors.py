"""The real processor of each family, on real images, through `load`, `prepare` and the engine."""

import json
from functools import cache

import laws
import pytest
from families import load as row_of
from PIL import Image
from processors import PROCESSORS
from transformers.utils import is_torchvision_available

from plphp_cli import families, models
from plphp_cli.attention import prune
from plphp_cli.errors import ImageError, ModelError, UnsupportedError, UsageError
from plphp_cli.generate import stream
from plphp_cli.images import LoadedImage, load_image
from plphp_cli.prefilling import prefill
from plphp_cli.sampling import Settings
from plphp_cli.vision import image_token_id

ABSENT = pytest.mark.skipif(
    not is_torchvision_available(),
    reason="its processor needs torchvision: pip install torchvision num2words",
)
ALL = [pytest.param(name, marks=[ABSENT] if made.torchvision else []) for name, made in PROCESSORS.items()]


def picture(name, size, colours):
    """Two halves of different colours, so that tiles and images differ."""
    image = Image.new("RGB", size, colours[0])
    image.paste(colours[1], (0, 0, size[0] // 2, size[1]))
    return LoadedImage(image, name, size, (), name)


WIDE = picture("wide.png", (64, 32), ("red", "yellow"))
TALL = picture("tall.png", (30, 62), ("blue", "green"))


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


@pytest.mark.parametrize("name", ALL)
def test_images_expand_in_order_and_the_model_takes_them(name, loaded_from):
    loaded = loaded_from(name)
    one, other = (models.prepare(loaded, [image], "what is it?") for image in (WIDE, TALL))
    both = models.prepare(loaded, [WIDE, TALL], "what is it?")
    swapped = models.prepare(loaded, [TALL, WIDE], "what is it?")
    assert both.images == ("wide.png", "tall.png")
    if PROCESSORS[name].one_tile:
        assert max(both.image_tokens) < min(one.image_tokens + other.image_tokens)
    else:
        assert both.image_tokens == one.image_tokens + other.image_tokens
    assert swapped.image_tokens == both.image_tokens[::-1]
    assert both.vision_tokens == sum(both.image_tokens) > 0
    ids = both.inputs["input_ids"][0]
    assert int((ids == image_token_id(loaded.model.config)).sum()) == both.vision_tokens
    assert ids.shape == (both.prompt_tokens,)
    for prompt in (one, both, swapped):
        with prune(loaded.model, laws.CUT.replace(scope="image")) as pruner:
            run = prefill(loaded, prompt, pruner)
        spans = run.state.vision.spans
        assert tuple(stop - start for start, stop in spans) == prompt.image_tokens


@pytest.mark.parametrize("name", ALL)
def test_the_engine_answers_as_generate_does_from_what_the_processor_made(name, loaded_from):
    loaded = loaded_from(name)
    prompt = models.prepare(loaded, [WIDE, TALL], "what is it?")
    inputs = dict(prompt.inputs)
    for policy in (None, laws.CUT):
        with prune(loaded.model, policy):
            expected, _ = laws.answer(loaded.model, inputs)
        *_, done = stream(loaded, prompt, policy, Settings(laws.NEW_TOKENS, stop_at_eos=False))
        assert list(done.token_ids) == expected.tolist()
    stock, _ = laws.answer(loaded.model, inputs)
    *_, done = stream(loaded, prompt, laws.WHOLE, Settings(laws.NEW_TOKENS, stop_at_eos=False))
    assert list(done.token_ids) == stock.tolist()


@pytest.mark.parametrize("name", ALL)
def test_the_text_places_the_images(name, loaded_from):
    loaded = loaded_from(name)
    prompt = models.prepare(loaded, [WIDE, TALL], "first <image> then <image> which is red?")
    ids = prompt.inputs["input_ids"][0]
    vision = (ids == image_token_id(loaded.model.config)).nonzero()[:, 0].tolist()
    between = loaded.processor.tokenizer.decode(ids[vision[0] : vision[-1]])
    kept = not any("elsewhere" in note for note in prompt.notes)
    assert ("then" in between) == kept == (not PROCESSORS[name].images_first)
    with pytest.raises(ImageError, match="1 <image>, but 2 images"):
        models.prepare(loaded, [WIDE, TALL], "<image> what is it?")


@pytest.mark.parametrize("name", ALL)
def test_a_raw_prompt_is_sent_as_typed(name, loaded_from):
    loaded = loaded_from(name)
    text = "see <image> here: </s> what?"
    prompt = models.prepare(loaded, [WIDE], text, raw=True)
    own = prompt.text.removeprefix("see ").removesuffix(" here: </s> what?")
    assert prompt.text == f"see {own} here: </s> what?"
    ids = prompt.inputs["input_ids"][0].tolist()
    assert loaded.processor.tokenizer.eos_token_id in ids, "a special token that was typed is one"
    typed = models.prepare(loaded, [WIDE], prompt.text, raw=True)
    assert typed.inputs["input_ids"].tolist() == [ids]
    first = models.prepare(loaded, [WIDE], "what?", raw=True)
    assert first.text == f"{own}what?"
    with pytest.raises(UsageError, match="raw prompt has no system message"):
        models.prepare(loaded, [WIDE], text, "be brief", raw=True)


def test_a_family_without_a_conversation_gets_the_images_and_the_text(loaded_from):
    loaded = loaded_from("paligemma")
    prompt = models.prepare(loaded, [WIDE], "caption en")
    assert prompt.text == "<image>caption en"
    assert any("no conversation" in note for note in prompt.notes)
    assert "labels" not in prompt.inputs
    assert not prompt.inputs["token_type_ids"].any(), "the whole prompt is a prefix"


@pytest.mark.skipif(is_torchvision_available(), reason="needs an environment without torchvision")
@pytest.mark.parametrize("name", [name for name, made in PROCESSORS.items() if made.torchvision])
def test_without_torchvision_the_message_names_the_extra(name, tmp_path, monkeypatch):
    row_of(name).model.config.save_pretrained(tmp_path)
    classes = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "glm4v": "Glm4v"} | {
        "llava_onevision": "LlavaOnevision",
        "internvl": "InternVL",
        "smolvlm": "SmolVLM",
        "mistral3": "Pixtral",
    }
    named = {"processor_class": f"{classes[name]}Processor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(named))
    with pytest.raises(ModelError, match="torchvision") as error:
        models.load(str(tmp_path), device="cpu")
    assert "plphp-cli[vision]" in error.value.hint


def test_a_model_that_has_eager_attention_alone_says_so(tmp_path):
    row_of("paligemma2").model.save_pretrained(tmp_path)
    PROCESSORS["paligemma"].make().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="back-end sdpa") as error:
        models.load(str(tmp_path), device="cpu", attn="sdpa")
    assert error.value.hint == "use --attn eager"
    prompt = models.prepare(loaded := models.load(str(tmp_path), device="cpu", attn="eager"), [WIDE], "what?")
    *_, done = stream(loaded, prompt, laws.CUT, Settings(laws.NEW_TOKENS, stop_at_eos=False))
    assert len(done.token_ids) == laws.NEW_TOKENS


def test_the_table_says_which_processors_need_torchvision():
    for name, made in PROCESSORS.items():
        assert families.find(row_of(name).model.config.model_type).torchvision == made.torchvision


@pytest.mark.parametrize("name", ALL)
def test_reducing_an_image_is_noted_as_vain_where_its_tokens_stay_as_many(name, loaded_from, tmp_path):
    Image.new("RGB", (96, 48), "red").save(tmp_path / "wide.png")
    path, loaded = str(tmp_path / "wide.png"), loaded_from(name)
    whole = models.prepare(loaded, [load_image(path)], "what is it?")
    for pixels in (2000, 200):
        reduced = models.prepare(loaded, [load_image(path, pixels)], "what is it?")
        vain = reduced.vision_tokens == whole.vision_tokens
        assert any("reducing saved no vision tokens" in note for note in reduced.notes) == vain
        assert vain or name != "llava"  # of one size
