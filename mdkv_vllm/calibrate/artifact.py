"""Calibrated basis and head scores as files: safetensors with metadata that names their model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.core.basis import Basis
from mdkv_vllm.core.heads import HeadBudgets

FORMAT_VERSION = "1"
_SAMPLE_BYTES = 1 << 16
_SINGLE_WEIGHTS = "model.safetensors"


class ArtifactError(ValueError):
    """A file that cannot be used; the message says why."""


@dataclass(frozen=True)
class ArtifactInfo:
    """Where a basis or head scores come from.

    Attributes:
        model: name or folder as given to the command that made the file.
        model_identity: from :func:`model_identity`.
        method: how the contents were computed.
        text_digest: SHA-256 of the calibration text.
        tokens: tokens they were computed from.
    """

    model: str
    model_identity: str
    method: str
    text_digest: str
    tokens: int


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
    """Write a basis and its origin; see :func:`_save`."""
    _save(path, {"keys": basis.keys, "values": basis.values}, info)


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
    info, basis = read_basis(path)
    _check_model(path, info, model, "calibrate")
    expected = (*sizes, sizes[2])
    for name, tensor in (("keys", basis.keys), ("values", basis.values)):
        if tensor.shape[:3] != expected[:3] or tensor.shape[3] > sizes[2]:
            raise ArtifactError(
                f"{path}: {name} has shape {list(tensor.shape)}; {model} needs {list(expected)}"
            )
    return basis


def read_basis(path: Path) -> tuple[ArtifactInfo, Basis]:
    """Read a basis file without checking whose it is.

    Raises:
        ArtifactError: the file is missing, damaged or of another version.
    """
    info, tensors = _read(path, {"keys": 4, "values": 4}, "a basis")
    return info, Basis(tensors["keys"], tensors["values"])


def save_head_scores(path: Path, scores: torch.Tensor, info: ArtifactInfo) -> None:
    """Write scores ``[layers, query_heads]`` and their origin; see :func:`_save`."""
    _save(path, {"scores": scores}, info)


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
    info, tensors = _read(path, {"scores": 2}, "head scores")
    _check_model(path, info, model, "head-scores")
    scores = tensors["scores"]
    if scores.shape[0] != sizes[0] or scores.shape[1] % sizes[1]:
        raise ArtifactError(
            f"{path}: scores have shape {list(scores.shape)}; {model} has {sizes[0]} layers of "
            f"{sizes[1]} KV heads"
        )
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


def _save(path: Path, tensors: dict[str, torch.Tensor], info: ArtifactInfo) -> None:
    """Write tensors and their origin; the file appears only when it is whole.

    A model folder with a single weights file also gets an index of it: without one, vLLM
    loads every safetensors file of the folder as weights, this one among them.
    """
    weights = path.parent / _SINGLE_WEIGHTS
    index = path.parent / f"{_SINGLE_WEIGHTS}.index.json"
    if weights.is_file() and not index.exists():
        with safe_open(str(weights), framework="pt") as file:
            names = {name: _SINGLE_WEIGHTS for name in file.keys()}  # noqa: SIM118
        content = {"metadata": {"total_size": weights.stat().st_size}, "weight_map": names}
        index.write_text(json.dumps(content, indent=1))
    metadata = {"format": FORMAT_VERSION, "info": json.dumps(asdict(info), sort_keys=True)}
    temporary = path.with_suffix(".tmp")
    save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata)
    # safetensors lets nobody else read it, but a server may run as another user.
    temporary.chmod(weights.stat().st_mode & 0o666 if weights.is_file() else 0o644)
    temporary.replace(path)


def _read(
    path: Path, dimensions: dict[str, int], content: str
) -> tuple[ArtifactInfo, dict[str, torch.Tensor]]:
    """Read float32 tensors of known names and numbers of dimensions."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT_VERSION:
                raise ArtifactError(
                    f"{path} has format {metadata.get('format')!r}; this version reads "
                    f"{FORMAT_VERSION!r}"
                )
            info = ArtifactInfo(**json.loads(metadata["info"]))
            tensors = {name: file.get_tensor(name).float() for name in dimensions}
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist") from error
    except PermissionError as error:
        raise ArtifactError(f"{path} may not be read by this user") from error
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, OSError) as error:
        raise ArtifactError(f"{path} does not hold {content} or is damaged: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dim() != dimensions[name] or not torch.isfinite(tensor).all():
            raise ArtifactError(
                f"{path}: {name} is not a finite {dimensions[name]}-dimensional tensor"
            )
    return info, tensors


def _check_model(path: Path, info: ArtifactInfo, model: str, command: str) -> None:
    identity = model_identity(model)
    if info.model_identity != identity:
        raise ArtifactError(
            f"{path} was calibrated for {info.model} ({info.model_identity[:19]}), not for "
            f"{model} ({identity[:19]}); run 'mdkv {command} {model}'"
        )
