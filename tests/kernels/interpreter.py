"""Triton's interpreter in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, for good; no other test may see it set.
"""

import multiprocessing
import os
import types
from concurrent.futures import ProcessPoolExecutor

import torch


def _use_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    # Triton replaces its language's functions whenever one of a kernel's is called; once is as good
    # and takes a third of the time.
    everywhere = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(everywhere)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


def start() -> ProcessPoolExecutor:
    """One process that interprets kernels."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, _use_interpreter)
