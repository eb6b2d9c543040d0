"""vLLM on a GPU machine: what is packed for it, and the walk through its engines on a CPU."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from io import BytesIO
from lzma import LZMAFile

import gpu_kit
import pytest

from benchmarks.gpu.vllm import bundle, engines, serve
from benchmarks.gpu.vllm.fatbin import keep_architecture

NVCC = shutil.which("nvcc") or next(
    iter(
        (gpu_kit.FOLDER.parents[1] / ".venv").glob("lib/python3*/site-packages/nvidia/cu*/bin/nvcc")
    ),
    None,
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A CUDA library for two architectures."""
    if NVCC is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("fatbin")
    source, built = folder / "kernel.cu", folder / "kernel.so"
    source.write_text('extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= 3; }\n')
    command = [NVCC, "-shared", "-Xcompiler", "-fPIC", "-cudart", "none", source, "-o", built]
    for arch in ("80", "90"):
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    library = str(gpu_kit.FOLDER)  # a folder that exists, where nothing is to be found
    subprocess.run([*command, "-L", library], check=True, capture_output=True)
    return built.read_bytes()


def test_code_for_other_gpus_becomes_zeros(library):
    kept, zeroed = keep_architecture(library, 90)
    assert len(kept) == len(library)
    assert zeroed > 0
    differ = [i for i, (a, b) in enumerate(zip(library, kept, strict=True)) if a != b]
    assert differ
    assert all(kept[i] == 0 for i in differ)
    again, more = keep_architecture(kept, 90)
    assert (again, more) == (kept, zeroed)
    assert keep_architecture(library, 80)[0] != kept


def test_a_library_without_the_architecture_is_refused(library):
    with pytest.raises(ValueError, match="no machine code for sm_75"):
        keep_architecture(library, 75)
    with pytest.raises(ValueError, match="not a 64-bit"):
        keep_architecture(b"MZ" + bytes(100), 90)


def test_needed_packages_are_pinned():
    requirements = gpu_kit.FOLDER.parents[1] / "requirements" / "cuda.txt"
    found = bundle.pinned(bundle.WHEELS, requirements)
    assert len(found) == len(set(bundle.WHEELS)) == 42
    assert all("==" in line for line in found)
    with pytest.raises(bundle.BundleError, match="has no no-such-thing"):
        bundle.pinned(["pydantic", "no-such-thing"], requirements)


def test_what_of_vllm_is_carried(tmp_path):
    content = BytesIO()
    names = [
        "vllm/a.py",
        "vllm/_C.abi3.so",
        "vllm/third_party/x.hpp",
        "vllm/third_party/pynvml.py",
        "vllm-0.32.0.dist-info/METADATA",
    ]
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    with zipfile.ZipFile(content) as archive:
        path = bundle.pack_python(archive, tmp_path / "vllm.tar.xz")
    with LZMAFile(path) as packed, tarfile.open(fileobj=BytesIO(packed.read())) as tar:
        assert tar.getnames() == [name for name in names if not name.endswith((".so", ".hpp"))]


def test_a_folder_over_the_limit_is_refused(tmp_path, monkeypatch):
    (tmp_path / "part").write_bytes(bytes(1000))
    assert bundle.check_size(tmp_path) == 1000
    monkeypatch.setattr(bundle, "LIMIT", 999)
    with pytest.raises(bundle.BundleError, match="may travel"):
        bundle.check_size(tmp_path)


def test_the_package_is_found_by_its_entry_points():
    points = bundle.metadata()["entry_points.txt"]
    assert "[vllm.platform_plugins]\nmixeddim = mdkv_vllm.plugin:platform_class" in points
    assert "[vllm.general_plugins]" in points


def test_engines_are_asked_the_same():
    loads = [engine.name for engine in serve.engines(rehearse=False) if engine.loaded]
    assert loads[:4] == ["stock", "ours, 100 %", "ours, 25 %", "ours, 12.5 %"]
    sizes = engines.H100
    # Eight requests of the full load fill the cache of stock, in 16 bits.
    token = 2 * 32 * 8 * 128 * 2
    length = sizes.prompt_tokens + sizes.new_tokens
    assert 7 <= sizes.kv_bytes / token / length < 9


def test_agreement_with_stock():
    stock = {"tokens": [[1, 2], [3, 4]], "logprobs": [[-1.0, -2.0], [-3.0, -4.0]]}
    ours = {"tokens": [[1, 2], [3, 9]], "logprobs": [[-1.0, -2.25], [-3.0, -9.0]]}
    told = serve._agreement(ours, stock)
    assert told == "first tokens 2 of 2 as stock's, answers 1, log-probabilities within 0.250"


@pytest.mark.server
@pytest.mark.alone
def test_rehearsal(tmp_path):
    """Stock vLLM on this CPU beside ours; an engine that cannot start costs itself."""
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, gpu_kit.FOLDER / "vllm" / "serve.py", "--rehearse", "--json", path]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("MDKV_GPU_REHEARSAL", None)
    done = subprocess.run(
        [*command, "--deadline", "400", "--seconds", "150"], env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    states = {row["job"]: row["state"] for row in rows if row["kind"] == "ended"}
    assert done.returncode == 1, done.stdout
    assert "Unknown attention backend" in states.pop("no such backend")
    assert set(states.values()) == {"ok"}, done.stdout
    parts = {(row["engine"], row["part"]): row for row in rows if row["kind"] == "engine"}
    stock, ours = (parts[name, "compare"] for name in ("stock", "ours, 100 %"))
    assert ours["tokens"] == stock["tokens"]
    assert parts["ours, 100 %", "start"]["kernels"] == (
        "MIXEDDIM, decode by cpu, prefill by vLLM's CPU kernel"
    )
    assert parts["stock", "start"]["kernels"] == "CPU_ATTN"
    for name in ("stock", "ours, 100 %", "ours, 25 %"):
        full = parts[name, "full"]
        assert full["output_tokens_per_second"] > 0
        assert 0 < full["resident"] <= engines.REHEARSED.prompts
        assert parts[name, "alone"]["per_token"] > 0
    assert "ours, 100 %: started in" in done.stdout
    assert "answers 3" in done.stdout
