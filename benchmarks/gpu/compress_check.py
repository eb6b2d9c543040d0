"""Compression of fresh random prompts: every part against plain torch, and leases read back.

What the reference decides by exhaustive search (which format a token gets) is compared by its loss,
everything else by its values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from mdkv_vllm.core.allocate import Allocation, allocate_layers
from mdkv_vllm.core.allocate import allocate as exact_allocate
from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.compress import CompressedSegment, Compressor
from mdkv_vllm.core.formats import FormatSet, PageGeometry, parse_formats
from mdkv_vllm.core.heads import HeadBudgets
from mdkv_vllm.core.kernels import CompressionKernels, ReferenceKernels
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.losses import LOSSES
from mdkv_vllm.core.prompt import Prompt as LayeredPrompt
from mdkv_vllm.core.segment import Segment
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig
from mdkv_vllm.kernels.triton.compress import TritonKernels
from mdkv_vllm.testing.lists import ChosenBefore, assert_nearly_the_same_lists
from mdkv_vllm.testing.paged import paged
from mdkv_vllm.testing.plans import whole_prompt

from .call import TRITON
from .check import Outcome
from .device import no_synchronisation
from .inputs import POISON
from .reference import mixed_decode as float64_decode

REFERENCE = ReferenceKernels()
LOSSES_ERROR = 1e-2
"""Largest relative error of a head's losses, by their norm: of few moved codes."""
LOSS_MOVED = 1e-2
"""Relative error of the loss of a token whose code or scale was rounded the other way."""
CODES_MOVED = 0.02
"""Share of vectors whose codes may differ, a scale having been rounded the other way."""
MORE_LOSS = 0.15
"""How much more a pool's allocation may lose than the reference's."""
DECODED_ERROR = 1.5e-2
"""Relative error of attention over a lease: bfloat16's, and that of the codes moved."""


@dataclass(frozen=True)
class Case:
    """A prompt of a model.

    Attributes:
        names: formats.
        head_size: dimensions of a head.
        group: query heads per KV head.
        kv_heads: KV heads.
        layers: layers.
        tokens: of the prompt.
        dtype: of the cache.
        by_head: whether every head has a budget of its own.
        prompt_basis: whether the basis is the prompt's own, which torch waits for.
        budget: share of the bytes to keep.
    """

    names: tuple[str, ...] = ("drop", "i4", "i8", "full")
    head_size: int = 128
    group: int = 4
    kv_heads: int = 4
    layers: int = 3
    tokens: int = 2500
    dtype: torch.dtype = torch.bfloat16
    by_head: bool = False
    prompt_basis: bool = False
    budget: float = 0.4

    @property
    def name(self) -> str:
        """In words."""
        more = " by head" * self.by_head + " prompt basis" * self.prompt_basis
        dtype = str(self.dtype).removeprefix("torch.")
        return f"compress {self.head_size} x {self.group} {dtype} {'/'.join(self.names)}{more}"

    @property
    def formats(self) -> FormatSet:
        """The formats."""
        return parse_formats(self.names, self.geometry)

    @property
    def geometry(self) -> PageGeometry:
        """Sizes of the cache."""
        return PageGeometry(16, self.head_size, self.dtype)

    @property
    def layout(self) -> LeaseLayout:
        """The layout of its lease."""
        rank = self.formats.basis_rank if self.prompt_basis else 0
        return LeaseLayout(self.geometry, self.formats, self.layers, self.kv_heads, rank)

    @property
    def segment(self) -> Segment:
        """What is compressed, all but a window, and its lease."""
        least = self.formats.cheapest.tokens_per_page
        floor = None if self.formats.drop else least
        return whole_prompt(self.tokens, 16, 16, self.budget, self.layout.min_blocks, floor)


CASES = (
    Case(),
    Case(head_size=64, group=3, dtype=torch.float16, by_head=True),
    Case(("i2", "i4", "i8", "full"), 80, 1, by_head=True),
    Case(("drop", "r16", "r32i8", "full"), group=8),
    Case(("drop", "r8", "i4"), 256, 2, kv_heads=2, prompt_basis=True),
)


