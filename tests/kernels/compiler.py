"""Compile kernels ahead of time for a GPU that is not there, and read what came out."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mdkv_vllm.kernels.triton.attend import attend_split
from mdkv_vllm.kernels.triton.merge import merge_parts
from mdkv_vllm.kernels.triton.prepare import prepare_units
from mdkv_vllm.kernels.triton.shapes import DecodeShape

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may have, by compute capability."""

KERNELS = {
    "prepare": (prepare_units, {"KEEP": True}),
    "attend": (attend_split, {"STAGES": 1}),
    "merge": (merge_parts, {"SPLITS": 128, "ROWS": 16, "HAS_LSE": True}),
}

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

_POINTERS = {
    "cache": "u8",
    "block_table": "i32",
    "query_rows": "i32",
    "lengths": "i32",
    "leases": "i32",
    "records": "i32",
    "extents": "i32",
} | dict.fromkeys(("rotated", "part_out", "part_lse", "basis_keys", "basis_values", "lse"), "fp32")


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes, and its PTX."""

    registers: int
    stack: int
    local: int
    shared: int
    ptx: str

    def load_widths(self, source: Path, text: str) -> set[int]:
        """Bits of every global load that stems from a line of a source file."""
        lines = source.read_text().splitlines()
        numbers = {str(n) for n, line in enumerate(lines, 1) if text in line}
        assert numbers, text
        file = re.search(rf'\.file\s+(\d+)\s+"[^"]*"?.*{source.name}"', self.ptx)
        assert file is not None
        widths, here, in_asm = set(), False, False
        for line in self.ptx.splitlines():
            if "inline asm" in line:  # loads are; positions within one mean nothing
                in_asm = "begin" in line
            elif location := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
                if not in_asm:
                    here = location[1] == file[1] and location[2] in numbers
            elif here and (load := re.search(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", line)):
                widths.add(int(load[1] or 1) * int(load[2]))
        return widths


def compile_kernel(name: str, shape: DecodeShape, capability: int) -> Compiled:
    """Compile one of :data:`KERNELS` for one compute capability."""
    kernel, constants = KERNELS[name]
    constants = constants | {"SHAPE": shape}
    types = _POINTERS | dict.fromkeys(("query", "output", "recent"), shape.element.name)

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in types:
            return f"*{types[argument]}"
        return "fp32" if argument == "scale" else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    return compile_signature(kernel, signature, constants, capability, shape.num_warps)


def compile_signature(
    kernel: JITFunction,
    signature: dict[str, str],
    constants: dict[str, object],
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """Compile any kernel; pointers are 16-byte aligned."""
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        counts["REG"],
        counts["STACK"],
        counts["LOCAL"],
        compiled.metadata.shared,
        compiled.asm["ptx"],
    )
