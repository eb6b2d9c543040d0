"""Nothing on the decode path asks the device for a number: read off the source.

Steps are also run on torch's meta device (tests/plugin/test_runtime.py) and compression under a
guard (tests/kernels/test_no_synchronisation.py); this covers what launches kernels as well.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DECODE_PATH = (
    "mdkv_vllm/plugin/backend.py",
    "mdkv_vllm/plugin/worker_runtime/runtime.py",
    "mdkv_vllm/plugin/worker_runtime/step_builder.py",
    "mdkv_vllm/plugin/worker_runtime/query_window.py",
    "mdkv_vllm/plugin/worker_runtime/request_table.py",
    "mdkv_vllm/plugin/worker_runtime/compression_runner.py",
    "mdkv_vllm/plugin/worker_runtime/metadata.py",
    "mdkv_vllm/plugin/rows.py",
    "mdkv_vllm/plugin/prefill/chunks.py",
    "mdkv_vllm/plugin/prefill/flash.py",
    "mdkv_vllm/kernels/gpu_decode.py",
    "mdkv_vllm/kernels/cuda/decode.py",
    "triton_kernels/mixeddim/decode.py",
)
WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "is_nonzero", "equal"}


def waits(source):
    """Calls that wait for a device, but on tensors that lie on the host by their name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr in WAITS and "_cpu" not in ast.unparse(node.func.value):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", DECODE_PATH)
def test_no_call_waits(path):
    assert not waits((ROOT / path).read_text())


def test_a_planted_call_is_found():
    assert waits("def f(lengths):\n    return lengths.max().item()") == [
        "line 2: lengths.max().item()"
    ]
    assert not waits("batch.seq_lens_cpu_upper_bound[:4].tolist()")
