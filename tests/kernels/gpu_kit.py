"""The GPU kit on this machine's CPU, and kernels with faults that its checks have to find.

The interpreter's process imports this module, and so has all of it too.
"""

import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

os.environ["MDKV_GPU_REHEARSAL"] = "1"  # read when the kit's device is first asked for

from benchmarks.gpu import (
    baselines,
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
    sanitize,
    sass,
)
from benchmarks.gpu.call import CUDA, TRITON
from benchmarks.gpu.stages import build

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"

__all__ = [
    "baselines",
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

    def too_long(kernel, config, query, layer, batch, output, lse):
        lengths = torch.where(batch.lengths > 0, batch.lengths + shift, batch.lengths)
        kernel.attend(query, layer, replace(batch, lengths=lengths), output, lse)

    made = replace(CUDA, make=lambda config: FaultyDecode(CUDA.make(config), config, too_long))
    (outcome,) = check.check_variant(model, mix, seed, made)
    return outcome


def _faulty(fault):
    spoil = FAULTS[fault]
    return replace(TRITON, make=lambda config: FaultyDecode(TRITON.make(config), config, spoil))


class FaultyDecode:
    """A decode kernel that another function calls, with a fault in it."""

    def __init__(self, kernel, config, attend):
        self._kernel, self._config, self._attend = kernel, config, attend

    def attend(self, query, layer, batch, output, lse=None, recent=None):
        self._attend(self._kernel, self._config, query, layer, batch, output, lse)

    def scratch(self):
        return self._kernel.scratch()


def _right(kernel, config, query, layer, batch, output, lse):
    kernel.attend(query, layer, batch, output, lse)


def _scaled(kernel, config, query, layer, batch, output, lse):
    kernel.attend(query, layer, batch, output, lse)
    output.mul_(1.05)


def _unwritten(kernel, config, query, layer, batch, output, lse):
    kernel.attend(query, layer, batch, output, lse)
    output[-2, -1, -1] = torch.nan


def _last_token_missed(kernel, config, query, layer, batch, output, lse):
    shorter = replace(batch, lengths=(batch.lengths - 1).clamp(min=0))
    kernel.attend(query, layer, shorter, output, lse)


def _cache_written(kernel, config, query, layer, batch, output, lse):
    kernel.attend(query, layer, batch, output, lse)
    config.kv_cache.view(torch.uint8).view(-1)[5] ^= 1


def _wrong_from_eleven(kernel, config, query, layer, batch, output, lse):
    """Where a list (of every head and layer) has eleven tokens or more, in one dimension."""
    kernel.attend(query, layer, batch, output, lse)
    for index, row in enumerate(batch.query_rows.tolist()):
        first, tail = batch.leases[row, 0].tolist()
        block = config.kv_cache[batch.block_table[row, first]].view(torch.uint8).flatten()
        held = int(block[:4].view(torch.int32)) if tail else int(batch.lengths[index])
        if held >= 11:
            output[index, 0, 7] += 1


def _beside_written(kernel, config, query, layer, batch, output, lse):
    kernel.attend(query, layer, batch, output, lse)
    output.as_strided((1,), (1,), 0).zero_()


def _padding_written(kernel, config, query, layer, batch, output, lse):
    kernel.attend(query, layer, batch, output, lse)
    output[-1] = 1


def _lse_off(kernel, config, query, layer, batch, output, lse):
    kernel.attend(query, layer, batch, output, lse)
    if lse is not None:
        lse.add_(0.05)


FAULTS = {
    None: _right,
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
        mock.patch("mdkv_vllm.kernels.triton.allocate._CLEARINGS", 1),
        mock.patch.object(compress_time, "ROUNDS", 1),
    ):
        return list(compress_time.time_compression(generator, model, lengths))
