"""The compile tests again with the oldest Triton that is meant, that of torch 2.11."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
OLDEST = Path(sys.prefix) / "triton-3.6"
"""Where `scripts/setup-cpu.sh --dev` puts it."""


@pytest.mark.skipif(not OLDEST.exists(), reason="x86-64 only")
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_triton_compress_compile.py", "90 and (128 or small or allocation)"),
        ("test_triton_compile.py", "90 and 128"),
    ],
)
def test_the_oldest_triton_compiles_the_kernels(file, chosen):
    program = (
        "import sys, triton, pytest; assert triton.__version__.startswith('3.6.'); "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "-q", "-x", HERE / file, "-k", chosen],
        cwd=HERE.parents[1],
        env=os.environ | {"PYTHONPATH": str(OLDEST)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
