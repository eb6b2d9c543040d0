"""MixedDimKV as the server does it, read back from the bytes of its lease."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mdkv_vllm.artifacts.store import load_basis, load_head_budgets
from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.compress import CompressedPrompt, Compressor
from mdkv_vllm.core.formats import PageGeometry, Rotation
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.losses import LOSSES
from mdkv_vllm.core.packing import unpack_list
from mdkv_vllm.core.plan import LeasePlan
from mdkv_vllm.core.reference import read_page_table, read_prompt_basis, to_full
from mdkv_vllm.kernels.cpu.compress import CpuKernels
from mdkv_vllm.models.held_cache import BLOCK_TOKENS, HeldCache, Prefill, full_cache
from mdkv_vllm.models.in_process import InProcessModel
from mdkv_vllm.policy import Policy


@dataclass(frozen=True)
class MixedDim:
    """Compress with the server's own code and settings.

    Attributes:
        name: how reports call it.
        settings: ``MixedDimConfig`` fields other than the budget.
    """

    name: str
    settings: dict[str, object] = field(default_factory=dict)
    fixed_shares: tuple[float, ...] = ()

    def apply(self, model: InProcessModel, prefill: Prefill, budget: float) -> HeldCache:
        """See :class:`mdkv_vllm.eval.methods.Method`."""
        config = MixedDimConfig(budget=budget, **self.settings)  # type: ignore[arg-type]
        # Bytes are counted against a 16-bit cache whatever the model computes in.
        dtype = torch.float16 if model.dtype == torch.float16 else torch.bfloat16
        geometry = PageGeometry(BLOCK_TOKENS, model.head_size, dtype)
        policy = Policy(config, geometry, model.num_layers, model.num_kv_heads)
        plan = policy.plan(prefill.num_tokens)
        if not isinstance(plan, LeasePlan):
            return full_cache(prefill)
        basis = self._basis(model, policy)
        sizes = (model.num_layers, model.num_kv_heads)
        heads = load_head_budgets(config, str(model.folder), sizes)
        compressor = Compressor(
            policy.layout, LOSSES[config.loss], model.scale, basis, heads, CpuKernels()
        )
        result = compressor.compress(
            lambda layer: (prefill.keys[layer].float(), prefill.values[layer].float()),
            prefill.queries[:, :, -config.window :].float(),
            plan,
            keep_allocations=True,
        )
        return read_back(prefill, result, plan, policy.layout, basis)

    def _basis(self, model: InProcessModel, policy: Policy) -> Basis | None:
        if not policy.formats.uses_basis or policy.prompt_basis:
            return None
        path = policy.config.basis_path(str(model.folder))
        sizes = (model.num_layers, model.num_kv_heads, model.head_size)
        return load_basis(path, str(model.folder), sizes).truncate(policy.formats.basis_rank)


def read_back(
    prefill: Prefill,
    result: CompressedPrompt,
    plan: LeasePlan,
    layout: LeaseLayout,
    basis: Basis | None,
) -> HeldCache:
    """Put every token of a packed lease back in its place.

    Args:
        prefill: the prompt.
        result: its lease, with the allocations kept.
        plan: its plan.
        layout: what leases look like.
        basis: the calibrated basis in use, if any.
    """
    formats = layout.formats
    keys, values = prefill.keys.float().clone(), prefill.values.float().clone()
    kept = torch.ones(keys.shape[:3], dtype=torch.bool)
    chosen = torch.full(
        keys.shape[:3],
        formats.names.index("full") if "full" in formats.names else len(formats.names),
    )
    if layout.prompt_basis_rank:
        basis = read_prompt_basis(result.pages, layout)
    table = read_page_table(result.pages, layout)
    for layer, allocation in enumerate(result.allocations):
        kept[layer, :, : plan.span_tokens] = allocation.choice >= 0
        chosen[layer, :, : plan.span_tokens] = allocation.choice + int(formats.drop)
        for head, choice in enumerate(allocation.choice):
            for index, fmt in enumerate(formats.formats):
                count, first = table[layer, head, index].tolist()
                pages = result.pages[first : first + fmt.pages(count)]
                low = unpack_list(pages, count, fmt, layout.geometry)
                places = (choice == index).nonzero().squeeze(1)
                for held, vectors, side in ((keys, low[0], "keys"), (values, low[1], "values")):
                    directions = None
                    if fmt.rotation is Rotation.BASIS:
                        directions = getattr(basis, side)[layer, head]
                    held[layer, head, places] = to_full(vectors, fmt, directions).float()
    # In whole blocks, as the peers are counted.
    blocks = -(-prefill.num_tokens // plan.block_size)
    share = (blocks - plan.first_lease_block) / blocks
    return HeldCache(keys, values, kept, share, chosen)
