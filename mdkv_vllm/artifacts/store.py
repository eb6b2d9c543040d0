"""Calibrated bases and head scores: whose they are, and whether they fit the model served."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from mdkv_vllm.artifacts.file import (
    ArtifactError,
    ArtifactInfo,
    open_artifact,
    save_tensors,
)
from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.heads import HeadBudgets

__all__ = [
    "ArtifactError",
    "ArtifactInfo",
    "load_basis",
    "load_head_budgets",
    "load_head_scores",
    "model_identity",
    "save_basis",
    "save_head_scores",
]

_SAMPLE_BYTES = 1 << 16
_MAX_GROUP = 1024
"""Query heads of one KV head, far beyond any model."""


def model_identity(model: str) -> str:
    """A short name for exactly this model, cheap to compute.

    For a folder: SHA-256 of its ``config.json`` and of the size and two samples of every
    safetensors file, so that a copy elsewhere is the same model and a fine-tune is not. For
    a name on a model hub: the name.

    Args:
        model: folder or name.
    """
    folder = Path(model)
    if not folder.is_dir():
        return f"name:{model}"
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    for weights in sorted(folder.glob("model*.safetensors")):
        size = weights.stat().st_size
        digest.update(f"{weights.name}:{size}".encode())
        with weights.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(size // 2)
            digest.update(file.read(_SAMPLE_BYTES))
    return f"sha256:{digest.hexdigest()}"


def save_basis(path: Path, basis: Basis, info: ArtifactInfo) -> None:
    """Write a basis and its origin; see ``save_tensors``."""
    save_tensors(path, {"keys": basis.keys, "values": basis.values}, info)


def load_basis(path: Path, model: str, sizes: tuple[int, int, int]) -> Basis:
    """Read a basis and check that it fits.

    Args:
        path: the file.
        model: the model being served, folder or name.
        sizes: its attention layers, KV heads and head size.

    Raises:
        ArtifactError: the file is missing, damaged, of another version, of another model, or
            of other sizes.
    """
    file = open_artifact(path, {"keys": 4, "values": 4}, "a basis")
    _check_model(path, file.info, model, "calibrate")
    expected = (*sizes, sizes[2])
    for name, shape in file.shapes.items():
        if shape[:3] != sizes or shape[3] > sizes[2] or shape != file.shapes["keys"]:
            raise ArtifactError(
                f"{path}: {name} has shape {list(shape)}; {model} needs {list(expected)}"
            )
    tensors = file.tensors()
    return Basis(tensors["keys"], tensors["values"])


def save_head_scores(path: Path, scores: torch.Tensor, info: ArtifactInfo) -> None:
    """Write scores ``[layers, query_heads]`` and their origin; see ``save_tensors``."""
    save_tensors(path, {"scores": scores}, info)


def load_head_scores(path: Path, model: str, sizes: tuple[int, int]) -> torch.Tensor:
    """Read head scores, check that they fit, and sum them over each group of query heads.

    Args:
        path: the file.
        model: the model being served, folder or name.
        sizes: its attention layers and KV heads.

    Returns:
        float32 ``[layers, kv_heads]``.

    Raises:
        ArtifactError: the file is missing, damaged, of another version, of another model, or
            of other sizes.
    """
    file = open_artifact(path, {"scores": 2}, "head scores")
    _check_model(path, file.info, model, "head-scores")
    layers, query_heads = file.shapes["scores"]
    if layers != sizes[0] or query_heads % sizes[1] or query_heads > _MAX_GROUP * sizes[1]:
        raise ArtifactError(
            f"{path}: scores have shape {[layers, query_heads]}; {model} has {sizes[0]} layers of "
            f"{sizes[1]} KV heads"
        )
    scores = file.tensors()["scores"]
    if not (scores >= 0).all() or not scores.any():
        raise ArtifactError(f"{path}: scores are negative or all 0; at least one must be above 0")
    return (scores / scores.max()).unflatten(1, (sizes[1], -1)).sum(-1)


def load_head_budgets(
    config: MixedDimConfig, model: str, sizes: tuple[int, int]
) -> HeadBudgets | None:
    """Budgets by a model's head scores as the settings want them; None for even ones.

    Args:
        config: the settings.
        model: the model being served, folder or name.
        sizes: its attention layers and KV heads.

    Raises:
        ArtifactError: see :func:`load_head_scores`.
        mdkv_vllm.config.ConfigError: the settings name a file that does not exist.
    """
    path = config.heads_path(model)
    if path is None:
        return None
    return config.head_budgets(load_head_scores(path, model, sizes))


def _check_model(path: Path, info: ArtifactInfo, model: str, command: str) -> None:
    identity = model_identity(model)
    if info.model_identity != identity:
        raise ArtifactError(
            f"{path} was calibrated for {info.model} ({info.model_identity[:19]}), not for "
            f"{model} ({identity[:19]}); run 'mdkv {command} {model}'"
        )
