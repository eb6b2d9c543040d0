"""The configuration in force as short texts: labels of a metric, and part of the status."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mdkv_vllm.config import COMPRESSED, EVEN_HEADS, FULL_SIZE, PROMPT_BASIS
from mdkv_vllm.policy import Policy


def configuration(policy: Policy, model: str) -> dict[str, str]:
    """The settings applied to a model.

    A file is given by its name and the start of its SHA-256, which tells whether two servers
    use the same one.

    Args:
        policy: the settings applied to the model.
        model: the model's folder or name.
    """
    config, formats = policy.config, policy.formats
    if not formats.uses_basis:
        basis = "none"
    else:
        basis = PROMPT_BASIS if policy.prompt_basis else _file(config.basis_path(model))
    heads = config.heads_path(model)
    return {
        "compression": "on" if config.enabled and config.budget != 1 else "off",
        "budget": f"{config.budget:g}" if config.budget else f"{config.budget_tokens} tokens",
        "window": str(config.window),
        "formats": ",".join(formats.names),
        "loss": config.loss,
        "basis": basis,
        "heads": EVEN_HEADS if heads is None else _file(heads),
        "min_prompt_tokens": str(config.min_prompt_tokens),
        "segments": config.segments,
        "segment_tokens": str(config.segment_tokens),
        "shared_prefixes": COMPRESSED if policy.shares else FULL_SIZE,
    }


def _file(path: Path) -> str:
    return f"{path.name}@{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
