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

# The name that an installation gives the folder (see pyproject.toml).
_KERNELS = "mdkv_vllm.triton_kernels"
if importlib.util.find_spec(_KERNELS) is None:
    _place = _ROOT / "triton_kernels" / "mixeddim"
    _spec = importlib.util.spec_from_file_location(_KERNELS, _place / "__init__.py")
    assert _spec is not None
    assert _spec.loader is not None
    _kernels = sys.modules[_KERNELS] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_kernels)
