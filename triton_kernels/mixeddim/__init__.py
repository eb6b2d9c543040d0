"""Triton kernels over a mixed-dimension paged cache.

Installed as ``mdkv_vllm.kernels.triton``. The folder around it is no package, so that a Python
started beside it finds the package ``triton_kernels`` that vLLM imports, where that is installed.
Importing this package imports no triton; its modules do.
"""
