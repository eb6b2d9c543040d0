"""Kernels of every device behind one interface; see :mod:`mdkv_vllm.kernels.interface`.

``cpu`` (C++), ``cuda`` and ``triton`` (a link to the top-level folder of Triton sources) are the
implementations, ``reference`` is their specification, ``registry`` says which serve a device.
"""
