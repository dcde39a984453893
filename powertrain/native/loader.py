"""Loads the kernel library and shakes hands with it."""

import ctypes
import functools
import os
import threading
from pathlib import Path

from powertrain.native.abi import ABI_VERSION, declare
from powertrain.native.build import build_library, find_library
from powertrain.native.errors import KernelLaunchError, KernelsUnavailable
from powertrain.native.store import verify_library

_lock = threading.Lock()


def library() -> ctypes.CDLL:
    """The loaded kernel library; builds it first when there is none for the present sources.

    Raises:
        KernelsUnavailable: no library and no way to build one, a damaged file, or another ABI.
        KernelBuildError: the compiler refused the sources.
    """
    with _lock:
        return _load_once()


@functools.cache
def _load_once() -> ctypes.CDLL:
    named = named_library()
    if named is not None:
        loaded = open_named_library(named)
    else:
        path = find_library()
        loaded = open_library(path if path is not None else build_library())
    declare(loaded)
    return loaded


def named_library() -> Path | None:
    """A developer's own build in place of the one for the present sources: no manifest says what it should be."""
    named = os.environ.get("POWERTRAIN_KERNELS_LIBRARY")
    return Path(named) if named else None


def open_named_library(path: Path) -> ctypes.CDLL:
    """Loads the library that POWERTRAIN_KERNELS_LIBRARY names.

    Raises:
        KernelsUnavailable: the loader refuses the file, or its ABI version is not the expected one.
    """
    try:
        return _open_checked(path)
    except KernelsUnavailable as error:
        raise KernelsUnavailable(f"POWERTRAIN_KERNELS_LIBRARY: {error}") from error


def open_library(path: Path) -> ctypes.CDLL:
    """Loads the library at `path` after checking its digest, and its ABI version after that.

    Raises:
        KernelsUnavailable: the digest or the ABI version is not the expected one, or the loader refuses the file.
    """
    verify_library(path)
    return _open_checked(path)


def _open_checked(path: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"{path} does not load ({error}).") from error
    try:
        loaded.pt_abi_version.restype = ctypes.c_int32
        found = loaded.pt_abi_version()
    except AttributeError:
        found = None
    if found != ABI_VERSION:
        raise KernelsUnavailable(
            f"{path} speaks ABI version {found}, and this powertrain speaks {ABI_VERSION}: "
            "run `powertrain kernels build --force`."
        )
    return loaded


def call(name: str, *arguments: object) -> None:
    """Calls one function of the loaded library.

    Raises:
        KernelLaunchError: it returned an error status; the message is the library's own.
    """
    loaded = library()
    if getattr(loaded, name)(*arguments) != 0:
        raise KernelLaunchError(f"{name}: {loaded.pt_last_error().decode()}")
