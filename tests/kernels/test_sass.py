"""Loops are found in machine code, and what is inside them."""

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from gpu_kit import sass
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def nested(x, rows, columns):
    """Two loops, one in the other."""
    total = 0.0
    for row in tl.range(0, rows, loop_unroll_factor=1):
        for column in tl.range(0, columns, loop_unroll_factor=1):
            total = total * 0.5 + tl.load(x + row * columns + column)
        tl.store(x + row, total)


def test_nested_loops(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    source = ASTSource(nested, {"x": "*fp32", "rows": "i32", "columns": "i32"}, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    path = tmp_path / "nested.cubin"
    path.write_bytes(compiled.asm["cubin"])
    code = sass.disassemble(path)["sm_90a nested"]
    found = sass.loops(code)
    inner = [loop for loop in found if loop.depth == 1]
    assert inner
    for loop in inner:
        around = [o for o in found if o.first <= loop.first < loop.last <= o.last and o is not loop]
        assert len(around) == 1
        outer = around[0]
        assert 0 < loop.own == loop.instructions < outer.instructions < len(code)
        within = [i for i in inner if outer.first <= i.first and i.last <= outer.last]
        assert outer.own == outer.instructions - sum(i.instructions for i in within)
    assert sass.main([str(path), "--kernel", "nest"]) == 0
    assert f"sm_90a nested: {len(code)} instructions" in capsys.readouterr().out
    assert sass.main([str(path), "--kernel", "other"]) == 1
