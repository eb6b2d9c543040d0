"""Triton kernels over a mixed-dimension paged cache.

Installed as ``mdkv_vllm.triton_kernels``: a top-level package of the folder's name would shadow
the one that vLLM looks for. Importing this package imports no triton; its modules do.
"""
