"""Everything measured, as lines of JSON, each on disk when it is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class Record:
    """A file of JSON lines, or nothing where there is no path.

    Args:
        path: written anew; its folder is made.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w")

    def write(self, **values: Any) -> None:  # noqa: ANN401
        """Add a line."""
        if self._file is not None:
            print(json.dumps(plain(values), allow_nan=False), file=self._file, flush=True)


def plain(value: Any) -> Any:  # noqa: ANN401
    """A value as JSON has it: None where a number is not one, lists for tuples."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value
