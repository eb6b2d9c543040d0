"""What serves on GPUs imports where the C++ extension, bound to one build of torch, is absent."""

import subprocess
import sys

GPU_PATH = """
import importlib
import pkgutil
import sys
import types


class NoCpuExtension:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "mdkv_vllm._cpu":
            raise ImportError("not built for this torch")


sys.meta_path.insert(0, NoCpuExtension)
# vLLM's CPU build has not the CUDA operators that its CUDA platform imports.
sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")

import torch

import mdkv_vllm.core
import mdkv_vllm.kernels.triton

for package in (mdkv_vllm.core, mdkv_vllm.kernels.triton):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)

import mdkv_vllm.config
import mdkv_vllm.kernels.autotune
import mdkv_vllm.kernels.cuda.decode
import mdkv_vllm.plugin.backend
import mdkv_vllm.plugin.cuda_platform
import mdkv_vllm.plugin.cuda_worker
import mdkv_vllm.plugin.prefill.choose
import mdkv_vllm.plugin.prefill.sdpa
import mdkv_vllm.policy
from mdkv_vllm.kernels.registry import compression_kernels
from mdkv_vllm.plugin.kv_cache import load_tokens

compression_kernels("auto", torch.device("cuda"))
cache = torch.empty(4, 2, 16, 128, device="meta")
load_tokens(cache, torch.empty(4, dtype=torch.int32, device="meta"), 20, torch.float32)
try:
    compression_kernels("auto", torch.device("cpu"))
except ImportError:
    print("only the CPU's kernels need it")
"""


def test_the_gpu_path_imports_no_cpu_extension():
    result = subprocess.run(
        [sys.executable, "-c", GPU_PATH], capture_output=True, text=True, timeout=120
    )

    assert result.returncode == 0, result.stderr
    assert "only the CPU's kernels need it" in result.stdout
