"""The GPU kit as a package, and kernels with faults that its checks have to find.

Loaded by its path: ``benchmarks`` on the module path would offer folders like ``lm_eval`` there
as packages. The interpreter's process imports this module, and so has all of it too.
"""

import importlib.util
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


def _load():
    spec = importlib.util.spec_from_file_location("gpu", FOLDER / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = package
    spec.loader.exec_module(package)


_load()

from gpu import check, inputs, loads, measure, reference, report, rivals, sanitize  # noqa: E402
from gpu.call import mixed_decode  # noqa: E402

__all__ = ["check", "inputs", "loads", "measure", "reference", "report", "rivals", "sanitize"]


def check_variant(model, mix, seed, fault=None):
    return check.check_variant(model, mix, "cpu", seed, FAULTS[fault])


def check_long(load, holding, seed, fault=None):
    return check.check_long(load, holding, "cpu", seed, FAULTS[fault])


def _scaled(*arguments):
    mixed_decode(*arguments)
    arguments[9].mul_(1.05)


def _unwritten(*arguments):
    mixed_decode(*arguments)
    arguments[9][-2, -1, -1] = torch.nan


def _last_token_missed(query, arena, layer, tables, block_table, rows, lengths, *more):
    mixed_decode(query, arena, layer, tables, block_table, rows, (lengths - 1).clamp(min=0), *more)


def _cache_written(query, arena, *more):
    mixed_decode(query, arena, *more)
    arena.view(torch.uint8).view(-1)[5] ^= 1


def _beside_written(*arguments):
    mixed_decode(*arguments)
    output = arguments[9]
    output.as_strided((1,), (1,), 0).zero_()


def _padding_written(*arguments):
    mixed_decode(*arguments)
    arguments[9][-1] = 1


def _lse_off(*arguments):
    mixed_decode(*arguments)
    if len(arguments) > 11:
        arguments[11].add_(0.05)


FAULTS = {
    None: mixed_decode,
    "scaled": _scaled,
    "unwritten": _unwritten,
    "last token missed": _last_token_missed,
    "cache written": _cache_written,
    "beside written": _beside_written,
    "padding written": _padding_written,
    "lse off": _lse_off,
}
