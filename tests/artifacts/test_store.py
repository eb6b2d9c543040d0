"""Bases and head scores as files: what is refused, and that nothing is read before it fits."""

import json
import struct
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from mdkv_vllm.artifacts import file as artifact_file
from mdkv_vllm.artifacts.store import (
    ArtifactError,
    ArtifactInfo,
    load_basis,
    load_head_scores,
    save_basis,
    save_head_scores,
)  # fmt: skip
from mdkv_vllm.core.basis import Basis

MODEL = "some/model"
INFO = ArtifactInfo(MODEL, f"name:{MODEL}", "test", "", 1)
SIZES = (2, 3, 8)
"""Layers, KV heads and head size."""


@pytest.fixture
def basis():
    return Basis(torch.randn(2, 3, 8, 4), torch.randn(2, 3, 8, 4))


@pytest.fixture
def path(tmp_path, basis):
    file = tmp_path / "basis.safetensors"
    save_basis(file, basis, INFO)
    return file


def parts(path):
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path, header, data, pad_to=None):
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
        if pad_to is not None:
            file.truncate(8 + len(text) + pad_to)


def refused(path, message):
    """Loading fails with a message, and takes hardly any memory on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=message):
            load_basis(path, MODEL, SIZES)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_is_written_is_read(path, basis):
    loaded = load_basis(path, MODEL, SIZES)
    assert torch.equal(loaded.keys, basis.keys)
    assert torch.equal(loaded.values, basis.values)
    assert not path.with_suffix(".tmp").exists()


def test_half_precision_is_written_as_float32(tmp_path, basis):
    path = tmp_path / "basis.safetensors"
    save_basis(path, Basis(basis.keys.half(), basis.values.half()), INFO)
    assert load_basis(path, MODEL, SIZES).keys.dtype == torch.float32


@pytest.mark.parametrize(
    ("length", "message"),
    [(0, "shorter than 8 bytes"), (7, "shorter"), (8, "does not hold a basis or is damaged"),
     (100, "does not hold a basis or is damaged"), (-1, "1535 bytes of data"), (-4, "needs 1536")],
)  # fmt: skip
def test_a_cut_file(path, length, message):
    content = path.read_bytes()
    path.write_bytes(content[:length])
    refused(path, message)


def test_a_file_with_more_at_its_end(path):
    path.write_bytes(path.read_bytes() + b"\0")
    refused(path, "1537 bytes of data where its header needs 1536")


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_changed_byte(path, place):
    header, data = parts(path)
    changed = bytearray(data)
    changed[place] ^= 1
    write(path, header, bytes(changed))
    refused(path, "SHA-256 that its header names")


def test_a_pickle(path):
    torch.save({"keys": torch.ones(2)}, path)
    refused(path, "does not hold a basis")


def claim_terabytes(path, pad=False):
    """A header of two tensors of a terabyte each; with ``pad`` the file is as long, but sparse."""
    header, data = parts(path)
    rank = 2**40 // (2 * 3 * 8 * 4)
    end = 2 * 3 * 8 * 4 * rank
    header["keys"] |= {"shape": [2, 3, 8, rank], "data_offsets": [0, end]}
    header["values"] |= {"shape": [2, 3, 8, rank], "data_offsets": [end, 2 * end]}
    write(path, header, data, pad_to=2 * end if pad else None)
    return rank


def test_a_header_that_claims_terabytes(path):
    claim_terabytes(path)
    refused(path, "1536 bytes of data where its header needs 21990232")


def test_a_sparse_file_of_terabytes(path):
    rank = claim_terabytes(path, pad=True)
    refused(path, rf"keys has shape \[2, 3, 8, {rank}\]; some/model needs \[2, 3, 8, 8\]")


def test_a_header_whose_offsets_overlap(path):
    header, data = parts(path)
    header["values"]["data_offsets"] = header["keys"]["data_offsets"]
    write(path, header, data)
    refused(path, "does not hold a basis or is damaged")


def test_a_header_of_its_own_terabytes(path):
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])
    refused(path, "its header takes 1099511627776 bytes; allowed are 1048576")


def test_a_large_header(path):
    header, data = parts(path)
    header["__metadata__"]["more"] = "x" * artifact_file.MAX_HEADER_BYTES
    write(path, header, data)
    refused(path, "allowed are 1048576")


def stored(path, tensors, **metadata):
    header, _ = parts(path)
    save_file(tensors, path, {**header["__metadata__"], **metadata})


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (torch.ones(2, 3, 8, 4).half(), torch.ones(2, 3, 8, 4), r"keys is F16 \[2, 3, 8, 4\]"),
        (torch.ones(2, 3, 8, 4), torch.ones(2, 3, 8, 4).long(), r"values is I64 \[2, 3, 8, 4\]"),
        (torch.ones(2, 3, 8), torch.ones(2, 3, 8, 4), r"keys is F32 \[2, 3, 8\]"),
        (torch.ones(2, 3, 8, 0), torch.ones(2, 3, 8, 0), "none of them 0"),
        (torch.ones(3, 3, 8, 4), torch.ones(3, 3, 8, 4), r"needs \[2, 3, 8, 8\]"),
        (torch.ones(2, 3, 8, 9), torch.ones(2, 3, 8, 9), r"needs \[2, 3, 8, 8\]"),
        (torch.ones(2, 3, 8, 4), torch.ones(2, 3, 8, 5), r"values has shape \[2, 3, 8, 5\]"),
    ],
)
def test_tensors_that_do_not_fit(path, keys, values, message):
    stored(path, {"keys": keys, "values": values})
    refused(path, message)


def test_other_tensors(path):
    stored(path, {"keys": torch.ones(2, 3, 8, 4)})
    refused(path, r"it has the tensors \['keys'\]")
    stored(path, {name: torch.ones(2, 3, 8, 4) for name in ("keys", "values", "more")})
    refused(path, "it has the tensors")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "1"}, "has format '1'; this version reads '2': make the file again"),
        ({"info": "{"}, "is damaged"),
        ({"info": "[]"}, "is damaged"),
        ({"info": '{"model": "a"}'}, "is damaged"),
        ({"info": json.dumps({**vars(INFO), "model_identity": 3})}, "model_identity is 3"),
        ({"info": json.dumps({**vars(INFO), "tokens": "3"})}, "tokens is '3'"),
        ({"sha256": ""}, "SHA-256 that its header names"),
    ],
)
def test_wrong_metadata(path, metadata, message):
    _, data = parts(path)
    header, _ = parts(path)
    header["__metadata__"] |= metadata
    write(path, header, data)
    refused(path, message)


def test_values_that_are_not_finite(tmp_path, basis):
    path = tmp_path / "basis.safetensors"
    basis.keys[0, 0, 0, 0] = torch.inf
    save_basis(path, basis, INFO)
    refused(path, "keys is not finite")


def test_a_missing_file_and_a_folder(tmp_path):
    refused(tmp_path / "none.safetensors", "does not exist")
    refused(tmp_path, "is damaged")


def test_more_query_heads_than_any_model_has(tmp_path):
    path = tmp_path / "scores.safetensors"
    save_head_scores(path, torch.ones(2, 3 * 1025), INFO)
    with pytest.raises(ArtifactError, match="2 layers of 3 KV heads"):
        load_head_scores(path, MODEL, (2, 3))
