"""The GPU kit as a package, and kernels with faults that its checks have to find.

Loaded by its path: ``benchmarks`` on the module path would offer folders like ``lm_eval`` there
as packages. The interpreter's process imports this module, and so has all of it too.
"""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


os.environ["MDKV_GPU_REHEARSAL"] = "1"  # its device is this machine's CPU


def _load():
    spec = importlib.util.spec_from_file_location("gpu", FOLDER / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = package
    spec.loader.exec_module(package)


_load()

from gpu import (  # noqa: E402
    check,
    compress_check,
    compress_time,
    inputs,
    jobs,
    loads,
    locate,
    measure,
    ncu,
    record,
    reference,
    report,
    rivals,
    sanitize,
    sass,
)
from gpu.call import CUDA, TRITON  # noqa: E402
from gpu.stages import build  # noqa: E402

__all__ = [
    "build",
    "check",
    "compress_check",
    "compress_time",
    "inputs",
    "jobs",
    "loads",
    "locate",
    "measure",
    "ncu",
    "record",
    "reference",
    "report",
    "rivals",
    "sanitize",
    "sass",
]


def check_variant(model, mix, seed, fault=None):
    (outcome,) = check.check_variant(model, mix, seed, _faulty(fault))
    return outcome


def check_long(load, holding, seed, fault=None):
    return check.check_long(load, holding, seed, _faulty(fault))


def locate_fault(model, name, seed, fault=None):
    return locate.locate(model, name, seed, _faulty(fault))


def check_cuda(model, mix, seed, shift=0):
    """Where the CUDA kernels run on the CPU; every length is ``shift`` too long."""

    def decode(*arguments):
        lengths = arguments[6]
        longer = torch.where(lengths > 0, lengths + shift, lengths)
        CUDA.decode(*arguments[:6], longer, *arguments[7:])

    (outcome,) = check.check_variant(model, mix, seed, replace(CUDA, decode=decode))
    return outcome


def _faulty(fault):
    return replace(TRITON, decode=FAULTS[fault])


def _scaled(*arguments):
    TRITON.decode(*arguments)
    arguments[9].mul_(1.05)


def _unwritten(*arguments):
    TRITON.decode(*arguments)
    arguments[9][-2, -1, -1] = torch.nan


def _last_token_missed(query, arena, layer, tables, block_table, rows, lengths, *more):
    TRITON.decode(query, arena, layer, tables, block_table, rows, (lengths - 1).clamp(min=0), *more)


def _cache_written(query, arena, *more):
    TRITON.decode(query, arena, *more)
    arena.view(torch.uint8).view(-1)[5] ^= 1


def _wrong_from_eleven(query, arena, layer, tables, block_table, rows, lengths, leases, *more):
    """Where a list (of every head and layer) has eleven tokens or more, in one dimension."""
    TRITON.decode(query, arena, layer, tables, block_table, rows, lengths, leases, *more)
    for index, row in enumerate(rows.tolist()):
        first, tail = leases[row].tolist()
        block = arena[block_table[row, first]].view(torch.uint8).flatten()
        held = int(block[:4].view(torch.int32)) if tail else int(lengths[index])
        if held >= 11:
            more[1][index, 0, 7] += 1


def _beside_written(*arguments):
    TRITON.decode(*arguments)
    output = arguments[9]
    output.as_strided((1,), (1,), 0).zero_()


def _padding_written(*arguments):
    TRITON.decode(*arguments)
    arguments[9][-1] = 1


def _lse_off(*arguments):
    TRITON.decode(*arguments)
    if len(arguments) > 11:
        arguments[11].add_(0.05)


FAULTS = {
    None: TRITON.decode,
    "scaled": _scaled,
    "unwritten": _unwritten,
    "last token missed": _last_token_missed,
    "cache written": _cache_written,
    "beside written": _beside_written,
    "padding written": _padding_written,
    "lse off": _lse_off,
    "wrong from eleven": _wrong_from_eleven,
}


class Faulty(compress_check.TritonKernels):
    """Compression's kernels, of which one spoils what it has made."""

    def __init__(self, part):
        self._part = part

    def layers(self, *arguments):
        return FaultyGroup(super().layers(*arguments), self._part)

    def allocate(self, *arguments):
        found = super().allocate(*arguments)
        if self._part == "allocate":
            found[0].choice[:, :8].fill_(0)
        return found


class FaultyGroup:
    def __init__(self, group, part):
        self._group, self._part = group, part

    def losses(self):
        found = self._group.losses()
        if self._part == "losses":
            found[:, 1, :, 5].mul_(3)
        return found

    def pack(self, chosen, pages, first_page):
        end = self._group.pack(chosen, pages, first_page)
        if self._part == "pack":
            pages[int(first_page), 3:40] ^= 0x55
        return end


def check_compression(case, seed, fault=None):
    return compress_check.check_compression(case, "cpu", seed, Faulty(fault))


def time_compression(model, lengths):
    """Nothing but the times is another on a GPU."""
    generator = torch.Generator().manual_seed(0)
    with (
        mock.patch("mdkv_vllm.triton_kernels.allocate._CLEARINGS", 1),
        mock.patch.object(compress_time, "ROUNDS", 1),
    ):
        return list(compress_time.time_compression(generator, model, lengths))
