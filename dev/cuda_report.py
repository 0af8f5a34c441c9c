#!/usr/bin/env python3
"""Compile the CUDA kernels for every architecture and report on them. Needs nvcc but no GPU.

    dev/cuda_report.py                        sm_75 to sm_120, and PTX for later ones
    dev/cuda_report.py --architectures 90

Prints a Markdown table of registers, and of instructions per sample and row if cuobjdump is found. The exit code is 1
if a kernel does not compile or spills registers.
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
ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]
COUNTED = "90"
# Instructions in the sample loop of the design of 2020, one warp per row, 32 channels in float32, for sm_90.
BASELINE = {"forward": 83, "backward": 272}


def compile_for(architecture: str, binary: Path) -> str:
    """Compile for an architecture and return ptxas's messages."""
    kind = "-ptx" if architecture.startswith("compute") else "-cubin"
    command = ["nvcc", kind, "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Xptxas", "-v"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-arch={architecture}"]
    command += [f"-DDINO_D2_CUDA_CODE={architecture}"]
    command += [f"-I{path}" for path in include_paths("cuda")]
    result = subprocess.run([*command, str(SOURCE), "-o", str(binary)], capture_output=True, text=True)
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
    """`forward float 4x8`: value type, channels of a lane x lanes of a row."""
    types = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16"}
    match = re.search(r"\d+([a-z_]+)_kernel(?:I(f|d|6__half|13__nv_bfloat16)(?:.*?LayoutILi(\d+)ELi(\d+)E)?)?", name)
    kind, dtype, channels, lanes = match.groups()
    parts = [kind.replace("_", " "), types.get(dtype), f"{channels}x{lanes}" if lanes else None]
    parts.append("deterministic" if "ELb0EEELb1E" in name else None)
    return " ".join(part for part in parts if part)


def find_cuobjdump() -> str | None:
    triton = find_spec("triton")
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    return shutil.which("cuobjdump") or (str(beside) if beside and beside.exists() else None)


def instructions_per_sample(cuobjdump: str, binary: Path) -> dict[str, float]:
    """Instructions of a warp per sample, divided by the rows that it handles, for rows of 32 channels.

    Counted in the loop over samples, LANES at a time, including both sides of every branch; inner loops count as often
    as they run.
    """
    listing = subprocess.run([cuobjdump, "--dump-sass", str(binary)], capture_output=True, text=True, check=True).stdout
    result = {}
    for function in re.split(r"\n\s*Function : ", listing)[1:]:
        name = function.split("\n")[0].strip()
        layout = re.search(r"LayoutILi(\d+)ELi(\d+)ELb1", name)
        if not layout or int(layout[1]) * int(layout[2]) != 32:
            continue
        lanes = int(layout[2])
        code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", function)
        index = {int(address, 16): i for i, (address, _) in enumerate(code)}
        loops = []
        for i, (_, text) in enumerate(code):
            target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            if target and index.get(int(target[1], 16), i + 1) < i:
                loops.append((index[int(target[1], 16)], i))
        samples = [loop for loop in loops if any("STS.128" in text for _, text in code[slice(*loop)])]
        start, end = max(samples, key=lambda loop: loop[1] - loop[0])
        total = end - start + 1
        for first, last in loops:
            if start < first and last < end:
                taken = sum("LDS.128" in text for _, text in code[first:last]) // 2  # two per sample
                total += (last - first + 1) * (lanes // taken - 1)
        result[name] = total / lanes / (32 // lanes)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, help=f"default {' '.join(ARCHITECTURES)}")
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("nvcc not found: install the CUDA toolkit, or add its bin folder to PATH")
    registers, counts, spills = {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in args.architectures:
            binary = Path(folder, f"{architecture}.cubin")
            found = kernels_of(compile_for(f"sm_{architecture}", binary))
            spills += [f"sm_{architecture} {readable(name)}" for name, (_, spilled) in found.items() if spilled]
            for name, (count, _) in found.items():
                registers.setdefault(name, {})[architecture] = count
            if architecture == COUNTED and (cuobjdump := find_cuobjdump()):
                counts = instructions_per_sample(cuobjdump, binary)
        compile_for(f"compute_{args.architectures[-1]}", Path(folder, "ptx"))
    print("| kernel | instructions | " + " | ".join(f"sm_{name}" for name in args.architectures) + " |")
    print("| --- | ---: |" + " ---: |" * len(args.architectures))
    for name in sorted(registers, key=readable):
        count = f"{counts[name]:.1f}" if name in counts else ""
        row = " | ".join(str(registers[name].get(architecture, "")) for architecture in args.architectures)
        print(f"| {readable(name)} | {count} | {row} |")
    print(
        f"\nRegisters; instructions are those per sample and row on sm_{COUNTED}, of which the design of 2020 needs "
        f"{BASELINE['forward']} forward and {BASELINE['backward']} backward. 4x8: 4 channels on each of 8 lanes."
    )
    if spills:
        print("\nspilled registers: " + ", ".join(spills))
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
