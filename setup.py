"""Build the deformable-attention op and install `ops/` as `dino_d2.ops`. Metadata is in pyproject.toml."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import (
        CUDA_HOME,
        BuildExtension,
        CppExtension,
        CUDAExtension,
        _get_cuda_arch_flags,
    )
except ImportError:
    sys.exit(
        "\n\ndino_d2 must be built with the installed torch, but this build environment has no torch.\n"
        "  - if torch is installed:   pip install --no-build-isolation -e .\n"
        "  - if not:                  make setup\n"
    )

STABLE_ABI_SINCE = (2, 10)
# The same file works with torch >= 2.10 (and, through `py_limited_api`, with Python >= 3.10).
ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
HEADERS = sorted(str(path) for path in Path("ops/csrc").rglob("*h") if path.suffix in (".h", ".cuh"))
# Machine code for A100 (which also serves RTX 30 and 40) and H100; PTX for later GPUs.
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def wants_cuda() -> bool:
    """FORCE_CUDA=0|1 decides; otherwise CUDA kernels are built if nvcc and a torch with CUDA are available."""
    forced = os.environ.get("FORCE_CUDA")
    if forced in ("0", "1"):
        return forced == "1"
    has_nvcc = shutil.which("nvcc") is not None or (CUDA_HOME and Path(CUDA_HOME, "bin", "nvcc").exists())
    return bool(has_nvcc) and torch.version.cuda is not None


def extension():
    sources = ["ops/csrc/library.cpp", *sorted(str(path) for path in Path("ops/csrc/cpu").glob("*.cpp"))]
    # The two -fno flags enable vectorised comparison and rounding; they do not change results.
    cxx = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *ABI]
    if not wants_cuda():
        return CppExtension(
            "dino_d2.ops._C", sources, extra_compile_args={"cxx": cxx}, py_limited_api=True, depends=HEADERS
        )
    if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        # PyTorch's builder queries the visible GPU, and fails without one.
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_CUDA_ARCHITECTURES
    sources += sorted(str(path) for path in Path("ops/csrc/cuda").glob("*.cu"))
    # The architectures that PyTorch's builder will pass to nvcc, so that the op knows which GPUs it supports.
    code = [flag.rsplit("=", 1)[1] for flag in _get_cuda_arch_flags()]
    nvcc = ["-O3", "-std=c++17", "-DUSE_CUDA", f"-DDINO_D2_CUDA_CODE={'+'.join(code)}", *ABI]
    result = CUDAExtension(
        "dino_d2.ops._C",
        sources,
        extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc},
        py_limited_api=True,
        depends=HEADERS,
    )
    # torch has already loaded the CUDA runtime; linking it would need the toolkit's library folder.
    result.libraries.remove("cudart")
    return result


def extensions() -> list:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < STABLE_ABI_SINCE:
        print(
            f"dino_d2: torch {torch.__version__} has no stable ABI (2.10 or newer does); installing without the "
            "compiled op, using plain PyTorch instead"
        )
        return []
    return [extension()]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
