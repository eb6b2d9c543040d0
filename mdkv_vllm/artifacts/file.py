"""Files of float32 tensors with their origin: safetensors, checked before memory is taken.

A file is read in two steps. Its header, bounded in size, says whose it is and which shapes it
holds; whoever opened it decides whether they fit. Only then is the data read, first in pieces
for its digest, then into tensors. Nothing in a file is ever executed: there is no pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

FORMAT_VERSION = "2"
MAX_HEADER_BYTES = 1 << 20
"""Ours take some hundred bytes; safetensors itself allows 100 MB."""
_PIECE_BYTES = 1 << 16
_SINGLE_WEIGHTS = "model.safetensors"


class ArtifactError(ValueError):
    """A file that cannot be used; the message says why."""


@dataclass(frozen=True)
class ArtifactInfo:
    """Where a basis or head scores come from.

    Attributes:
        model: name or folder as given to the command that made the file.
        model_identity: from :func:`mdkv_vllm.artifacts.store.model_identity`.
        method: how the contents were computed.
        text_digest: SHA-256 of the calibration text.
        tokens: tokens they were computed from.
    """

    model: str
    model_identity: str
    method: str
    text_digest: str
    tokens: int


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], info: ArtifactInfo) -> None:
    """Write float32 tensors and their origin; the file appears only when it is whole.

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
    contents = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    # The data do not depend on the metadata, which is to hold their digest.
    plain = save(contents)
    metadata = {
        "format": FORMAT_VERSION,
        "info": json.dumps(asdict(info), sort_keys=True),
        "sha256": hashlib.sha256(plain[_data_offset(plain[:8]) :]).hexdigest(),
    }
    temporary = path.with_suffix(".tmp")
    save_file(contents, temporary, metadata)
    # safetensors lets nobody else read it, but a server may run as another user.
    temporary.chmod(weights.stat().st_mode & 0o666 if weights.is_file() else 0o644)
    temporary.replace(path)


@dataclass(frozen=True)
class ArtifactFile:
    """A file whose header was read and whose data were not.

    Attributes:
        path: the file.
        info: where its contents come from.
        shapes: shape of each tensor it holds.
        sha256: digest that its data should have, hexadecimal.
        content: what it should hold, for messages.
    """

    path: Path
    info: ArtifactInfo
    shapes: dict[str, tuple[int, ...]]
    sha256: str
    content: str

    def tensors(self) -> dict[str, torch.Tensor]:
        """Read the data, finite float32 of :attr:`shapes`.

        Raises:
            ArtifactError: the data are damaged or not finite.
        """
        if _digest_of_data(self.path) != self.sha256:
            raise ArtifactError(
                f"{self.path} is damaged: its data do not have the SHA-256 that its header names; "
                "make it again or copy it again"
            )
        try:
            with safe_open(str(self.path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in self.shapes}
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, self.content, error) from error
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ArtifactError(f"{self.path}: {name} is not finite")
        return tensors


def open_artifact(path: Path, dimensions: dict[str, int], content: str) -> ArtifactFile:
    """Read and check a file's header; its data are left alone, however large they claim to be.

    Args:
        path: the file.
        dimensions: names of its tensors, and how many dimensions each has.
        content: what it should hold, for messages.

    Raises:
        ArtifactError: the file is missing, unreadable, damaged, of another version, or holds
            tensors of other names, types or numbers of dimensions.
    """
    try:
        header, data_bytes = _read_header(path)
        metadata = header.pop("__metadata__", {})
        if metadata.get("format") != FORMAT_VERSION:
            raise ArtifactError(
                f"{path} has format {metadata.get('format')!r}; this version reads "
                f"{FORMAT_VERSION!r}: make the file again"
            )
        if header.keys() != dimensions.keys():
            raise KeyError(f"it has the tensors {sorted(header)}")
        types = {name: entry["dtype"] for name, entry in header.items()}
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
        info = _info(metadata["info"])
        sha256 = metadata["sha256"]
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist") from error
    except PermissionError as error:
        raise ArtifactError(f"{path} may not be read by this user") from error
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise _damaged(path, content, error) from error
    for name, shape in shapes.items():
        if types[name] != "F32" or len(shape) != dimensions[name] or 0 in shape:
            raise ArtifactError(
                f"{path}: {name} is {types[name]} {list(shape)}; allowed is F32 with "
                f"{dimensions[name]} dimensions, none of them 0"
            )
    needed = 4 * sum(map(math.prod, shapes.values()))
    if data_bytes != needed:
        raise ArtifactError(
            f"{path} is damaged: it has {data_bytes} bytes of data where its header needs {needed}"
        )
    return ArtifactFile(path, info, shapes, sha256, content)


def _info(text: str) -> ArtifactInfo:
    info = ArtifactInfo(**json.loads(text))
    for field in fields(info):
        value = getattr(info, field.name)
        if type(value).__name__ != field.type:
            raise TypeError(f"{field.name} is {value!r}, not of type {field.type}")
    return info


def _data_offset(start: bytes) -> int:
    """Where the data start; a safetensors file begins with its header's length."""
    if len(start) < 8:
        raise ValueError("it is shorter than 8 bytes")
    return 8 + int.from_bytes(start, "little")


def _read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header, and the bytes that follow it.

    safetensors would map the whole file to tell, and a file may be of any size.
    """
    with path.open("rb") as file:
        header_bytes = _data_offset(file.read(8)) - 8
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(
                f"its header takes {header_bytes} bytes; allowed are {MAX_HEADER_BYTES}"
            )
        header = dict(json.loads(file.read(header_bytes)))
    return header, path.stat().st_size - 8 - header_bytes


def _digest_of_data(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(_data_offset(file.read(8)))
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _damaged(path: Path, content: str, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path} does not hold {content} or is damaged: {error}")
