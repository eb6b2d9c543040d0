"""Kernels in C++ (csrc/cpu). Importing this loads the extension, which registers the operators."""

from __future__ import annotations

import torch

try:
    import mdkv_vllm._cpu  # noqa: F401
except ImportError as error:
    raise ImportError(
        "mdkv_vllm's CPU kernels are not built. Build them against the installed torch with "
        "`pip install --no-build-isolation -e .` in the source folder "
        f"(the import failed with: {error})"
    ) from error

for _name in ("store_kv", "load_kv", "mixed_decode", "read_leases", "pack_pages"):
    torch.library.register_fake(f"mdkv::{_name}", lambda *args, **kwargs: None)


def cpu_isas() -> list[str]:
    """Instruction sets that have kernels here, widest first.

    The first is used unless the environment variable ``MDKV_CPU_ISA`` names another.
    """
    return torch.ops.mdkv.cpu_isas()
