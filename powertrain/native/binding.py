"""Builds and loads the layer between torch and the kernel library: `torch_binding.cpp`, compiled with the C++ compiler
against the installed torch.

The kernel library knows no torch, so one build of it serves every release; this layer is of one release, and takes
seconds to compile. A wheel may carry it for some releases of torch beside the kernel library.
"""

import ctypes
import functools
import hashlib
import platform
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

from powertrain.native import store
from powertrain.native.build import build_library, find_library
from powertrain.native.errors import KernelBuildError, KernelsUnavailable
from powertrain.native.loader import library
from powertrain.native.store import cache_root
from powertrain.native.toolchain import find_compiler, kernel_sources

BINDING_NAME = "libpowertrain_torch.so"
_SOURCE = Path(__file__).with_name("torch_binding.cpp")
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-shared")


def binding_key() -> str:
    """The content key of the binding: its sources and flags, and the torch that it is compiled against."""
    import torch

    header = kernel_sources() / "include" / "powertrain_kernels.h"
    key = hashlib.sha256(_SOURCE.read_bytes() + b"\0" + header.read_bytes())
    release = f"{torch.__version__}\0{torch.version.git_version}\0{_abi_flag()}\0{platform.machine()}"
    key.update(f"\0{' '.join(_FLAGS)}\0{release}".encode())
    return key.hexdigest()[:24]


def find_binding() -> Path | None:
    """A binding for the present sources and torch: from the cache, else one that the wheel carries; None without."""
    key = binding_key()
    return store.find(BINDING_NAME, key, (cache_root() / key, kernel_sources() / "lib" / key))


def build_binding(*, output: Path | None = None, force: bool = False) -> Path:
    """Compiles the binding for the present sources and torch unless it is in the cache, and returns its path.

    Args:
        output: a folder to copy the binding into as well, in a folder of its key.
        force: compile even if the cache holds it.

    Raises:
        KernelsUnavailable: no compiler, or torch came without its headers.
        KernelBuildError: the compiler failed; the message holds its output.
    """
    key = binding_key()
    folder = cache_root() / key
    with store.building():
        if force or store.find(BINDING_NAME, key, (folder,)) is None:
            _compile(key, folder)
    if output is not None:
        store.copy_out(folder / BINDING_NAME, output / key)
    return folder / BINDING_NAME


def build_missing() -> None:
    """Builds what is not there of the kernel library and its binding; errors are those of the two builds."""
    if find_library() is None:
        build_library()
    if find_binding() is None:
        build_binding()


def binding_warnings() -> list[str]:
    """What the compiler warned of when it compiled the binding of the cache."""
    log = cache_root() / binding_key() / "compile.log"
    if not log.is_file():
        raise KernelsUnavailable("The binding was not compiled into this cache; run `powertrain kernels build`.")
    return [f"{_SOURCE.name}: {line}" for line in log.read_text().splitlines() if "warning:" in line]


def load_kernels() -> None:
    """Loads the kernel library and the binding, which makes the ops of `powertrain.ops.cuda_ops` callable; builds what
    is missing first.

    Raises:
        KernelsUnavailable: something is missing and cannot be built, or does not load.
        KernelBuildError: a compiler refused the sources.
    """
    kernels = library()
    path = find_binding()
    binding = _load(path if path is not None else build_binding())
    functions = (kernels.pt_forward, kernels.pt_backward, kernels.pt_pass_sizes_of, kernels.pt_last_error)
    emulated = hasattr(kernels, "pt_emulated")  # kernels/emulation: computes on CPU tensors
    binding.powertrain_attach(*(ctypes.cast(function, ctypes.c_void_p) for function in functions), emulated)


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    import torch  # noqa: F401  its libraries have to be there first

    store.verify_library(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"{path} does not load ({error}); run `powertrain kernels build --force`.") from error


def _abi_flag() -> str:
    import torch

    return f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"


def _compile(key: str, folder: Path) -> None:
    import torch

    compiler, home = find_compiler(), Path(torch.__file__).parent
    if not (home / "include" / "torch" / "library.h").is_file():
        raise KernelsUnavailable(
            f"{home} holds no C++ headers, and the kernels need them to be joined to this torch: install torch from "
            "its wheel; until then power_retention takes its PyTorch path."
        )
    store.say(f"compiling the kernels' binding once for torch {torch.__version__}, with {compiler}")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{key}-", dir=cache_root()) as work:
        target = Path(work) / BINDING_NAME
        command = [compiler, *_FLAGS, _abi_flag(), "-isystem", str(home / "include")]
        command += [f"-I{kernel_sources() / 'include'}", str(_SOURCE), "-o", str(target), f"-L{home / 'lib'}"]
        command += ["-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise KernelBuildError(
                f"The kernels' binding did not compile: {shlex.join(command)}\n{done.stdout[-8000:]}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "compile.log").write_text(done.stdout)  # `build --check` reads the warnings
        store.publish(
            target.read_bytes(),
            folder,
            BINDING_NAME,
            key=key,
            compiler=_release(compiler),
            targets={"torch": [torch.__version__]},
            seconds=time.monotonic() - start,
        )


def _release(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.stdout else compiler
