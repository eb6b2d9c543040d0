"""Packed lists of two implementations, compared."""

from collections.abc import Iterable, Sequence

import torch

from mdkv_vllm.core.allocate import Allocation
from mdkv_vllm.core.formats import FormatSet, PageGeometry
from mdkv_vllm.core.kernels import ReferenceKernels
from mdkv_vllm.core.packing import unpack_list


class ChosenBefore(ReferenceKernels):
    """The reference, which packs what another implementation has chosen for each layer."""

    def __init__(self, allocations: Iterable[Allocation]) -> None:
        self._allocations = list(allocations)

    def allocate(
        self,
        losses: Sequence[torch.Tensor],
        formats: FormatSet,
        budgets: Sequence[Sequence[int]],
    ) -> list[Allocation]:
        """The next layers' choices, whatever their losses."""
        return [self._allocations.pop(0) for _ in losses]


def assert_nearly_the_same_lists(
    found: torch.Tensor,
    expected: torch.Tensor,
    formats: FormatSet,
    choice: torch.Tensor,
    geometry: PageGeometry,
) -> None:
    """Equal but for what another order of sums moves: codes on a threshold, last bits of scales."""
    first = 0
    for chosen in choice:
        for index, fmt in enumerate(formats.formats):
            count = int((chosen == index).sum())
            own = slice(first, first + fmt.pages(count))
            first = own.stop
            assert count == 0 or (found[own] != expected[own]).float().mean() < 1e-2
            read, wanted = (unpack_list(x[own], count, fmt, geometry) for x in (found, expected))
            for ours, theirs in zip(read, wanted, strict=True):
                assert (ours - theirs).norm() <= 1e-2 * theirs.norm()
    assert torch.equal(found[first:], expected[first:])
