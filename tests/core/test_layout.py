import torch
from hypothesis import given
from hypothesis import strategies as st

from mdkv_vllm.core.formats import PageGeometry, parse_formats
from mdkv_vllm.core.layout import LeaseLayout


@given(
    st.integers(1, 12),
    st.integers(1, 8),
    st.sampled_from(
        [("drop", "i4", "full"), ("i2", "i4", "i8", "full"), ("drop", "r8", "r16", "full")]
    ),
    st.sampled_from([0, 16]),
    st.integers(0, 6),
)
def test_lists_tile_the_lease_without_gaps(layers, heads, names, basis_rank, extra_blocks):
    geometry = PageGeometry(16, 64, torch.bfloat16)
    layout = LeaseLayout(geometry, parse_formats(names, geometry), layers, heads, basis_rank)
    blocks = layout.min_blocks + extra_blocks
    budgets = layout.list_pages_per_layer(blocks)
    assert int(budgets.sum()) == layout.list_pages(blocks)
    assert int(budgets.max() - budgets.min()) <= 1
    tokens = torch.randint(0, 200, layout.table_shape[:3])
    table = layout.page_table(tokens)
    assert table.dtype == torch.int32
    assert torch.equal(table[..., 0].long(), tokens)
    expected = layout.lists_first_page
    for entry in table.view(-1, len(layout.formats.formats), 2):
        for fmt, (count, first) in zip(layout.formats.formats, entry.tolist(), strict=True):
            assert first == expected
            expected += fmt.pages(count)


@given(st.integers(1, 80), st.integers(1, 8), st.sampled_from([0, 16]))
def test_plans_do_not_depend_on_how_layers_are_split(layers, heads, basis_rank):
    """A plan takes nothing of the layout but this: pipeline stages plan as the scheduler does."""
    geometry = PageGeometry(16, 64, torch.bfloat16)
    formats = parse_formats(("i2", "i4", "i8", "r16", "r32i8", "full"), geometry)
    one = LeaseLayout(geometry, formats, 1, 1, basis_rank)
    layout = LeaseLayout(geometry, formats, layers, heads, basis_rank)
    assert layout.min_blocks == one.min_blocks


def test_page_table_fits_its_pages_and_the_first_block():
    geometry = PageGeometry(16, 64, torch.bfloat16)
    formats = parse_formats(("i2", "i4", "i8", "full"), geometry)
    layout = LeaseLayout(geometry, formats, 30, 3)
    assert layout.table_pages == 1
    assert layout.table_pages < layout.pages_per_block
