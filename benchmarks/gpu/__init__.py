"""The GPU kit. Importing it makes a plain checkout importable: nothing need be installed."""

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]

# Appended, so that what is installed is found first; an editable install is this checkout.
if importlib.util.find_spec("mdkv_vllm") is None:
    sys.path.append(str(_ROOT))
if importlib.util.find_spec("leases") is None:
    sys.path.append(str(_ROOT / "tests"))  # random leases, shared with the tests

import mdkv_vllm  # noqa: E402

# The name that an installation gives the folder at the root (see pyproject.toml).
if importlib.util.find_spec("mdkv_vllm.triton_kernels") is None:
    mdkv_vllm.__path__.append(str(_ROOT))
