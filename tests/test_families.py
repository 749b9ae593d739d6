"""Every type of transformers' image-text-to-text mapping is proven, or refused by name from its config."""

from functools import cache
from pathlib import Path

import laws
import pytest
from families import FAMILIES as ROWS
from families import RELATIVES, load
from processors import PROCESSORS
from transformers import CONFIG_MAPPING, GPT2Config, VisionEncoderDecoderConfig, ViTConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from plphp_cli import families, models
from plphp_cli.errors import UnsupportedError
from plphp_cli.support import LINEAR, check_model, layer_kinds

PROVEN = {name for family in families.FAMILIES for name in family.types}
ALL = [*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
# Older transformers make no such config without its parts.
PARTLESS = {
    "vision-encoder-decoder": lambda: VisionEncoderDecoderConfig(
        encoder=ViTConfig().to_dict(), decoder=GPT2Config().to_dict()
    )
}
README = Path(__file__).parents[1] / "README.md"


@cache
def proven_by(name):
    return load(name).model.config.model_type


@pytest.mark.parametrize(
    "law",
    [
        laws.rate_one_equals_stock,
        laws.physical_cut_equals_masked_reference,
        laws.first_token_is_unpruned,
        laws.kept_equals_plain_loop,
        laws.bytes_are_as_predicted,
        laws.the_model_is_restored,
        laws.a_failed_call_does_not_spoil_the_next,
        laws.no_state_is_left_behind,
    ],
    ids=lambda law: law.__name__,
)
def test_law_on_relatives(law, relative):
    law(relative)


def test_each_proven_type_has_a_row_and_each_row_is_of_a_proven_type():
    rows = {proven_by(name) for name in (*ROWS, *RELATIVES)}
    assert rows == PROVEN
    assert set(ALL) >= PROVEN
    brief = {name for family in families.FAMILIES for name in family.brief}
    assert brief == {proven_by(name) for name in RELATIVES}
    assert {proven_by(name) for name in PROCESSORS} == PROVEN - brief
    assert not set(families.REFUSED) & PROVEN


@pytest.mark.parametrize("name", [*ROWS, *RELATIVES])
def test_a_row_is_taken_for_its_family_and_tells_images_as_the_table_says(name):
    row = load(name)
    family = check_model(row.model.config)
    assert row.tells_images == (family.features == families.IMAGE)
    if LINEAR in layer_kinds(row.model.config):
        assert name in ("qwen3_5", "qwen3_5_moe", "lfm2_vl")


@pytest.mark.parametrize("name", [name for name in ALL if name not in PROVEN])
def test_a_type_that_is_not_proven_is_refused_before_its_weights_are_looked_for(name, tmp_path):
    PARTLESS.get(name, CONFIG_MAPPING[name])().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError) as error:
        models.load(str(tmp_path), device="cpu")
    message = error.value.message
    assert "\n" not in message
    assert name in message or CONFIG_MAPPING[name].__name__ in message, message


def test_the_readme_holds_the_table():
    _, _, rest = README.read_text(encoding="utf-8").partition("<!-- families -->\n")
    assert rest.partition("\n<!-- /families -->")[0] == families.table(), "python -m plphp_cli.families"
