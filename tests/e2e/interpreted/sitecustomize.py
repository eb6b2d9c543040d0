"""Lets vLLM's CPU build run Triton kernels: its check finds a CPU backend; they are interpreted.

Python imports this module at start-up of every process that has its folder on PYTHONPATH.
"""

import types

import triton.backends


class _NoDriver:
    @staticmethod
    def is_active():
        return False


triton.backends.backends["cpu"] = types.SimpleNamespace(driver=_NoDriver, compiler=None)
