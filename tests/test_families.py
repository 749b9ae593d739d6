"""Every type of transformers' image-text-to-text mapping is proven, or refused by what fails on it."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import laws
import pytest
import transformers
from families import FAMILIES as ROWS
from families import IMAGE, KIN, RELATIVES, as_prompt, load
from processors import PROCESSORS
from transformers import (
    CONFIG_MAPPING,
    Florence2Config,
    GPT2Config,
    Idefics2Config,
    LlavaConfig,
    MistralConfig,
    VisionEncoderDecoderConfig,
    ViTConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from plphp_cli import families, models
from plphp_cli.attention import prune
from plphp_cli.card import describe
from plphp_cli.cli.app import main
from plphp_cli.errors import RefusedModelError
from plphp_cli.families import Assumption
from plphp_cli.prefilling import prefill
from plphp_cli.support import LINEAR, check_model, layer_kinds

ALL = [*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
STATED = {name for family in families.FAMILIES for name in family.types}
# What this version of transformers has of them; the newest has them all.
PROVEN = STATED & {*ROWS, *RELATIVES, *KIN}
NEWEST = transformers.__version__.startswith("5.24.")
# Older transformers make no such config without its parts.
PARTLESS = {
    "vision-encoder-decoder": lambda: VisionEncoderDecoderConfig(
        encoder=ViTConfig().to_dict(), decoder=GPT2Config().to_dict()
    )
}
# Proven types whose defaults are no model's: they name no image token, or have a window on every layer.
NOT_BY_DEFAULT = {"idefics2": "NO_FULL"} | dict.fromkeys(
    ("chameleon", "emu3", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), "IMAGE_TOKEN"
)
OF_TWO_PROMPTS = (laws.a_failed_call_does_not_spoil_the_next, laws.no_state_is_left_behind)
README = Path(__file__).parents[1] / "README.md"


@cache
def proven_by(name):
    return load(name).model.config.model_type


def default_config(name):
    return PARTLESS.get(name, CONFIG_MAPPING[name])()


def failed(name):
    """The assumption that fails on a type's default config; None if none does."""
    try:
        check_model(default_config(name))
    except RefusedModelError as error:
        return error.assumption
    return None


@pytest.mark.parametrize("law", laws.OF_EVERY_MODEL, ids=lambda law: law.__name__)
def test_law_on_relatives(law, relative):
    law(relative)


@pytest.mark.parametrize("law", laws.OF_EVERY_MODEL, ids=lambda law: law.__name__)
def test_law_on_kin(law, kin):
    law(kin if law in OF_TWO_PROMPTS else replace(kin, prompts=kin.prompts[:1]))


def tokens_of_images(ids):
    """Image tokens of each image in a prompt [1, N]: between two stands more than a single marker."""
    shown = "".join("01"[token == IMAGE] for token in ids[0].tolist())
    return [run.count("1") for run in re.findall("1(?:0?1)*", shown)]


@pytest.mark.parametrize("name", [name for name in (*ROWS, *RELATIVES, *KIN) if name != "builtin"])
def test_the_tokens_of_each_image_are_told_apart_where_the_table_says_so(name):
    row = load(name)
    inputs = row.prompts[0]
    with prune(row.model, None) as pruner:
        spans = prefill(row.loaded, as_prompt(inputs), pruner).state.vision.spans
    expected = tokens_of_images(inputs["input_ids"])
    assert len(expected) > 1
    assert (spans and [stop - start for start, stop in spans]) == (expected if row.tells_images else None)


def test_each_proven_type_has_a_row_and_each_row_is_of_a_proven_type():
    rows = {proven_by(name) for name in (*ROWS, *RELATIVES, *KIN)}
    assert rows == PROVEN
    assert STATED == PROVEN or not NEWEST
    brief = {name for family in families.FAMILIES for name in family.brief}
    assert brief & PROVEN == {proven_by(name) for name in (*RELATIVES, *KIN)}
    assert {proven_by(name) for name in PROCESSORS} == PROVEN - brief
    assert not set(families.REFUSED) & STATED
    assert len(STATED) == sum(len(family.types) for family in families.FAMILIES)


@pytest.mark.parametrize("name", [*ROWS, *RELATIVES, *KIN])
def test_a_row_is_taken_for_its_family_and_tells_images_as_the_table_says(name):
    row = load(name)
    family = check_model(row.model.config)
    assert row.tells_images == (family.features == families.IMAGE)
    kinds = layer_kinds(row.model.config)
    assert (LINEAR in kinds) == any(word in family.traits for word in ("linear", "convolutions"))


