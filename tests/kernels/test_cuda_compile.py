"""nvcc builds the CUDA kernels for every GPU that is meant, and they fit it."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mdkv_vllm.kernels.interface import GPU_HEAD_SIZES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "build-cuda.sh"
ARCHITECTURES = ("80", "89", "90a", "100", "120")
REGISTERS = 65536
"""Of a multiprocessor."""

_KERNEL = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*?Used (\d+) registers(.*?)\n",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of a kernel."""

    name: str
    architecture: str
    stack: int
    spilled: int
    registers: int
    static_shared: int


def find_nvcc():
    """As the script does."""
    places = [os.environ.get("NVCC"), "nvcc", "/usr/local/cuda/bin/nvcc"]
    places += Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/cu*/bin/nvcc")
    return next((found for place in places if place and (found := shutil.which(place))), None)


@dataclass(frozen=True)
class Built:
    """A finished build."""

    library: Path
    folder: Path
    kernels: tuple[Kernel, ...]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed (scripts/setup-cpu.sh --dev installs it on x86_64)")
    folder = tmp_path_factory.mktemp("cuda")
    library = folder / "libmdkv_cuda.so"
    environment = os.environ | {"NVCC": nvcc, "OUT": str(library), "BUILD": str(folder)}
    command = [SCRIPT, *ARCHITECTURES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = []
    for log in folder.glob("*.log"):
        for name, architecture, stack, stored, loaded, registers, more in _KERNEL.findall(
            log.read_text()
        ):
            static = re.search(r"(\d+) bytes smem", more)
            numbers = int(stack), int(stored) + int(loaded), int(registers)
            kernels.append(Kernel(name, architecture, *numbers, int(static[1]) if static else 0))
    return Built(library, folder, tuple(kernels))


def test_every_kernel_for_every_gpu(built):
    assert built.library.stat().st_size > 0
    expected = {
        (name, architecture)
        for name in ("prepare_units", "merge_parts", *(f"ILi{size}E" for size in GPU_HEAD_SIZES))
        for architecture in ARCHITECTURES
    }
    found = {
        (name, kernel.architecture)
        for kernel in built.kernels
        for name, _ in expected
        if name in kernel.name
    }
    assert found == expected
    assert len(built.kernels) == len(expected)


def test_no_spills(built):
    assert [k for k in built.kernels if k.stack or k.spilled] == []


def test_as_many_warps_as_meant(built):
    """12 warps per multiprocessor, 8 for heads of 256; shared memory is allocated by the host."""
    for kernel in built.kernels:
        assert kernel.static_shared == 0
        if "attend_share" in kernel.name:
            warps = 8 if "ILi256E" in kernel.name else 12
            assert warps * 32 * kernel.registers <= REGISTERS, kernel


def cuobjdump():
    triton = pytest.importorskip("triton", reason="cuobjdump is triton's")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_pages_are_copied_16_bytes_at_a_time(built, architecture):
    """Asynchronously, past the registers; and products are the tensor cores'."""
    command = [cuobjdump(), "-sass", "-arch", f"sm_{architecture}", built.folder / "attend_128.o"]
    sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    copies = re.findall(r"\bLDGSTS\S*", sass)
    assert copies
    assert all(".128" in copy for copy in copies)
    assert len(re.findall(r"\bLDSM\S*\.4\b", sass)) > 16
    products = re.findall(r"\bHMMA\S*", sass)
    assert len(products) > 64
    assert all(".16816.F32" in product for product in products)
    assert not re.search(r"\b(LDL|STL)\b", sass)


def test_code_for_later_gpus(built):
    command = [cuobjdump(), "-ptx", built.folder / "attend_64.o"]
    ptx = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert ".target sm_120" in ptx
    assert re.search(r"cp\.async\.cg\.shared\.global\S* \[%\w+\], \[%\w+\], 16;", ptx)


def test_unknown_architecture(tmp_path):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed (scripts/setup-cpu.sh --dev installs it on x86_64)")
    environment = os.environ | {"NVCC": nvcc, "BUILD": str(tmp_path)}
    done = subprocess.run([SCRIPT, "37"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "knows no compute_37; it knows compute_" in done.stderr


def test_says_that_there_is_no_nvcc(tmp_path):
    """From a checkout without .venv, with nothing on the path that could compile."""
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(SCRIPT, tmp_path / "scripts")
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("there is an nvcc where CUDA toolkits are installed")
    environment = {"PATH": "/usr/bin:/bin"}
    if shutil.which("nvcc", path=environment["PATH"]):
        pytest.skip("there is an nvcc among the system's programs")
    done = subprocess.run([script], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("build-cuda: no nvcc found")
