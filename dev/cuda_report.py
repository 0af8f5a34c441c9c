#!/usr/bin/env python3
"""Compile the CUDA kernels for every architecture and report on them. Needs nvcc but no GPU.

    dev/cuda_report.py                        sm_75 to sm_120, and PTX for later ones
    dev/cuda_report.py --architectures 90

Prints Markdown tables of registers and, if cuobjdump is found, of instructions per sample and row. The exit code is 1
if a kernel does not compile or spills registers.

Instructions are those of a warp for rows of 32 channels with 4 levels of 4 points, the whole kernel, divided by the
samples and rows that the warp serves. Counted in the machine code: loops as often as they run, both sides of every
branch. The design of 2020 (dev/baseline_2020.cu) is counted in the same way.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "ops" / "csrc" / "cuda" / "ms_deform_attn_cuda.cu"
BASELINE = ROOT / "dev" / "baseline_2020.cu"
ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]
COUNTED = ["80", "90"]  # without and with additions of four numbers at once
LEVELS, POINTS, LANES_OF_WARP = 4, 4, 32


def compile_for(architecture: str, source: Path, binary: Path) -> str:
    """Compile for an architecture and return ptxas's messages."""
    kind = "-ptx" if architecture.startswith("compute") else "-cubin"
    command = ["nvcc", kind, "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Xptxas", "-v"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-arch={architecture}"]
    command += [f"-DDINO_D2_CUDA_CODE={architecture}"]
    command += [f"-I{path}" for path in include_paths("cuda")]
    result = subprocess.run([*command, str(source), "-o", str(binary)], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{architecture}: nvcc failed\n{result.stderr}")
    return result.stderr


def kernels_of(messages: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of each kernel, by its mangled name."""
    pattern = r"entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill.*?Used (\d+) registers"
    return {
        name: (int(registers), int(stack) + int(spilled))
        for name, stack, spilled, registers in re.findall(pattern, messages, re.DOTALL)
    }


def readable(name: str) -> str:
    """`forward float 4x8, 4x4`: value type, channels of a lane x lanes of a row, levels x points if they are fixed."""
    types = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16"}
    match = re.search(r"\d+([a-z_]+)_kernel(?:I(f|d|6__half|13__nv_bfloat16))?", name)
    kind, dtype = match.groups()
    parts = [kind.replace("_", " "), types.get(dtype)]
    if layout := layout_of(name):
        channels, lanes, levels, points = layout
        parts.append(f"{channels}x{lanes}" + (f", {levels}x{points}" if levels else ""))
    parts.append("deterministic" if "EEELb1E" in name else None)
    parts.append("16-bit offsets" if "S2_EEv" in name else None)
    return " ".join(part for part in parts if part)


def layout_of(name: str) -> tuple[int, int, int, int] | None:
    """Channels of a lane, lanes of a row, levels and points (0 if not fixed)."""
    match = re.search(r"LayoutILi(\d+)ELi(\d+)ELb[01]ELi(\d+)ELi(\d+)E", name)
    return tuple(map(int, match.groups())) if match else None


def find_cuobjdump() -> str | None:
    triton = find_spec("triton")
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    return shutil.which("cuobjdump") or (str(beside) if beside and beside.exists() else None)


def functions_of(cuobjdump: str, binary: Path) -> dict[str, list[str]]:
    """The instructions of each kernel up to the last exit, by its mangled name; branches with the index they go to."""
    listing = subprocess.run([cuobjdump, "--dump-sass", str(binary)], capture_output=True, text=True, check=True).stdout
    result = {}
    for function in re.split(r"\n\s*Function : ", listing)[1:]:
        code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", function)
        index = {int(address, 16): i for i, (address, _) in enumerate(code)}
        texts = []
        for _, text in code:
            target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            texts.append(f"BRA to {index[int(target[1], 16)]}" if target else text)
        last = max(i for i, text in enumerate(texts) if "EXIT" in text)
        result[function.split("\n")[0].strip()] = texts[: last + 1]
    return result


def loops_of(code: list[str]) -> list[tuple[int, int]]:
    """First and last instruction of every loop, the outer ones first."""
    branches = [(int(text.split()[-1]), i) for i, text in enumerate(code) if text.startswith("BRA to")]
    return sorted((first, last) for first, last in branches if first < last)


def instructions_per_sample(code: list[str], layout: tuple[int, int, int, int] | None) -> float:
    """As the module says. `layout` None: the design of 2020, a warp for a row, loops over levels and points."""
    total = len(code)
    loops = loops_of(code)
    if layout is None:
        (outer, inner) = loops
        size_of = {loop: loop[1] - loop[0] + 1 for loop in loops}
        per_level = size_of[outer] - size_of[inner]
        total += (LEVELS - 1) * per_level + (LEVELS * POINTS - 1) * size_of[inner]
        return total / (LEVELS * POINTS)
    lanes = layout[1]
    for first, last in loops:  # over the samples of one pass, of which each is two reads of shared memory
        body = code[first : last + 1]
        samples = sum("LDS.128" in text for text in body) // 2
        if samples:  # otherwise it is a block that the compiler moved
            total += len(body) * (lanes // samples - 1)
    return total / (LEVELS * POINTS) / (LANES_OF_WARP // lanes)


def print_table(title: str, rows: dict[str, dict[str, object]], architectures: list[str]) -> None:
    print(f"| {title} | " + " | ".join(f"sm_{name}" for name in architectures) + " |")
    print("| --- |" + " ---: |" * len(architectures))
    for name in sorted(rows):
        print(
            f"| {name} | " + " | ".join(str(rows[name].get(architecture, "")) for architecture in architectures) + " |"
        )
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, help=f"default {' '.join(ARCHITECTURES)}")
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("nvcc not found: install the CUDA toolkit, or add its bin folder to PATH")
    registers, counts, spills = {}, {}, []
    cuobjdump = find_cuobjdump()
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernels.cubin")
        for architecture in args.architectures:
            found = kernels_of(compile_for(f"sm_{architecture}", SOURCE, binary))
            spills += [f"sm_{architecture} {readable(name)}" for name, (_, spilled) in found.items() if spilled]
            for name, (count, _) in found.items():
                registers.setdefault(readable(name), {})[architecture] = count
            if not cuobjdump or architecture not in COUNTED:
                continue
            for name, code in functions_of(cuobjdump, binary).items():
                layout = layout_of(name)
                if layout and layout[2:] == (LEVELS, POINTS):
                    count = instructions_per_sample(code, layout)
                    counts.setdefault(readable(name), {})[architecture] = f"{count:.1f}"
            compile_for(f"sm_{architecture}", BASELINE, binary)
            for name, code in functions_of(cuobjdump, binary).items():
                kind = f"{readable(name).split()[0]} of 2020"
                counts.setdefault(kind, {})[architecture] = f"{instructions_per_sample(code, None):.0f}"
        compile_for(f"compute_{args.architectures[-1]}", SOURCE, Path(folder, "ptx"))
    print_table("registers", registers, args.architectures)
    if counts:
        print_table("instructions", counts, [name for name in args.architectures if name in COUNTED])
    if spills:
        print("\nspilled registers: " + ", ".join(spills))
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
