"""Builds (ninja, nvcc) and loads (ctypes) the CUDA kernel library of `kernels/`."""

from powertrain.native.abi import ABI_VERSION
from powertrain.native.build import build_library, cache_root, find_library
from powertrain.native.errors import KernelBuildError, KernelLaunchError, KernelsUnavailable
from powertrain.native.loader import call, library, open_library
from powertrain.native.toolchain import kernel_sources, library_key

__all__ = [
    "ABI_VERSION",
    "KernelBuildError",
    "KernelLaunchError",
    "KernelsUnavailable",
    "build_library",
    "cache_root",
    "call",
    "find_library",
    "kernel_sources",
    "library",
    "library_key",
    "open_library",
]
