"""Count a kernel's machine instructions, loop by loop, in a library or a cubin.

    python benchmarks/gpu/sass.py mdkv_vllm/libmdkv_cuda.so --kernel attend_shareILi128

Needs no GPU: cuobjdump comes with Triton. A loop is what a backward branch spans; instructions of
loops inside are told apart. How often a loop runs is for the reader to say.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_ARCHITECTURE = re.compile(r"\s*code for (sm_\w+)")
_FUNCTION = re.compile(r"Function : (\S+)")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")


@dataclass(frozen=True)
class Loop:
    """Instructions that a backward branch repeats.

    Attributes:
        first: address of the first.
        last: address of the branch.
        instructions: in all.
        own: outside of the loops within.
        depth: loops around it.
    """

    first: int
    last: int
    instructions: int
    own: int
    depth: int


def disassemble(path: Path) -> dict[str, list[tuple[int, str]]]:
    """Addresses and instructions of every kernel in a file, by architecture and name."""
    done = subprocess.run([CUOBJDUMP, "-sass", path], capture_output=True, text=True, check=True)
    kernels: dict[str, list[tuple[int, str]]] = {}
    code: list[tuple[int, str]] = []
    architecture = ""
    for line in done.stdout.splitlines():
        if found := _ARCHITECTURE.match(line):
            architecture = found[1]
        elif found := _FUNCTION.search(line):
            code = kernels[f"{architecture} {found[1]}"] = []
        elif found := _INSTRUCTION.match(line):
            code.append((int(found[1], 16), found[2]))
    return kernels


def loops(code: Sequence[tuple[int, str]]) -> list[Loop]:
    """A kernel's loops, by their address; the endless one behind its end is none."""
    spans = set()
    for address, instruction in code:
        branch = _BRANCH.search(instruction)
        if branch and int(branch[1], 16) < address:
            spans.add((int(branch[1], 16), address))

    def inside(span: tuple[int, int], other: tuple[int, int]) -> bool:
        return span != other and other[0] <= span[0] and span[1] <= other[1]

    found = []
    for first, last in sorted(spans):
        within = [address for address, _ in code if first <= address <= last]
        inner = [span for span in spans if inside(span, (first, last))]
        own = sum(not any(a <= address <= b for a, b in inner) for address in within)
        depth = sum(inside((first, last), span) for span in spans)
        found.append(Loop(first, last, len(within), own, depth))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts; exit status 1 where no kernel has the name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a shared library or a cubin")
    parser.add_argument("--kernel", default="", help="part of the names of those to print")
    options = parser.parse_args(arguments)
    chosen = {n: code for n, code in disassemble(options.path).items() if options.kernel in n}
    for name, code in chosen.items():
        print(f"{name}: {len(code)} instructions")
        for loop in loops(code):
            indent = "  " * (loop.depth + 1)
            print(f"{indent}{loop.first:#x} to {loop.last:#x}: {loop.instructions}, own {loop.own}")
    return 0 if chosen else 1


if __name__ == "__main__":
    sys.exit(main())
