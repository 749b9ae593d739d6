"""What is said of a model, an option or a value that cannot be used: the file, the tensor or the word."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from plphp_cli import models
from plphp_cli.card import describe
from plphp_cli.cli.app import main
from plphp_cli.errors import ImageError, ModelError, UsageError
from plphp_cli.images import load_image
from plphp_cli.models.options import LoadOptions
from plphp_cli.models.sources import Source, again


@pytest.fixture(scope="module")
def loaded(toy: str) -> models.LoadedModel:
    return models.load(toy, device="cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize(("keep", "why"), [(0.5, "breaks off or is garbled at line"), (0, "it is empty")])
def test_a_truncated_file_of_the_processor_is_named(broken: Path, name: str, keep: float, why: str) -> None:
    text = (broken / name).read_text()
    (broken / name).write_text(text[: int(keep * len(text))])
    with pytest.raises(ModelError) as caught:
        models.load(str(broken), device="cpu")
    assert caught.value.message.startswith(f"{name} of {broken} is broken: ")
    assert why in caught.value.message
    assert "again" in str(caught.value.hint)


def test_a_tokenizer_that_is_json_and_no_tokenizer_is_named(broken: Path) -> None:
    (broken / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(ModelError, match=r"^tokenizer\.json of .* is broken: it holds no tokenizer"):
        models.load(str(broken), device="cpu")


@pytest.mark.parametrize(
    ("files", "part"),
    [
        (["processor_config.json"], "image processor"),
        (["tokenizer.json", "tokenizer_config.json"], "tokenizer"),
        (
            ["processor_config.json", "tokenizer.json", "tokenizer_config.json"],
            "tokenizer and image processor",
        ),
    ],
)
def test_missing_files_of_the_processor_are_told_by_part(broken: Path, files: list[str], part: str) -> None:
    for name in files:
        (broken / name).unlink()
    with pytest.raises(ModelError) as caught:
        models.load(str(broken), device="cpu")
    assert caught.value.message == f"{broken} lacks its processor's files ({part})"
    assert "save_pretrained" in str(caught.value.hint)


def test_a_broken_file_of_a_hub_model_is_fetched_past_the_cache() -> None:
    hint = again(Source("org/toy", Path("x"), "abc"), "tokenizer.json")
    assert hint.endswith("hf download org/toy tokenizer.json --revision abc --force-download")
    assert "hf download" not in again(Source("folder", Path("x"), None), "tokenizer.json")


def test_tensors_of_other_shapes_are_named_with_both(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    save_file(weights | {name: weights[name][:8].clone()}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        models.load(str(broken), device="cpu")
    rows, columns = weights[name].shape
    assert "layers.0.mlp.up_proj.weight has the shape " in caught.value.message
    assert f"[8, {columns}] in the file and [{rows}, {columns}] by config.json" in caught.value.message
    assert "more" not in caught.value.message


def test_of_many_tensors_of_other_shapes_the_first_is_named_and_the_rest_counted(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has the shape .*; so do 8 more$"):  # 3 layers of 3 matrices
        models.load(str(broken), device="cpu")


def change(folder: Path, part: str, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part] = config[part] | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_config_of_a_far_larger_model_is_refused_before_it_takes_memory(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("it is built")

    # At that size it would end the tests.
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", build)
    config = json.loads((broken / "config.json").read_text())
    stored = sum(weight.numel() for weight in load_file(broken / "model.safetensors").values())
    for text, billions in ((None, 6), (config["text_config"] | {"intermediate_size": 10**8}, 28)):
        (broken / "config.json").write_text(json.dumps(config | {"text_config": text}))
        with pytest.raises(ModelError, match=r"^the weights of .* do not match its config: ") as caught:
            models.load(str(broken), device="cpu")
        assert f"the files hold {stored:,} numbers, and config.json describes {billions}," in str(
            caught.value
        )
        assert any("do not match its config" in note for note in describe(str(broken), device="cpu").notes)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"num_beams": ', "is broken: "),
        ("", "is broken: "),
        ('{"num_return_sequences": 2}', "cannot be used: Greedy"),
    ],
)
def test_a_generation_config_that_is_of_no_use_is_named(broken: Path, text: str, why: str) -> None:
    (broken / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=f"^generation_config.json of .* {why}") as caught:
        models.load(str(broken), device="cpu")
    assert caught.value.hint


def test_what_the_generation_config_asks_for_in_vain_is_a_warning_of_every_command(broken: Path) -> None:
    (broken / "generation_config.json").write_text('{"num_beams": 4}')
    (warning,) = models.load(str(broken), device="cpu").warnings
    assert warning == "beam search (num_beams > 1), which the model's generation config asks for, is left out"


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_part_of_an_unknown_type_is_named_in_a_short_line(broken: Path, part: str) -> None:
    change(broken, part, model_type="zork")
    with pytest.raises(
        ModelError, match=f"no model type 'zork', which config.json names for its {part}$"
    ) as c:
        models.load(str(broken), device="cpu")
    assert len(c.value.message) < 200
    assert c.value.hint == "a newer transformers may know it"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_act": "zork"}, "text_config.hidden_act = 'zork'"),
        ({"rope_parameters": {"rope_type": "zork"}}, "text_config.rope_parameters.rope_type = 'zork'"),
        ({"num_attention_heads": 0, "head_dim": None}, "ZeroDivisionError: "),
        ({"num_attention_heads": "four"}, "Validation error for field 'num_attention_heads'"),
    ],
)
def test_a_config_that_no_model_can_be_built_from(
    broken: Path, changes: dict[str, object], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(broken, "text_config", **changes)
    with pytest.raises(ModelError) as caught:
        models.load(str(broken), device="cpu")
    assert caught.value.message.startswith(f"config.json of {broken} cannot be used: {why}")
    assert "config.json" in str(caught.value.hint)
    assert main(["models", str(broken), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {caught.value.message}\nhint: ")


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--dtype", "float8", "dtype 'float8'; expected auto"),
        ("--device", "cuda:x", "device 'cuda:x'; expected auto"),
        ("--device", "cpu:1", "device 'cpu:1'; expected auto"),
        ("--attn", "flash", "attention 'flash'; expected sdpa"),
    ],
)
@pytest.mark.parametrize("command", ["run", "profile", "calibrate", "sweep"])
def test_a_word_that_names_nothing_is_refused_before_anything_is_read(
    command: str, option: str, value: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--out", str(tmp_path / "out")] if command in ("calibrate", "sweep") else []
    words = [command, "--image", "nowhere.png", "--prompt", "x", *more, option, value]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0].startswith(f"error: {named}")
    assert "config:" not in err


def test_a_processor_argument_of_a_wrong_kind_is_one_short_line(
    loaded: models.LoadedModel, images: tuple[object, ...]
) -> None:
    for word, kinds in (('size="wide"', "int"), ("do_resize=7", "bool"), ("image_mean=[1]", "float")):
        given = dataclasses.replace(loaded, options=LoadOptions(processor_arg=(word,)))
        with pytest.raises(UsageError) as caught:
            models.prepare(given, images[:1], "what?")  # type: ignore[arg-type]
        assert f"processor argument {word} is of no kind" in caught.value.message
        assert len(caught.value.message) < 140
        assert kinds in str(caught.value.hint)
        assert "NoneType" not in str(caught.value.hint)


def test_what_the_processor_says_of_a_value_is_cut_short(loaded: models.LoadedModel, images) -> None:
    given = dataclasses.replace(loaded, options=LoadOptions(processor_arg=("resample=99",)))
    with pytest.raises(ImageError, match=r"refuses the prompt: .*99") as caught:
        models.prepare(given, images[:1], "what?")
    assert len(caught.value.message) < 200 + len(loaded.name)
    assert caught.value.hint == "check --processor-arg resample=99"


def test_no_hint_names_an_argument_that_the_processor_may_lack(loaded: models.LoadedModel) -> None:
    with pytest.raises(UsageError) as caught:
        LoadOptions(processor_arg=("size",)).check()
    example = str(caught.value.hint).partition("--processor-arg ")[2].partition("=")[0]
    assert example in loaded.processor.image_processor.valid_kwargs.__annotations__
    assert "max_pixels" not in str(caught.value.hint)


@pytest.fixture
def photo(tmp_path: Path) -> str:
    Image.new("RGB", (90, 60), "red").save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.mark.parametrize("named", [7, 288, 999_999])
def test_a_config_and_a_processor_that_disagree_on_the_image_token(broken: Path, images, named: int) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"image_token_index": named}))
    loaded = models.load(str(broken), device="cpu")
    own = config["image_token_index"]
    told = (
        f"config.json of {broken} names token {named} for its images, and its processor puts {own} (<image>)"
    )
    with pytest.raises(ModelError) as caught:
        models.prepare(loaded, images[:1], "what?")
    assert caught.value.message == told


def test_an_image_reduced_in_vain_is_noted(loaded: models.LoadedModel, photo: str) -> None:
    reduced, whole = (models.prepare(loaded, [load_image(photo, most)], "what?") for most in (400, None))
    assert reduced.vision_tokens == whole.vision_tokens
    assert (
        f"reducing saved no vision tokens: at full size there are {whole.vision_tokens}, too" in reduced.notes
    )
    assert not any("reducing" in note for note in whole.notes)
