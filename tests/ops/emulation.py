"""The kernel library for machines without a GPU: the kernels' own sources, run on the CPU (`kernels/emulation`), so
that the whole CUDA path is computed and compared, only not by CUDA.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = ROOT / "kernels"
SUFFIXES = {".cu", ".cuh", ".h", ".cpp", ".py"}


def emulated_library(*, without: tuple[str, ...]) -> Path:
    """Return the library built without some architectures' kernels; built once per content, whoever asks first."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to build the emulated kernels")
    digest = hashlib.sha256(" ".join(without).encode())
    for source in sorted(path for path in KERNELS.rglob("*") if path.suffix in SUFFIXES):
        digest.update(source.relative_to(KERNELS).as_posix().encode() + b"\0" + source.read_bytes())
    folder = ROOT / ".cache" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"without-{'-'.join(without)}-"
    library = folder / f"{prefix}{digest.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            for old in folder.glob(f"{prefix}*.so"):
                old.unlink()
            command = [sys.executable, str(KERNELS / "emulation" / "build.py"), str(library), "--without", *without]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0 and "no CUDA headers" in result.stderr:
                pytest.skip("needs the CUDA headers to build the emulated kernels")
            assert result.returncode == 0, result.stderr[-4000:]
    return library
