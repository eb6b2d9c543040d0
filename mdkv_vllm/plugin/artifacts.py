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
            vllm_config: names the model and the number of ranks.
            rank: the worker's number.

        Raises:
            ConfigError: a file is missing, or was made for another model.
        """
        model = vllm_config.model_config
        ranks = vllm_config.parallel_config.tensor_parallel_size
        total = model.get_total_num_kv_heads()
        own = heads_of_rank(rank % ranks, ranks, total, policy.num_kv_heads)
        heads = load_head_budgets(policy.config, model.model, (policy.num_layers, total))
        return cls(
            _load_basis(policy, model.model, total, own),
            None if heads is None else heads.of_heads(own),
        )


def _load_basis(policy: Policy, model: str, total_heads: int, own: slice) -> Basis | None:
    formats = policy.formats
    if not formats.uses_basis or policy.prompt_basis:
        return None
    path = policy.config.basis_path(model)
    if not path.is_file():
        raise ConfigError(
            f"mixeddim.basis: {path} does not exist, and formats {', '.join(formats.names)} "
            "need a basis; make it with 'mdkv calibrate', or set basis to 'prompt'"
        )
    sizes = (policy.num_layers, total_heads, policy.geometry.head_size)
    return load_basis(path, model, sizes).of_heads(own).truncate(formats.basis_rank)


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
