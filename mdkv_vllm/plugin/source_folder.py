"""A checkout's folder ``triton_kernels`` is not the package of that name which vLLM looks for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

NAME = "triton_kernels"


def hide_source_folder() -> None:
    """Let vLLM not take the folder for the package, in a Python started beside it.

    Where the package is installed Python finds it by itself, for the folder is none. Where it is
    not, the folder would be found as a namespace; without it vLLM takes its own copy, or none. Can
    go when vLLM asks for one of the package's modules instead of its name.
    """
    if NAME in sys.modules:
        return
    found = importlib.util.find_spec(NAME)
    if found is None or found.origin is not None or found.submodule_search_locations is None:
        return
    if all((Path(place) / "mixeddim").is_dir() for place in found.submodule_search_locations):
        sys.modules[NAME] = None  # type: ignore[assignment]
