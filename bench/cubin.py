"""What the compiler made of a GPU kernel, read from its cubin by NVIDIA's disassembler: no GPU is needed.

PTX shows the loads that were asked for; registers, spills and the loads inside of a loop are decided only by ptxas.
"""

import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", re.M)
LABEL = re.compile(r"^(\.L_x_\d+):", re.M)
MMA = re.compile(r"(HGMMA|HMMA|QGMMA|UTCHMMA|FFMA)")
WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}  # of an instruction's modifiers; else 4 bytes


class Resources(NamedTuple):
    """What one streaming multiprocessor has: registers, warps, blocks, and bytes of shared memory."""

    registers: int
    warps: int
    blocks: int
    shared: int


MULTIPROCESSORS = {  # by compute capability
    80: Resources(65536, 64, 32, 164 << 10),
    90: Resources(65536, 64, 32, 228 << 10),
    120: Resources(65536, 48, 24, 100 << 10),
}


class Instruction(NamedTuple):
    name: str  # with modifiers, such as LDG.E.128
    operands: str
    at: int  # where it stands in the text

    @property
    def width(self) -> int:
        """The bytes that a thread moves by this load, store or copy."""
        return next((width for modifier, width in WIDTHS.items() if modifier in self.name), 4)


class Kernel(NamedTuple):
    """One compiled kernel: a program is a block of threads."""

    registers: int  # of a thread
    shared: int  # bytes of a program
    warps: int  # of a program
    instructions: list[Instruction]
    loops: list[tuple[int, int]]  # innermost ones: the first and the last position in the text

    def count(self, pattern: str, hot: bool = False) -> int:
        """Instructions whose name begins with a match of `pattern`; if `hot`, those in innermost loops."""
        return len(self.matches(pattern, hot))

    def matches(self, pattern: str, hot: bool = False) -> list[Instruction]:
        within = self.loops if hot else [(0, self.instructions[-1].at)]
        return [
            one
            for one in self.instructions
            if re.match(pattern, one.name) and any(begin <= one.at <= end for begin, end in within)
        ]

    def widths(self, pattern: str, hot: bool = False) -> dict[int, int]:
        """Bytes of an instruction -> how many of them there are."""
        found = [one.width for one in self.matches(pattern, hot)]
        return {width: found.count(width) for width in sorted(set(found), reverse=True)}

    @property
    def spills(self) -> int:
        """Loads and stores of registers that did not suffice."""
        return self.count("LDL|STL")

    @property
    def spills_in_main_loops(self) -> int:
        """Those in the innermost loops that multiply matrices."""
        main = [(a, b) for a, b in self.loops if any(MMA.match(i.name) and a <= i.at <= b for i in self.instructions)]
        return self._replace(loops=main).count("LDL|STL", hot=True)

    def resident_warps(self, capability: int) -> int:
        """The warps that a multiprocessor holds at a time."""
        has = MULTIPROCESSORS[capability]
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        shared = has.shared // (self.shared + 1024)
        return min(has.registers // registers, shared, has.warps // self.warps, has.blocks) * self.warps


@cache
def tool(name: str) -> str:
    import triton.backends.nvidia

    return str(Path(os.path.dirname(triton.backends.nvidia.__file__), "bin", name))


def disassemble(path: str, *options: str) -> str:
    return subprocess.run([tool("nvdisasm"), "-c", *options, path], capture_output=True, text=True, check=True).stdout


def read(cubin: bytes, warps: int, shared: int) -> Kernel:
    """The only kernel of a cubin; its launch decides on warps, and dynamic shared memory is not in the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        text = disassemble(file.name)
    found = re.search(r"REG:(\d+) .*?SHARED:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump shows no registers: {usage}")
    return parse(text, int(found[1]), warps, shared + int(found[2]))


def parse(text: str, registers: int, warps: int, shared: int) -> Kernel:
    instructions = [Instruction(one[1], one[2], one.start()) for one in INSTRUCTION.finditer(text)]
    labels = {one[1]: one.start() for one in LABEL.finditer(text)}
    loops = []
    for one in instructions:
        target = re.search(r"`\((\.L_x_\d+)\)", one.operands)
        begin = labels[target[1]] if target and one.name.startswith("BRA") else one.at
        if any(begin < other.at < one.at for other in instructions):  # not the branch to itself after a kernel's end
            loops.append((begin, one.at))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return Kernel(registers, shared, warps, instructions, inner)