@pytest.mark.parametrize("name", [name for name in ALL if name not in PROVEN])
def test_a_type_that_is_not_proven_is_refused_before_its_weights_are_looked_for(name, tmp_path):
    default_config(name).save_pretrained(tmp_path)
    with pytest.raises(RefusedModelError) as error:
        models.load(str(tmp_path), device="cpu")
    message, assumption = error.value.message, Assumption[error.value.assumption]
    assert message.startswith(f"model type {name} cannot be pruned: {assumption}")
    assert "\n" not in message
    assert error.value.hint


def test_the_defaults_of_proven_types_hold_the_assumptions_or_say_which_not():
    found = {name: failed(name) for name in sorted(PROVEN)}
    assert {name: why for name, why in found.items() if why} == {
        name: why for name, why in NOT_BY_DEFAULT.items() if name in PROVEN
    }


@pytest.mark.parametrize(
    "config",
    [Idefics2Config, lambda: LlavaConfig(text_config=MistralConfig(sliding_window=4096))],
    ids=["idefics2", "llava"],
)
def test_a_window_on_every_layer_is_told_with_what_can_be_done(config):
    with pytest.raises(RefusedModelError, match="sliding_window = 4096") as error:
        check_model(config())
    assert error.value.assumption == "NO_FULL"
    assert "stay within 4096 tokens" in error.value.hint
    whole = config()
    whole.text_config.sliding_window = None
    assert check_model(whole) is not None


def test_a_decoder_without_any_attention_layer_is_told_by_kind():
    text = {"num_hidden_layers": 2, "layer_types": ["linear_attention"] * 2}
    config = CONFIG_MAPPING["qwen3_5"](text_config=text)
    with pytest.raises(RefusedModelError, match=r"no full-attention layer.*all are linear"):
        check_model(config)


def test_a_type_not_known_here_works_and_says_that_it_is_not_proven(toy, images, monkeypatch, capsys):
    asked = ["--model", toy, "--image", images[0].path, "--prompt", "what?", "--max-new-tokens", "3"]
    asked += ["--device", "cpu"]
    assert main(["run", *asked]) == 0
    assert "not proven" not in capsys.readouterr().err
    monkeypatch.setattr(families, "FAMILIES", ())
    assert main(["run", *asked]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "pruning is not proven on model type llava" in told
    assert "--compare-stock" in told
    card = describe(toy, device="cpu")
    assert (card.family, card.brief) == (None, False)
    assert any("not proven" in note for note in card.notes)
    assert main(["models", toy]) == 0
    assert "family none, and not proven" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["run", "profile", "sweep", "calibrate", "models"])
def test_every_command_refuses_a_type_alike(command, images, tmp_path, capsys):
    Florence2Config().save_pretrained(tmp_path)
    asked = ["--model", str(tmp_path), "--image", images[0].path, "--prompt", "what?"]
    more = {
        "calibrate": ["--out", str(tmp_path / "config.json.new")],
        "sweep": ["--out", str(tmp_path / "out")],
    }
    given = [str(tmp_path)] if command == "models" else [*asked, *more.get(command, [])]
    assert main([command, *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: model type florence2 cannot be pruned: an encoder-decoder" in " ".join(err.split())
    assert "\nhint: " in err


def between(mark):
    _, _, rest = README.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    return rest.partition(f"\n<!-- /{mark} -->")[0]


def test_the_readme_holds_the_table():
    assert between("families") == families.table(), "python -m plphp_cli.families"


def test_the_readme_names_each_refused_type_by_the_assumption_that_fails():
    refused = {}
    for name in ALL:
        if name not in STATED:
            refused.setdefault(Assumption[failed(name)], []).append(f"`{name}`")
    expected = "\n".join(f"| {why} | {', '.join(sorted(names))} |" for why, names in sorted(refused.items()))
    rows = dict(re.findall(r"^\| (.+) \| (`.+) \|$", between("refused"), re.MULTILINE))
    told = {name for row in rows.values() for name in row.split(", ")}
    assert {name for names in refused.values() for name in names} <= told, expected
    # Older transformers lay out the cache of some in another way.
    if NEWEST:
        assert {why: set(row.split(", ")) for why, row in rows.items()} == {
            why: set(names) for why, names in refused.items()
        }, expected