class Prompt:
    """A random prompt of a case on a device, and the kernels under test.

    Args:
        case: sizes.
        device: where.
        seed: of the numbers.
        kernels: under test.
    """

    def __init__(
        self, case: Case, device: torch.device, seed: int, kernels: CompressionKernels
    ) -> None:
        self.case, self.device, self.kernels = case, device, kernels
        self._generator = torch.Generator().manual_seed(seed)
        shape = (case.layers, 2, case.kv_heads, case.tokens, case.head_size)
        falling = torch.linspace(2, 0.2, case.head_size)
        self.cache = (self.randn(*shape) * falling).to(case.dtype)
        self.queries = self.randn(case.layers, case.kv_heads * case.group, 16, case.head_size)
        self.basis: Basis | None = None
        if case.formats.uses_basis and not case.prompt_basis:
            square = self.randn(2, case.layers, case.kv_heads, case.head_size, case.head_size)
            turned = torch.linalg.qr(square)[0][..., : case.formats.basis_rank].contiguous()
            self.basis = Basis(turned[0], turned[1])
        self.heads: HeadBudgets | None = None
        if case.by_head:
            self.heads = HeadBudgets(self.rand(case.layers, case.kv_heads), 0.67, 0.5)
        self.tokens = paged(self.cache.to(device), 16)
        self.compressor = self._compressor(kernels)

    def randn(self, *shape: int) -> torch.Tensor:
        """Normal numbers on the host."""
        return torch.randn(*shape, generator=self._generator)

    def rand(self, *shape: int) -> torch.Tensor:
        """Even numbers on the host."""
        return torch.rand(*shape, generator=self._generator)

    def check_losses(self) -> float:
        """Losses of every option, as sums over a head's tokens and one by one."""
        layers, worst = range(self.case.layers), 0.0
        for loss in ("hybrid", "paper"):
            ours = self._prompt(False, loss)
            theirs = self._prompt(True, loss)
            bases = theirs.bases(layers)
            on_device = None if bases is None else bases.to(self.device)
            found = self.kernels.layers(ours, layers, on_device).losses()
            found = torch.stack(list(found)).double().cpu()
            expected = torch.stack(list(REFERENCE.layers(theirs, layers, bases).losses())).double()
            moved = (found - expected).abs() > LOSS_MOVED * expected
            # Not those of a neighbour, which a pooled loss passes on.
            if loss == "paper":
                share = float(moved.float().mean((0, 2, 3)).max())
                assert share <= CODES_MOVED, f"{share:.1%} of the losses differ ({loss})"
            norms = expected.norm(dim=-1).clamp_min(1e-30)
            error = float(((found - expected).norm(dim=-1) / norms).max())
            worst = max(worst, error)
            assert error <= LOSSES_ERROR, f"relative error {error:.1e} ({loss})"
        return worst

    def check_allocate(self) -> float:
        """Three layers of unequal budgets in one call: pages exact, losses near the reference's."""
        formats, heads, span = self.case.formats, self.case.kv_heads, min(1000, self.case.tokens)
        losses = []
        for _ in range(3):
            weight = self.rand(1, heads, span).pow(8) * 10 + 1e-4
            shares = self.rand(len(formats.names), heads, span).sort(0, descending=True).values
            losses.append(weight * shares)
        least = 0 if formats.drop else heads * formats.cheapest.pages(span)
        most = heads * formats.richest.pages(span)
        budgets = [[least + round(f * (most - least))] for f in (0.1, 0.45, 0.25)]
        on_device = [layer.to(self.device) for layer in losses]
        found = self.kernels.allocate(on_device, formats, budgets)
        expected = allocate_layers(exact_allocate, losses, formats, budgets)
        worst = 0.0
        for layer, ours, theirs, (pages,) in zip(losses, found, expected, budgets, strict=True):
            choice = ours.choice.cpu()
            tokens = torch.stack([(choice == i).sum(1) for i in range(len(formats.formats))], 1)
            assert torch.equal(tokens, ours.tokens.cpu()), "tokens are not those of the choice"
            taken = int(formats.pages(tokens).sum())
            assert taken <= pages, f"{taken} pages of {pages}"
            option = (choice + int(formats.drop)).long().unsqueeze(0)
            lost = float(layer.double().gather(0, option).sum())
            more = lost / theirs.objective - 1
            worst = max(worst, more)
            assert more <= MORE_LOSS, f"loses {more:.0%} more than the reference"
        return worst

    def check_pack(self) -> float:
        """Pages of a random choice, with an empty list and others over several pages."""
        case, layers = self.case, range(self.case.layers)
        formats, theirs = case.formats, self._prompt(True)
        low = -1 if formats.drop else 0
        shape = case.layers, case.kv_heads, theirs.span
        choice = (self.rand(*shape) * (len(formats.formats) - low)).long() + low
        choice[:, -1] = 0
        tokens = torch.stack([(choice == i).sum(-1) for i in range(len(formats.formats))], -1)
        chosen = [Allocation(c, t, 0.0, 0.0) for c, t in zip(choice, tokens, strict=True)]
        on_device = [
            replace(a, choice=a.choice.to(self.device, torch.int8), tokens=a.tokens.to(self.device))
            for a in chosen
        ]
        needed = 2 + int(formats.pages(tokens).sum()) + 3
        pages = torch.full((needed, case.geometry.page_bytes), POISON, dtype=torch.uint8)
        first, found = torch.tensor(2), pages.clone().to(self.device)
        bases = theirs.bases(layers)
        group = self.kernels.layers(
            self._prompt(False), layers, None if bases is None else bases.to(self.device)
        )
        group.pack(on_device, found, first.to(self.device))
        REFERENCE.layers(theirs, layers, bases).pack(chosen, pages, first)
        assert torch.equal(found[:2].cpu(), pages[:2]), "wrote before the first page"
        flat = choice.flatten(0, 1)
        assert_nearly_the_same_lists(found[2:].cpu(), pages[2:], formats, flat, case.geometry)
        return 0.0

    def check_whole(self) -> float:
        """A lease without synchronising, byte for byte, and attention over it."""
        found = self._compress()
        if self.device.type == "cuda" and not self.case.prompt_basis:
            again = self._without_synchronisation()
            assert torch.equal(found.pages, again.pages), "another lease the second time"
        chosen = [
            replace(a, choice=a.choice.cpu(), tokens=a.tokens.cpu()) for a in found.allocations
        ]
        expected = self._compress(ChosenBefore(chosen))
        layout = self.case.layout
        assert torch.equal(found.tokens.cpu(), expected.tokens), "tokens of lists differ"
        tables, lists = layout.table_pages, layout.lists_first_page
        assert torch.equal(found.pages[:tables].cpu(), expected.pages[:tables]), "page table"
        if not self.case.prompt_basis:  # whose vectors another solver finds with other last bits
            choice = torch.cat([a.choice for a in chosen])
            assert_nearly_the_same_lists(
                found.pages[lists:].cpu(), expected.pages[lists:], self.case.formats, choice,
                self.case.geometry,
            )  # fmt: skip
        return self._decode(found.pages, expected.pages)

    def _compress(self, reference: CompressionKernels | None = None) -> CompressedSegment:
        """Compress with the kernels under test, or with others on the host."""
        prompt = self._prompt(reference is not None)
        compressor = self._compressor(reference) if reference else self.compressor
        return compressor.compress(prompt.load, prompt.queries, self.case.segment, True)

    def _prompt(self, reference: bool, loss: str = "hybrid") -> LayeredPrompt:
        """The prompt in a paged cache on the device; or layer by layer in float32 on the host."""
        case, basis, load = self.case, self.basis, self.tokens
        queries = self.queries if reference else self.queries.to(self.device)
        if reference:
            load = self._load
        elif basis is not None:
            basis = basis.to(self.device)
        scale = case.head_size**-0.5
        return LayeredPrompt(
            case.layout, LOSSES[loss], scale, basis, load, queries, case.segment.span_tokens
        )

    def _load(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.cache[layer].float()
        return keys, values

    def _compressor(self, kernels: CompressionKernels) -> Compressor:
        scale = self.case.head_size**-0.5
        return Compressor(
            self.case.layout, LOSSES["hybrid"], scale, self.basis, self.heads, kernels
        )

    def _without_synchronisation(self) -> CompressedSegment:
        prompt = self._prompt(False)
        with no_synchronisation():
            return self.compressor.compress(prompt.load, prompt.queries, self.case.segment)

    def _decode(self, found: torch.Tensor, expected: torch.Tensor) -> float:
        """Read both leases from a poisoned cache: ours by the kernel, the other in float64."""
        case, layout, blocks = self.case, self.case.layout, self.case.segment.num_lease_blocks
        shape = layout.pages_per_block, 16, 2 * case.head_size
        places = torch.randperm(blocks + 9, generator=self._generator)[:blocks]
        table = places.int().unsqueeze(0).to(self.device)
        caches = []
        for pages in (found, expected):
            raw = torch.full((blocks + 9, shape[0], layout.geometry.page_bytes), POISON)
            raw = raw.to(torch.uint8).to(self.device)
            raw[places.to(self.device)] = pages.to(self.device).view(blocks, shape[0], -1)
            caches.append(raw.view(case.dtype).view(-1, *shape))
        queries = 5
        rows = torch.zeros(queries, dtype=torch.int32, device=self.device)
        lengths = rows + blocks * 16
        leases = torch.tensor([[[0, blocks]]], dtype=torch.int32).to(self.device)
        basis = None if self.basis is None else self.basis.to(self.device)
        scale, worst = case.head_size**-0.5, 0.0
        kernel = TRITON.make(DecodeConfig(caches[0], layout, case.group, basis, scale, queries))
        batch = DecodeBatch(table, rows, lengths, leases)
        for layer in range(case.layers):
            query = self.randn(queries, case.kv_heads * case.group, case.head_size)
            query = query.to(case.dtype).to(self.device)
            output = torch.full_like(query, torch.nan)
            kernel.attend(query, layer, batch, output)
            right, _ = float64_decode(
                query, caches[1], layer, layout, table, rows, lengths, leases, basis, scale
            )
            error = float((output.double() - right).norm() / right.norm())
            worst = max(worst, error)
            assert error <= DECODED_ERROR, f"attention over the lease: relative error {error:.1e}"
        return worst


def check_compression(
    case: Case, device: str, seed: int, kernels: CompressionKernels | None = None
) -> Outcome:
    """Check every part and the whole; its error is that of attention over the lease."""
    prompt = Prompt(case, torch.device(device), seed, kernels or TritonKernels())
    checks = ("losses", "allocate", "pack", "whole")
    failures, error = [], math.nan
    for name in checks:
        try:
            error = getattr(prompt, f"check_{name}")()
        except AssertionError as wrong:
            failures.append(f"{name}: {wrong}")
            error = math.nan
    return Outcome(case.name, error, 0.0, tuple(failures))
