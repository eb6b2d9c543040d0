"""The C++ packer against mdkv_vllm.core.packing."""

import pytest
import torch

from mdkv_vllm.core.formats import PageFormat, PageGeometry, parse_format
from mdkv_vllm.core.packing import pack_list, unpack_list
from mdkv_vllm.kernels.cpu.formats import pack_pages

NAMES = ["r16", "r4", "r32i8", "i8", "i4", "i2", "r12i2", "full"]
GEOMETRIES = [
    PageGeometry(16, 64, torch.bfloat16),
    PageGeometry(16, 128, torch.float16),
    PageGeometry(32, 80, torch.float32),
    PageGeometry(128, 64, torch.bfloat16),
]


def pack(
    keys: torch.Tensor,
    values: torch.Tensor,
    counts: list[int],
    fmt: PageFormat,
    geometry: PageGeometry,
) -> list[torch.Tensor]:
    """Pack lists with the kernel into poisoned pages; one tensor of pages per list."""
    per_list = [fmt.pages(count) for count in counts]
    pages = torch.full((sum(per_list), geometry.page_bytes), 0xFF, dtype=torch.uint8)
    pack_pages(keys, values, torch.tensor(counts, dtype=torch.int32), fmt, geometry, pages)
    return list(pages.split(per_list))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_matches_reference(name: str, geometry: PageGeometry):
    torch.manual_seed(1)
    fmt = parse_format(name, geometry)
    capacity = fmt.tokens_per_page
    counts = [0, 1, capacity - 1, capacity, capacity + 1, 3 * capacity + 5, 0]
    keys = torch.randn(len(counts), max(counts), fmt.rank) * 3
    values = torch.randn(len(counts), max(counts), fmt.rank)
    for index, packed in enumerate(pack(keys, values, counts, fmt, geometry)):
        mine = keys[index, : counts[index]], values[index, : counts[index]]
        expected = pack_list(*mine, fmt, geometry)
        if fmt.bits >= 8:
            assert torch.equal(packed, expected)
            continue
        # The root mean square is summed in another order, which moves a code that lies on a
        # threshold: few bytes may differ, and the vectors hardly.
        differ = (packed != expected).float().mean() if packed.numel() else torch.zeros(())
        assert differ < 1e-3
        read = unpack_list(packed, counts[index], fmt, geometry)
        wanted = unpack_list(expected, counts[index], fmt, geometry)
        for ours, theirs, exact in zip(read, wanted, mine, strict=True):
            error, reference = (ours - exact).norm(), (theirs - exact).norm()
            assert error <= reference * 1.001 + 1e-6


@pytest.mark.parametrize("name", ["i8", "i4", "i2"])
def test_zero_and_tiny_vectors(name: str):
    geometry = GEOMETRIES[0]
    fmt = parse_format(name, geometry)
    keys = torch.zeros(1, 5, fmt.rank)
    keys[0, 1] = 1e-38
    keys[0, 2, 3] = 5.0
    (packed,) = pack(keys, keys, [5], fmt, geometry)
    assert torch.equal(packed, pack_list(keys[0], keys[0], fmt, geometry))


def test_wrong_arguments_are_named():
    geometry = GEOMETRIES[0]
    fmt = parse_format("i8", geometry)
    rows, counts = torch.zeros(1, 40, 64), torch.tensor([40], dtype=torch.int32)
    pages = torch.zeros(2, geometry.page_bytes, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="keys: "):
        pack_pages(rows.double(), rows, counts, fmt, geometry, pages)
    with pytest.raises(RuntimeError, match="values: "):
        pack_pages(rows, rows[:, :3].contiguous(), counts, fmt, geometry, pages)
    with pytest.raises(RuntimeError, match="counts: "):
        pack_pages(rows, rows, counts + 1, fmt, geometry, pages)
    with pytest.raises(RuntimeError, match="pages: "):
        pack_pages(rows, rows, counts, fmt, geometry, pages[:1])
