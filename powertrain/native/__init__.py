"""Builds (ninja, nvcc) and loads the CUDA kernel library of `kernels/`, and its binding to the installed torch."""

from powertrain.native.abi import ABI_VERSION
from powertrain.native.binding import build_binding, build_missing, find_binding, load_kernels
from powertrain.native.build import build_library, find_library
from powertrain.native.errors import KernelBuildError, KernelLaunchError, KernelsUnavailable
from powertrain.native.loader import call, library, open_library
from powertrain.native.store import cache_root
from powertrain.native.toolchain import kernel_sources, library_key

__all__ = [
    "ABI_VERSION",
    "KernelBuildError",
    "KernelLaunchError",
    "KernelsUnavailable",
    "build_binding",
    "build_library",
    "build_missing",
    "cache_root",
    "call",
    "find_binding",
    "find_library",
    "kernel_sources",
    "library",
    "library_key",
    "load_kernels",
    "open_library",
]
