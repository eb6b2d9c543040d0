"""What was measured of a model beforehand, cut to one rank's heads."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import VllmConfig

from mdkv_vllm.artifacts.store import load_basis, load_head_budgets
from mdkv_vllm.config import ConfigError
from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.heads import HeadBudgets
from mdkv_vllm.policy import Policy


@dataclass(frozen=True)
class RankArtifacts:
    """A rank's part of the files beside a model.

    Attributes:
        basis: the calibrated basis, None where none is needed.
        heads: how heads share a lease's pages; None for evenly by layer.
    """

    basis: Basis | None
    heads: HeadBudgets | None

    @classmethod
    def load(cls, policy: Policy, vllm_config: VllmConfig, rank: int) -> RankArtifacts:
        """Read what a policy needs.

        Args:
            policy: the settings applied to the model.
            vllm_config: names the model and the numbers of stages and ranks.
            rank: the worker's number.

        Raises:
            ConfigError: a file is missing, or was made for another model.
        """
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        ranks = parallel.tensor_parallel_size
        layers = slice(*model.get_layers_start_end_indices(parallel))
        sizes = model.get_total_num_hidden_layers(), total_kv_heads(policy, vllm_config)
        if policy.other_layers:  # full-attention layers alone, of which a stage has all
            layers, sizes = slice(policy.num_layers), (policy.num_layers, sizes[1])
        own = layers, heads_of_rank(rank % ranks, ranks, sizes[1], policy.num_kv_heads)
        heads = load_head_budgets(policy.config, model.model, sizes)
        return cls(
            _load_basis(policy, model.model, sizes, own),
            None if heads is None else heads.of_part(*own),
        )


def _load_basis(
    policy: Policy, model: str, sizes: tuple[int, int], own: tuple[slice, slice]
) -> Basis | None:
    formats = policy.formats
    if not formats.uses_basis or policy.prompt_basis:
        return None
    path = policy.config.basis_path(model)
    if not path.is_file():
        raise ConfigError(
            f"mixeddim.basis: {path} does not exist, and formats {', '.join(formats.names)} "
            "need a basis; make it with 'mdkv calibrate', or set basis to 'prompt'"
        )
    basis = load_basis(path, model, (*sizes, policy.geometry.head_size))
    return basis.of_part(*own).truncate(formats.basis_rank)


def total_kv_heads(policy: Policy, vllm_config: VllmConfig) -> int:
    """KV heads of a full-attention layer on all ranks; layers with windows may have others."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if policy.num_kv_heads == model.get_num_kv_heads(parallel):
        return model.get_total_num_kv_heads()
    return policy.num_kv_heads * parallel.tensor_parallel_size


def heads_of_rank(rank: int, ranks: int, total: int, count: int) -> slice:
    """KV heads of the model that a tensor-parallel rank holds.

    Args:
        rank: its number, from 0.
        ranks: how many there are; more than ``total`` hold copies.
        total: KV heads of the model.
        count: KV heads of each rank.
    """
    first = rank * total // ranks
    return slice(first, first + count)
