import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.core.formats import (
    DESCRIPTOR,
    FormatError,
    Kind,
    PageGeometry,
    Rotation,
    parse_format,
    parse_formats,
)

ROOT = Path(__file__).parents[2]

geometries = st.builds(
    PageGeometry,
    st.sampled_from([16, 32, 128]),
    st.sampled_from([32, 64, 80, 96, 128, 256]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
names = st.sampled_from(["full", "r4", "r8", "r16", "i8", "i4", "i2", "r16i8", "r8i4", "r4i2"])


@given(geometries, names)
def test_tokens_fit_the_page_and_one_more_would_not(geometry, name):
    fmt = parse_format(name, geometry)
    scale = 4 if fmt.quantized else 0
    used = 2 * fmt.section_bytes + scale * fmt.tokens_per_page
    assert fmt.used_bytes == used <= geometry.page_bytes
    one_more_byte_row = 2 * fmt.rank * fmt.bits / 8 + scale
    assert used + fmt.codes_per_byte * one_more_byte_row > geometry.page_bytes
    assert fmt.tokens_per_page % fmt.codes_per_byte == 0
    assert fmt.rank * fmt.bits % 8 == 0


def test_design_example_head_size_128():
    geometry = PageGeometry(16, 128, torch.bfloat16)
    tokens = {
        n: parse_format(n, geometry).tokens_per_page for n in ("full", "r32", "r16", "i8", "i4")
    }
    assert tokens == {"full": 16, "r32": 64, "r16": 128, "i8": 31, "i4": 62}
    assert geometry.page_bytes == 8192


def test_the_descriptor_is_that_of_the_c_header():
    header = (ROOT / "csrc" / "common" / "page_format.h").read_text()
    assert tuple(re.findall(r"(?m)^  int32_t (\w+);", header)) == DESCRIPTOR
    assert f"#define MDKV_PAGE_FORMAT_FIELDS {len(DESCRIPTOR)}" in header
    for member in (*Kind, *Rotation):
        assert f"MDKV_{member.name} = {member.value}" in header


def test_descriptors():
    geometry = PageGeometry(16, 128, torch.bfloat16)
    full, i4, r32 = (
        dict(zip(DESCRIPTOR, parse_format(name, geometry).descriptor(), strict=True))
        for name in ("full", "i4", "r32")
    )
    assert (full["values_offset"], full["used_bytes"]) == (256, 8192)
    assert (i4["values_offset"], i4["scales_offset"]) == (128 * 31, 2 * 128 * 31)
    assert (i4["used_bytes"], i4["zero_halves"]) == (2 * 128 * 31 + 4 * 62, 15)
    assert r32["zero_halves"] == 0


def test_rotations():
    geometry = PageGeometry(16, 64, torch.bfloat16)
    rotation = {n: parse_format(n, geometry).rotation for n in ("full", "r32", "i8", "r32i8")}
    assert rotation == {
        "full": Rotation.IDENTITY,
        "r32": Rotation.BASIS,
        "i8": Rotation.HADAMARD,
        "r32i8": Rotation.BASIS,
    }


@pytest.mark.parametrize(
    "name", ["", "r", "i3", "r0", "r64", "r100", "r6", "drop", "ful", "i8r4", "R16"]
)
def test_wrong_names_are_refused_by_name(name):
    with pytest.raises(FormatError, match="formats"):
        parse_format(name, PageGeometry(16, 64, torch.bfloat16))


def test_sets_are_sorted_cheapest_first():
    geometry = PageGeometry(16, 64, torch.bfloat16)
    formats = parse_formats(("full", "i8", "drop", "i2"), geometry)
    assert formats.names == ("drop", "i2", "i8", "full")
    assert formats.drop


@pytest.mark.parametrize("wrong", [("i8", "i8"), ("drop",), ()])
def test_wrong_sets_are_refused(wrong):
    with pytest.raises(FormatError):
        parse_formats(wrong, PageGeometry(16, 64, torch.bfloat16))
