"""Sizes of a model from its ``config.json`` and the sizes of its weight files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_INDEX = "model.safetensors.index.json"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSizes:
    """What a server's memory depends on.

    Attributes:
        layers: attention layers.
        kv_heads: KV heads per layer.
        head_size: dimensions of one head's key.
        dtype: type of the weights, and of the cache where none is chosen.
        weight_bytes: size of the weights.
        weights_from: where that number comes from, for people.
        context: longest context that the model was made for, in tokens; 0 where unknown.
    """

    layers: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    weight_bytes: int
    weights_from: str
    context: int


def read_model_sizes(model: str) -> ModelSizes:
    """Read a model's sizes.

    Args:
        model: a model folder, a ``config.json``, or a hub name that is in the local cache or
            can be fetched.

    Raises:
        ValueError: there is no such configuration, or it lacks a size.
    """
    path = _config_file(model)
    try:
        whole = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a model's config.json: {error}") from error
    # Models that also see or hear keep the language model's sizes one level down.
    config = {**whole, **whole.get("text_config", {})}
    if config.get("kv_lora_rank"):
        raise ValueError(f"{path} describes a model with MLA, which mixeddim does not serve")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise ValueError(
            f"{path} describes a model with sliding windows, which mdkv plan cannot count"
        )
    heads = _number(config, "num_attention_heads", path)
    head_size = config.get("head_dim") or _number(config, "hidden_size", path) // heads
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if dtype not in _DTYPES:
        raise ValueError(f"{path} has dtype {dtype!r}; allowed are {', '.join(_DTYPES)}")
    torch_dtype = getattr(torch, dtype)
    weight_bytes, weights_from = _weights(path.parent, config, head_size, torch_dtype, path)
    return ModelSizes(
        layers=_number(config, "num_hidden_layers", path),
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=head_size,
        dtype=torch_dtype,
        weight_bytes=weight_bytes,
        weights_from=weights_from,
        context=config.get("max_position_embeddings") or 0,
    )


def _config_file(model: str) -> Path:
    given = Path(model)
    if given.is_file():
        return given
    if given.is_dir():
        if not (given / "config.json").is_file():
            raise ValueError(f"MODEL is {model}, a folder without a config.json")
        return given / "config.json"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"MODEL is {model!r}: no such folder, and not to be had from the model hub ({error})"
        ) from error


def _number(config: dict[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{path} has {name} {value!r}; mdkv plan needs a whole number")
    return value


def _weights(
    folder: Path, config: dict[str, Any], head_size: int, dtype: torch.dtype, path: Path
) -> tuple[int, str]:
    index = folder / _INDEX
    if index.is_file():
        total = json.loads(index.read_text("utf-8")).get("metadata", {}).get("total_size")
        if isinstance(total, int):
            return total, f"total_size in {_INDEX}"
    files = list(folder.glob("model*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files), "the safetensors files"
    return _parameters(config, head_size, path) * dtype.itemsize, (
        "an estimate from config.json, as there are no weight files; --weights sets it"
    )


def _parameters(config: dict[str, Any], head_size: int, path: Path) -> int:
    """Parameters of a dense model with gated MLPs; a mixture's experts count one by one."""
    hidden = _number(config, "hidden_size", path)
    heads = _number(config, "num_attention_heads", path)
    kv_heads = config.get("num_key_value_heads") or heads
    attention = hidden * head_size * (2 * heads + 2 * kv_heads)
    experts = config.get("num_experts") or config.get("num_local_experts") or 1
    width = config.get("moe_intermediate_size") if experts > 1 else None
    mlp = 3 * hidden * (width or _number(config, "intermediate_size", path)) * experts
    embeddings = 1 if config.get("tie_word_embeddings") else 2
    vocabulary = embeddings * hidden * _number(config, "vocab_size", path)
    return _number(config, "num_hidden_layers", path) * (attention + mlp + 2 * hidden) + vocabulary
