"""Compression on a device waits for nothing, shown on torch's meta device.

That device has no data: whatever asks for a value, or for a size that depends on one, fails. What
torch does there without complaint, and would wait for on a GPU, is refused. No kernel is launched.
"""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.compress import Compressor
from mdkv_vllm.core.formats import PageGeometry, parse_formats
from mdkv_vllm.core.heads import HeadBudgets
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.losses import LOSSES
from mdkv_vllm.core.prompt import PagedTokens
from mdkv_vllm.kernels.triton.compress import TritonKernels
from mdkv_vllm.testing.plans import whole_prompt

DEVICE = torch.device("meta")
LAYERS, HEADS, GROUP, TOKENS, WINDOW, SIZE = 3, 2, 2, 400, 8, 64


class OneDevice(TorchDispatchMode):
    """Refuses operations between host and device, but for copies that are not waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, made)) if isinstance(x, torch.Tensor)]
        if len({x.device for x in tensors}) > 1 and not (kwargs or {}).get("non_blocking"):
            raise AssertionError(f"{func} waits")
        return made


def _host_only(make):
    def tensor(*arguments, device=None, **options):
        assert device in (None, torch.device("cpu")), "numbers are copied to the device"
        return make(*arguments, **options)

    return tensor


FREE = {"view", "_unsafe_view", "as_strided", "slice", "select", "unsqueeze", "squeeze", "expand"}
FREE |= {"transpose", "permute", "t", "detach", "alias", "unbind", "split", "empty", "empty_like"}
FREE |= {"empty_strided", "new_empty", "lift_fresh"}


class Launches(OneDevice):
    """Counts what a GPU would have to launch: operations but for views and memory."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = super().__torch_dispatch__(func, types, args, kwargs)
        on_device = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        name = func.overloadpacket.__name__
        if name not in FREE and any(x.device == DEVICE for x in on_device):
            self.operations.append(name)
        return made


def compress(names, kernels, by_head=False, mode=None, layers=LAYERS):
    """Compress twice; the second time, what stays on the device is there."""
    geometry = PageGeometry(16, SIZE, torch.bfloat16)
    formats = parse_formats(names, geometry)
    layout = LeaseLayout(geometry, formats, layers, HEADS, 0)
    floor = None if formats.drop else formats.formats[0].tokens_per_page
    segment = whole_prompt(TOKENS, 16, WINDOW, 0.5, layout.min_blocks, floor)
    basis = Basis(*torch.rand(2, layers, HEADS, SIZE, 16)) if formats.uses_basis else None
    budgets = HeadBudgets(torch.rand(layers, HEADS), 0.67) if by_head else None
    compressor = Compressor(layout, LOSSES["hybrid"], 0.125, basis, budgets, kernels)
    kv_cache = torch.empty(40, layers * HEADS, 16, 2 * SIZE, device=DEVICE, dtype=torch.bfloat16)
    tokens = PagedTokens(kv_cache, torch.empty(40, device=DEVICE).int(), TOKENS, HEADS)
    queries = torch.empty(layers, HEADS * GROUP, WINDOW, SIZE, device=DEVICE)
    with mock.patch.object(JITFunction, "run", return_value=None) as run:
        compressor.compress(tokens, queries, segment)
        run.reset_mock()
        with mode or OneDevice(), mock.patch("torch.tensor", _host_only(torch.tensor)):
            found = compressor.compress(tokens, queries, segment, True)
    return found, run.call_count


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(
    "names", [("drop", "i4", "i8", "full"), ("i2", "i4", "i8", "full"), ("drop", "r8", "r16i8")]
)
def test_nothing_waits_for_the_device(names, by_head):
    found, _ = compress(names, TritonKernels(), by_head)
    chosen = [getattr(a, name) for a in found.allocations for name in vars(a)]
    assert {x.device for x in (found.pages, found.tokens, *chosen)} == {DEVICE}


@pytest.mark.parametrize("by_head", [False, True])
def test_launches(by_head):
    """As many for 32 layers as for two; views are free."""
    counted = []
    for layers in (2, 32):
        mode = Launches()
        names = ("drop", "i4", "i8", "full")
        _, kernels = compress(names, TritonKernels(), by_head, mode, layers)
        counted.append((kernels, len(mode.operations)))
    assert counted[0] == counted[1], mode.operations
    kernels, operations = counted[1]
    # Twelve of them once a prompt: its pages, and the page table.
    assert kernels <= 25
    assert kernels + operations <= 44, " ".join(mode.operations)


FAULTS = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool(x.any()),
    "mask": lambda x: x[x > 0],
    "nonzero": torch.nonzero,
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "copy to the host": torch.Tensor.cpu,
    "list": torch.Tensor.tolist,
    "numbers copied": lambda x: torch.tensor([1, 2], device=x.device),
    "tensor copied": lambda x: torch.zeros(2).to(x.device),
    "index on the host": lambda x: x[torch.tensor([0, 1])],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_waits_is_found(fault):
    class Waiting(TritonKernels):
        def allocate(self, losses, formats, budgets):
            FAULTS[fault](losses)
            return super().allocate(losses, formats, budgets)

    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        compress(("drop", "i4", "i8"), Waiting())
