"""Builds the deformable-attention op and installs `ops/` as `dino_d2.ops`. Metadata: pyproject.toml."""

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
        "\n\ndino_d2 is built against the torch that you run it with, and this build environment has none.\n"
        "  - torch is installed:      pip install --no-build-isolation -e .\n"
        "  - nothing installed yet:   make setup\n"
    )

STABLE_ABI_SINCE = (2, 10)
# Every torch from 2.10 on loads the same file (and, by `py_limited_api`, every Python from 3.10 on).
ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
HEADERS = sorted(str(path) for path in Path("ops/csrc").rglob("*h") if path.suffix in (".h", ".cuh"))
# Machine code for A100 and, of the same generation, RTX 30 and 40; for H100; portable code for what comes after.
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def wants_cuda() -> bool:
    """FORCE_CUDA=0|1 decides; otherwise the kernels are built where nvcc and a torch with CUDA are."""
    forced = os.environ.get("FORCE_CUDA")
    if forced in ("0", "1"):
        return forced == "1"
    has_nvcc = shutil.which("nvcc") is not None or (CUDA_HOME and Path(CUDA_HOME, "bin", "nvcc").exists())
    return bool(has_nvcc) and torch.version.cuda is not None


def extension():
    sources = ["ops/csrc/library.cpp", *sorted(str(path) for path in Path("ops/csrc/cpu").glob("*.cpp"))]
    # Comparisons and roundings on vectors need these two; neither changes a result.
    cxx = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *ABI]
    if not wants_cuda():
        return CppExtension(
            "dino_d2.ops._C", sources, extra_compile_args={"cxx": cxx}, py_limited_api=True, depends=HEADERS
        )
    if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        # PyTorch's builder asks the visible GPU, and fails where there is none.
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_CUDA_ARCHITECTURES
    sources += sorted(str(path) for path in Path("ops/csrc/cuda").glob("*.cu"))
    # What PyTorch's builder will ask nvcc for, so that the op can tell which cards it has code for.
    code = [flag.rsplit("=", 1)[1] for flag in _get_cuda_arch_flags()]
    nvcc = ["-O3", "-std=c++17", "-DUSE_CUDA", f"-DDINO_D2_CUDA_CODE={'+'.join(code)}", *ABI]
    result = CUDAExtension(
        "dino_d2.ops._C",
        sources,
        extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc},
        py_limited_api=True,
        depends=HEADERS,
    )
    # torch has loaded the CUDA runtime by then; linking it here would need the toolkit's library folder.
    result.libraries.remove("cudart")
    return result


def extensions() -> list:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < STABLE_ABI_SINCE:
        print(
            f"dino_d2: torch {torch.__version__} has no stable C++ interface (2.10 is the first); installing without "
            "the compiled op, plain PyTorch will serve"
        )
        return []
    return [extension()]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
