"""`powertrain kernels build | info`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from powertrain.native.abi import ABI_VERSION
from powertrain.native.binding import binding_warnings, build_binding, find_binding
from powertrain.native.build import build_library, compiler_reports, find_library
from powertrain.native.errors import KernelBuildError, KernelsUnavailable
from powertrain.native.loader import named_library, open_library, open_named_library
from powertrain.native.store import cache_root, verify_library
from powertrain.native.toolchain import find_compiler, find_nvcc, kernel_sources, library_key, units

_BUILDS = "`powertrain kernels build` (or the first call on a GPU) builds it"


def main(argv: Sequence[str]) -> int:
    """Runs `powertrain kernels <argv>` and returns the exit status."""
    parser = argparse.ArgumentParser(prog="powertrain kernels", description="The CUDA kernel library.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build", help="build the library and its binding to the installed torch into the cache ($POWERTRAIN_CACHE)"
    )
    build.add_argument("--jobs", type=int, help="compilers run at once (default: the CPUs of this process)")
    build.add_argument("--force", action="store_true", help="compile every file anew")
    build.add_argument("--check", action="store_true", help="fail on compiler warnings and on register spills")
    build.add_argument("--output", type=Path, help="also copy both, with their manifests, into this folder")
    commands.add_parser("info", help="say which library is used, for which GPUs, and why")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "build":
            return _build(arguments)
        return _info()
    except (KernelsUnavailable, KernelBuildError) as error:
        print(error, file=sys.stderr)
        return 1


def _build(arguments: argparse.Namespace) -> int:
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs} is not allowed: it must be at least 1")
    path = build_library(jobs=arguments.jobs, output=arguments.output, force=arguments.force, objects=arguments.check)
    open_library(path)
    print(path)
    print(build_binding(output=arguments.output, force=arguments.force))
    return _check() if arguments.check else 0


def _check() -> int:
    reports, warnings = compiler_reports()
    warnings += binding_warnings()
    spills = [report for report in reports if report.spill_bytes]
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    for report in spills:
        print(
            f"spill: {report.unit}: {report.kernel} ({report.target}): {report.spill_bytes} bytes "
            f"at {report.registers} registers",
            file=sys.stderr,
        )
    most = max((report.registers for report in reports), default=0)
    print(f"{len(reports)} kernels, {len(warnings)} warnings, {len(spills)} with spills, at most {most} registers")
    return 1 if warnings or spills else 0


def _info() -> int:
    sources = kernel_sources()
    print(f"sources   {sources} ({len(units(sources))} files, key {library_key(sources)}, ABI {ABI_VERSION})")
    print(f"cache     {cache_root()}")
    try:
        nvcc = find_nvcc()
        print(f"compiler  {nvcc.path} (CUDA {nvcc.release})")
    except KernelsUnavailable as error:
        print(f"compiler  none: {error}")
    try:
        print(f"          {find_compiler()} (C++)")
    except KernelsUnavailable as error:
        print(f"          no C++: {error}")
    path, named = find_library(), named_library()
    if named is not None:
        open_named_library(named)
        print(f"library   {named}, which POWERTRAIN_KERNELS_LIBRARY names")
    elif path is None:
        print(f"library   none for these sources; {_BUILDS}")
    else:
        manifest = verify_library(path)
        open_library(path)
        print(
            f"library   {path} ({manifest.size / 1e6:.1f} MB, built by {manifest.compiler} in {manifest.seconds:.0f} s)"
        )
        for folder, values in sorted(manifest.targets.items()):
            print(f"          src/{folder}: {'; '.join(values)}")
    path = find_binding()
    if path is None:
        print(f"binding   none for these sources and this torch; {_BUILDS}")
    else:
        manifest = verify_library(path)
        print(f"binding   {path} (torch {manifest.targets['torch'][0]}, built by {manifest.compiler})")
    for line in _devices():
        print(line)
    return 0


def _devices() -> list[str]:
    """Lines on the GPUs, and the kernels that the library chooses for each (`select` in src/common/dispatch.cu)."""
    import torch

    if not torch.cuda.is_available():
        return ["device    none that torch sees: power_retention takes its PyTorch path"]
    lines = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        chosen = "none, the kernels need 8.0" if major < 8 else "src/sm90" if major == 9 else "src/sm80"
        name = torch.cuda.get_device_name(index)
        lines.append(f"device    cuda:{index} {name}, compute capability {major}.{minor}: {chosen}")
    return lines
