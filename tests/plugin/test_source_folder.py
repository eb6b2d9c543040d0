"""A Python started in a checkout finds the triton_kernels that vLLM means, or none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[2]
ASK = """
from mdkv_vllm.plugin import platform_class, register
{first}()
from vllm.utils.import_utils import has_triton_kernels, import_triton_kernels
print("found", has_triton_kernels())
if has_triton_kernels():
    import triton_kernels
    print("in", triton_kernels.__file__)
"""


def ask(folder, first, places=()):
    """What vLLM finds in a Python started in a folder, which is then first on its path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(first=first)], cwd=folder, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(("found", "in"))]


@pytest.mark.parametrize("first", ["register", "platform_class"])
def test_without_the_package(tmp_path, first):
    assert (ROOT / "triton_kernels").is_dir()
    assert ask(ROOT, first) == ask(tmp_path, first) == ["found False"]


def test_with_the_package(tmp_path):
    package = tmp_path / "triton_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    expected = ["found True", f"in {package / '__init__.py'}"]
    assert ask(ROOT, "register", [tmp_path]) == expected
