"""Pack vLLM, what it needs, and this project into one folder for a GPU machine without a network.

    python benchmarks/gpu/vllm/bundle.py --out results/gpu-vllm --cache /tmp/wheels

Made for Python 3.12, torch 2.11 and triton 3.6 on one Hopper GPU, which the machine has. Everything
comes from the package index by name. Nothing of it is ever committed; `results/` is ignored by git.
"""

from __future__ import annotations

import argparse
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[0] = str(ROOT)

from benchmarks.gpu.vllm.fatbin import keep_architecture  # noqa: E402
from mdkv_vllm import __version__  # noqa: E402

VLLM = "vllm==0.32.0"
LIMIT = 60 << 20
"""Bytes of the folder: 64 MiB may travel, the project's own files among them."""
ARCHITECTURE = 90
EXTENSIONS = (
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/_moe_C_stable_libtorch.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
)
LEFT_OUT = ("vllm/vllm-rs", "vllm/benchmarks/")
"""Of vLLM's files: a front end that is not started."""
THIRD_PARTY = "vllm/third_party/"
"""Of which Python alone goes along, NVML's bindings: the rest are other GPUs' kernels."""
WHEELS = [
    "annotated-types",
    "apache-tvm-ffi",
    "cachetools",
    "cbor2",
    "compressed-tensors",
    "dill",
    "dnspython",
    "email-validator",
    "fastapi",
    "googleapis-common-protos",
    "httpcore2",
    "httpx2",
    "jiter",
    "llguidance",
    "loguru",
    "msgspec",
    "openai",
    "opentelemetry-api",
    "opentelemetry-exporter-http-transport",
    "opentelemetry-exporter-otlp",
    "opentelemetry-exporter-otlp-proto-common",
    "opentelemetry-exporter-otlp-common",
    "opentelemetry-exporter-otlp-proto-grpc",
    "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry-proto",
    "opentelemetry-sdk",
    "opentelemetry-semantic-conventions",
    "opentelemetry-semantic-conventions-ai",
    "oss-harmony",
    "partial-json-parser",
    "pybase64",
    "pydantic",
    "pydantic-core",
    "pydantic-extra-types",
    "python-multipart",
    "pyzmq",
    "setproctitle",
    "sniffio",
    "starlette",
    "truststore",
    "typing-inspection",
    "xgrammar",
]
"""What vLLM imports and the machine lacks, at the versions of requirements/cuda.txt."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


class BundleError(Exception):
    """A part is missing, or the folder is too large."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the folder; exit status 1 with the reason where it cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu-vllm")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "wheels")
    options = parser.parse_args(arguments)
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    try:
        for path in make(options.out, options.cache):
            print(
                f"{path.stat().st_size / 1e6:8.1f} MB  {path.relative_to(options.out)}", flush=True
            )
        total = check_size(options.out)
    except (BundleError, ValueError) as error:
        print(f"bundle.py: {error}", file=sys.stderr)
        return 1
    print(f"{total / 1e6:8.1f} MB  of {LIMIT / 1e6:.1f}")
    return 0


def make(out: Path, cache: Path) -> Iterator[Path]:
    """Write the parts, one after the other."""
    wheel = download([VLLM], cache / "vllm")[0]
    with zipfile.ZipFile(wheel) as archive:
        yield pack_python(archive, out / "vllm.tar.xz")
        for name in EXTENSIONS:
            yield pack_extension(archive, name, out / "extensions")
    (out / "wheels").mkdir()
    for path in download(pinned(WHEELS, ROOT / "requirements" / "cuda.txt"), cache / "needed"):
        yield Path(shutil.copy(path, out / "wheels"))
    yield pack_project(out / "mdkv.tar.xz")


def pinned(names: Iterable[str], requirements: Path) -> list[str]:
    """Names with the versions of a requirements file.

    Raises:
        BundleError: one is not in it.
    """
    lines = [line.split("#")[0].strip() for line in requirements.read_text().splitlines()]
    versions = {line.split("==")[0]: line for line in lines if "==" in line}
    missing = [name for name in names if name not in versions]
    if missing:
        raise BundleError(f"{requirements.name} has no {', '.join(missing)}")
    return [versions[name] for name in names]


def download(packages: Sequence[str], folder: Path) -> list[Path]:
    """Wheels of packages for the machine's Python, from the package index, once."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    command += ["--abi", "cp312", "--abi", "abi3", "--abi", "none"]
    for platform in [*PLATFORMS, "any"]:
        command += ["--platform", platform]
    done = subprocess.run([*command, *packages], capture_output=True, text=True)
    if done.returncode:
        raise BundleError(f"pip download failed:\n{done.stderr[-2000:]}")
    return sorted(folder.glob("*.whl"))


def pack_python(archive: zipfile.ZipFile, path: Path) -> Path:
    """VLLM's Python files and data, and its metadata."""
    with lzma.open(path, "wb", preset=6) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for info in archive.infolist():
            if is_carried(info.filename):
                _add(tar, info.filename, archive.read(info))
    return path


def is_carried(name: str) -> bool:
    """Whether a file of vLLM's wheel goes along as it is."""
    if name.startswith(THIRD_PARTY):
        return name.endswith(".py")
    return not name.endswith((".so", "/")) and not name.startswith(LEFT_OUT)


def pack_extension(archive: zipfile.ZipFile, name: str, folder: Path) -> Path:
    """An extension with the machine's code alone."""
    stripped, _ = keep_architecture(archive.read(name), ARCHITECTURE)
    path = folder / f"{name}.xz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(stripped, preset=6))
    return path


def pack_project(path: Path) -> Path:
    """This project as it would be installed: package, Triton and CUDA kernels, entry points.

    Raises:
        BundleError: the CUDA kernels are not built.
    """
    library = ROOT / "mdkv_vllm" / "libmdkv_cuda.so"
    if not library.exists():
        raise BundleError(f"{library} is not there; build it with `scripts/build-cuda.sh 90a`")
    with lzma.open(path, "wb", preset=6) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for source in sorted((ROOT / "mdkv_vllm").rglob("*")):
            if source.is_file() and source.suffix in (".py", ".html", ".js"):
                _add(tar, str(source.relative_to(ROOT)), source.read_bytes())
        for source in sorted((ROOT / "triton_kernels" / "mixeddim").glob("*.py")):
            _add(tar, f"mdkv_vllm/kernels/triton/{source.name}", source.read_bytes())
        _add(tar, "mdkv_vllm/libmdkv_cuda.so", library.read_bytes())
        for name, content in metadata().items():
            _add(tar, f"mdkv_vllm-{__version__}.dist-info/{name}", content.encode())
    return path


def metadata() -> dict[str, str]:
    """What makes the package found by vLLM: its name, and its entry points of pyproject.toml."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), ""]
    about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {__version__}\n"
    return {"METADATA": about, "entry_points.txt": "\n".join(lines)}


def check_size(out: Path) -> int:
    """Bytes of the folder.

    Raises:
        BundleError: more than :data:`LIMIT`.
    """
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if total > LIMIT:
        raise BundleError(f"{total / 1e6:.1f} MB; at most {LIMIT / 1e6:.1f} MB may travel")
    return total


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


if __name__ == "__main__":
    sys.exit(main())
