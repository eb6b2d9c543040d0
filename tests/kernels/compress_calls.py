"""Compression's Triton kernels in the interpreter's process, outputs poisoned beforehand."""

from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from unittest import mock

import torch


def _poisoned(empty):
    def make(*sizes, **options):
        made = empty(*sizes, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 99)

    return make


def _poison() -> ExitStack:
    """Every ``torch.empty`` holds NaN, or 99."""
    stack = ExitStack()
    stack.enter_context(mock.patch("torch.empty", _poisoned(torch.empty)))
    return stack


def make_group(prompt, layers, bases):
    from mdkv_vllm.kernels.triton.compress import TritonKernels

    return TritonKernels().layers(prompt, layers, bases)


def run_losses(group):
    """Losses, and the group, which keeps something of them."""
    with _poison():
        return group.losses(), group


def run_pack(group, chosen, pages, first_page):
    """Pack; the pages, of which the process may have a copy, and the first page behind them."""
    with _poison():
        end = group.pack(chosen, pages, first_page)
    return pages, end


def run_allocate(clearings, *arguments):
    """Allocate in fewer rounds, for tests that look at something else."""
    from mdkv_vllm.kernels.triton.compress import TritonKernels

    with _poison(), mock.patch("mdkv_vllm.kernels.triton.allocate._CLEARINGS", clearings):
        return TritonKernels().allocate(*arguments)


class _Group:
    def __init__(self, process, *arguments):
        self._process = process
        self._group = process.submit(make_group, *arguments).result()

    def losses(self):
        losses, self._group = self._process.submit(run_losses, self._group).result()
        return losses

    def pack(self, chosen, pages, first_page):
        arguments = self._group, chosen, pages, first_page
        packed, end = self._process.submit(run_pack, *arguments).result()
        pages.copy_(packed)
        return end


class InterpretedKernels:
    """``TritonKernels`` in another process."""

    def __init__(self, process: ProcessPoolExecutor) -> None:
        self._process = process

    layers_at_once = 2
    reads_pages = True

    def layers(self, prompt, layers, bases):
        return _Group(self._process, prompt, layers, bases)

    def allocate(self, *arguments, clearings=4):
        return self._process.submit(run_allocate, clearings, *arguments).result()
