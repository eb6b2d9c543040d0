"""One torch operator per kernel; see :mod:`mdkv_vllm.ops.cpu`."""
