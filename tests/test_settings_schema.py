"""The schema of the settings accepts exactly what the settings accept."""

from dataclasses import fields

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.config import ConfigError, MixedDimConfig
from mdkv_vllm.settings_schema import settings_schema

SCHEMA = settings_schema()
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)

# Around every border, and of every wrong type. 1.0 is left out: JSON has one kind of number.
NUMBERS = [-1, 0, 1, 2, 4, 5, 1023, 1024, 1025, 10**9, -0.5, 1e-9, 0.25, 0.999, 1.001, 3.5, 4.5]
OTHERS = [None, True, False, "", "1", [], {}]
FORMATS = ["drop", "full", "i2", "i3", "i4", "i8", "r0", "r4", "r04", "r6", "r16", "r100", "r1020",
           "r1022", "r1024", "r1028", "r32i8", "r32i3", "i8r32", "paper", "", " full"]  # fmt: skip
STRINGS = ["default", "paper", "none", "hybrid", "pooled", "solo", "mean", "prompt", "even", "/a",
           "auto", "cpu", "triton", "cuda", "flash", "xformers", "sdpa"]  # fmt: skip
VALUES = st.sampled_from([*NUMBERS, *OTHERS])
LISTS = st.lists(st.sampled_from(FORMATS), max_size=4) | st.lists(
    st.sampled_from(["drop", "full", "i4", "r16", "r32i8"]), max_size=4, unique=True
)
BY_NAME = {
    "formats": st.sampled_from(["default", "paper", "none"]) | LISTS | VALUES,
    "loss": st.sampled_from(["hybrid", "pooled", "solo", "paper", "mean"]) | VALUES,
    "basis": st.sampled_from(["prompt", "/artifacts/basis.safetensors"]) | VALUES,
    "heads": st.sampled_from(["even", "/artifacts/heads.safetensors"]) | VALUES,
}
NAMES = [field.name for field in fields(MixedDimConfig)]
BLOCKS = st.fixed_dictionaries(
    {}, optional={name: BY_NAME.get(name, VALUES) for name in [*NAMES, "budgt"]}
)
# Few settings at a time, or hardly any block is right.
FEW = st.lists(st.sampled_from([*NAMES, "budgt"]), max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: BY_NAME.get(name, VALUES) for name in names})
)


def accepted(block):
    try:
        MixedDimConfig.from_additional_config({"mixeddim": block})
    except ConfigError:
        return False
    return True


def test_every_setting_is_in_the_schema():
    assert list(SCHEMA["properties"]) == NAMES
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", [*NAMES, "budgt"])
@pytest.mark.parametrize("value", [*NUMBERS, *OTHERS, *STRINGS, *([name] for name in FORMATS)])
def test_each_setting_at_its_borders(name, value):
    assert VALIDATOR.is_valid({name: value}) == accepted({name: value})


@pytest.mark.parametrize(
    ("block", "allowed"),
    [
        ({"budget": 0.5, "budget_tokens": 100}, False),
        ({"budget": None, "budget_tokens": 100}, True),
        ({"budget": 0.5, "window": 16}, True),
        ({"formats": ["full", "full"]}, False),
        ({"formats": []}, False),
        ({"basis": "prompt"}, False),
        ({"basis": "prompt", "formats": ["drop", "i4", "full"]}, False),
        ({"basis": "prompt", "formats": ["drop", "r16i8", "full"]}, True),
        ({"basis": "prompt", "formats": "paper"}, True),
        ({"basis": "prompt", "formats": "paper", "segments": "rolling"}, False),
        ({"basis": "prompt", "formats": "paper", "segments": "auto"}, True),
        ({"segments": "rolling", "segment_tokens": 64, "window": 1024}, True),
        ({"heads": "even", "head_share": 0.5}, False),
        ({"heads": "even", "head_power": 0.5}, False),
        ({"heads": "even", "head_power": None}, True),
        ({"heads": "/a.safetensors", "head_share": 0.5}, True),
    ],
)
def test_settings_that_depend_on_each_other(block, allowed):
    assert VALIDATOR.is_valid(block) == accepted(block) == allowed


@given(FEW | BLOCKS)
def test_the_schema_accepts_what_the_settings_accept(block):
    assert VALIDATOR.is_valid(block) == accepted(block)


@given(st.integers(0, 1100), st.sampled_from(["", "i2", "i8"]))
def test_ranks(rank, bits):
    block = {"formats": ["full", f"r{rank}{bits}"]}
    assert VALIDATOR.is_valid(block) == accepted(block)
