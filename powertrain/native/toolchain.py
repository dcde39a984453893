"""The compiler, its flags for each source file, and where the sources of the kernels are."""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from powertrain.native.errors import KernelsUnavailable

MIN_NVCC = (12, 4)
"""The first release whose ptxas knows everything that src/sm90 uses."""

ARCHITECTURES: dict[str, tuple[str, ...]] = {
    # PTX beside the machine code lets every later GPU run these; Hopper has machine code too and does not wait for the
    # driver's compiler.
    "sm80": ("arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90,code=sm_90"),
    # wgmma exists in the architecture-specific target alone, which has no forward-compatible PTX.
    "sm90": ("arch=compute_90a,code=sm_90a",),
    "common": ("arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90,code=sm_90"),
}
"""`-gencode` values by the folder under `src/` that a file is in."""

COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-lineinfo",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)

LINK_FLAGS = ("-shared", "-cudart=static", "-Xcompiler=-fPIC", "-Xlinker=--no-undefined")

LIBRARY_NAME = "libpowertrain_kernels.so"

_QUOTED_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: its path and release."""

    path: Path
    version: tuple[int, int]

    @property
    def release(self) -> str:
        return "{}.{}".format(*self.version)


@dataclass(frozen=True)
class Unit:
    """One translation unit: a `.cu` file, everything it includes, and its flags."""

    source: Path
    name: str  # path under src/, POSIX
    digest: str  # of the file and its transitive quoted includes
    flags: tuple[str, ...]


def kernel_sources() -> Path:
    """The folder that holds `include/` and `src/`: `kernels/` of a checkout, else the copy that the wheel carries."""
    package = Path(__file__).resolve().parent.parent
    for root in (package.parent / "kernels", package / "_share" / "kernels"):
        if (root / "include" / "powertrain_kernels.h").is_file():
            return root
    raise KernelsUnavailable(
        f"The kernel sources are missing: neither {package.parent / 'kernels'} nor {package / '_share' / 'kernels'} "
        "holds include/powertrain_kernels.h; reinstall powertrain."
    )


def units(root: Path) -> list[Unit]:
    """Every translation unit under `root/src`, in a fixed order."""
    found = []
    for source in sorted((root / "src").rglob("*.cu")):
        name = source.relative_to(root / "src").as_posix()
        folder = name.split("/")[0]
        if folder not in ARCHITECTURES:
            raise KernelsUnavailable(
                f"kernels/src/{name} is in no architecture's folder; allowed: {', '.join(sorted(ARCHITECTURES))}."
            )
        flags = (*COMMON_FLAGS, *(f"-gencode={value}" for value in ARCHITECTURES[folder]))
        found.append(Unit(source, name, _digest_with_includes(source, root), flags))
    if not found:
        raise KernelsUnavailable(f"{root / 'src'} holds no .cu file.")
    return found


def include_flags(root: Path) -> tuple[str, ...]:
    return tuple(f"-I{folder}" for folder in _include_folders(root))


def _include_folders(root: Path) -> tuple[Path, ...]:
    return (root / "include", root / "src" / "common")


def library_key(root: Path) -> str:
    """The content key of the library that these sources and flags give.

    The machine's architecture counts, since two may share a home directory. The compiler's release is left out on
    purpose: a compute node without nvcc must find what a login node built.
    """
    key = hashlib.sha256()
    for unit in units(root):
        key.update(f"{unit.name}\0{unit.digest}\0{' '.join(unit.flags)}\0".encode())
    key.update(f"{' '.join(LINK_FLAGS)}\0{platform.machine()}".encode())
    return key.hexdigest()[:24]


def find_nvcc() -> Nvcc:
    """The nvcc of `$CUDA_HOME`, of `PATH` or of /usr/local/cuda, in that order.

    Raises `KernelsUnavailable` when there is none or it is older than `MIN_NVCC`.
    """
    candidates = [
        Path(os.environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for path in candidates:
        if os.access(path, os.X_OK):
            nvcc = Nvcc(path, _nvcc_version(path))
            if nvcc.version < MIN_NVCC:
                raise KernelsUnavailable(
                    f"{path} is CUDA {nvcc.release}, and the kernels need {MIN_NVCC[0]}.{MIN_NVCC[1]} or later: "
                    "set CUDA_HOME to a newer toolkit and run `powertrain kernels build`."
                )
            return nvcc
    raise KernelsUnavailable(
        f"nvcc was not found: install the CUDA toolkit {MIN_NVCC[0]}.{MIN_NVCC[1]} or later (or set CUDA_HOME) and run "
        "`powertrain kernels build`; until then power_retention takes its PyTorch path."
    )


@functools.cache
def _nvcc_version(path: Path) -> tuple[int, int]:
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+)\.(\d+)", output)
    if not match:
        raise KernelsUnavailable(f"{path} --version does not name a release; set CUDA_HOME to a working CUDA toolkit.")
    return int(match[1]), int(match[2])


def find_compiler() -> str:
    """The C++ compiler: `$CXX`, else c++, g++ or clang++ of PATH."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise KernelsUnavailable(
        "A C++ compiler was not found, and the kernels need one to be joined to the installed torch: install g++ (or "
        "set CXX) and run `powertrain kernels build`; until then power_retention takes its PyTorch path."
    )


def find_ninja() -> str:
    """The ninja of the `ninja` package, else the one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        pass
    else:
        if os.access(Path(BIN_DIR) / "ninja", os.X_OK):
            return str(Path(BIN_DIR) / "ninja")
    path = shutil.which("ninja")
    if path is None:
        raise KernelsUnavailable("ninja was not found: `pip install ninja`, then run `powertrain kernels build`.")
    return path


def _digest_with_includes(source: Path, root: Path) -> str:
    digest = hashlib.sha256()
    seen: set[Path] = set()
    pending = [source.resolve()]
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
        for name in _QUOTED_INCLUDE.findall(content):
            for folder in (path.parent, *_include_folders(root)):
                candidate = (folder / name.decode()).resolve()
                if candidate.is_file():
                    pending.append(candidate)
                    break
    return digest.hexdigest()
