"""Compression's Triton kernels in the interpreter's process, outputs poisoned beforehand."""

from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch


def _poisoned(empty):
    def make(*sizes, **options):
        return empty(*sizes, **options).fill_(torch.nan)

    return make


def run(method: str, *arguments):
    """Call a method of ``TritonKernels``; every ``torch.empty`` holds NaN."""
    from mdkv_vllm.triton_kernels.compress import TritonKernels

    with mock.patch("torch.empty", _poisoned(torch.empty)):
        return getattr(TritonKernels(), method)(*arguments)


def run_pack(*arguments):
    """Pack; the pages, of which the process may have a copy."""
    run("pack", *arguments)
    return arguments[4]


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

    def allocate(self, *arguments):
        return self._process.submit(run, "allocate", *arguments).result()

    def pack(self, vectors, formats, choice, geometry, pages, first_page):
        arguments = vectors, formats, choice, geometry, pages, first_page
        pages.copy_(self._process.submit(run_pack, *arguments).result())
