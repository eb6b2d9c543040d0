"""The CUDA library where there is none, or another."""

import subprocess
import sys

import pytest
import torch

from mdkv_vllm.kernels.cuda import library as cuda


@pytest.fixture(autouse=True)
def _no_cached_library():
    cuda.library.cache_clear()
    yield
    cuda.library.cache_clear()


def test_says_how_to_build(monkeypatch, tmp_path):
    monkeypatch.setenv("MDKV_CUDA_LIBRARY", str(tmp_path / "none.so"))
    assert not cuda.available()
    assert "none.so does not exist. Build them with `scripts/build-cuda.sh`" in cuda.why_not()


def test_says_what_cannot_be_loaded(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    monkeypatch.setenv("MDKV_CUDA_LIBRARY", str(broken))
    with pytest.raises(cuda.CudaKernelError, match="cannot be loaded"):
        cuda.library()


def test_says_which_version_is_needed(monkeypatch, tmp_path):
    source, other = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text("int mdkv_cuda_abi(void) { return 99; }")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", other], check=True)
    monkeypatch.setenv("MDKV_CUDA_LIBRARY", str(other))
    with pytest.raises(cuda.CudaKernelError, match="interface 99, this package needs"):
        cuda.library()


def test_importing_loads_nothing():
    code = "import sys; from mdkv_vllm.kernels.cuda import decode; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr
    assert torch.cuda.is_available() or not cuda.available()
