"""Compression's Triton kernels in the interpreter's process, outputs poisoned beforehand."""

from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch


def _poisoned(empty):
    def make(*sizes, **options):
        made = empty(*sizes, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 99)

    return make


def run(method: str, *arguments):
    """Call a method of ``TritonKernels``; every ``torch.empty`` holds NaN, or 99."""
    from mdkv_vllm.triton_kernels.compress import TritonKernels

    with mock.patch("torch.empty", _poisoned(torch.empty)):
        return getattr(TritonKernels(), method)(*arguments)


def run_pack(*arguments):
    """Pack; the pages, of which the process may have a copy."""
    run("pack", *arguments)
    return arguments[4]


def run_allocate(clearings, *arguments):
    """Allocate in fewer rounds, for tests that look at something else."""
    with mock.patch("mdkv_vllm.triton_kernels.allocate._CLEARINGS", clearings):
        return run("allocate", *arguments)


class InterpretedKernels:
    """``TritonKernels`` in another process."""

    def __init__(self, process: ProcessPoolExecutor) -> None:
        self._process = process

    layers_at_once = 2

    def rotate(self, *arguments):
        return self._process.submit(run, "rotate", *arguments).result()

    def round_trip(self, *arguments):
        return self._process.submit(run, "round_trip", *arguments).result()

    def loss_sums(self, *arguments):
        return self._process.submit(run, "loss_sums", *arguments).result()

    def allocate(self, *arguments, clearings=8):
        return self._process.submit(run_allocate, clearings, *arguments).result()

    def pack(self, vectors, formats, choice, geometry, pages, first_page):
        arguments = vectors, formats, choice, geometry, pages, first_page
        pages.copy_(self._process.submit(run_pack, *arguments).result())
