"""`powertrain kernels build | info`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from powertrain.native.abi import ABI_VERSION
from powertrain.native.build import Manifest, build_library, cache_root, compiler_reports, find_library, verify_library
from powertrain.native.errors import KernelBuildError, KernelsUnavailable
from powertrain.native.loader import open_library
from powertrain.native.toolchain import find_nvcc, kernel_sources, library_key, units


def main(argv: Sequence[str]) -> int:
    """Runs `powertrain kernels <argv>` and returns the exit status."""
    parser = argparse.ArgumentParser(prog="powertrain kernels", description="The CUDA kernel library.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build the library into the cache ($POWERTRAIN_CACHE)")
    build.add_argument("--jobs", type=int, help="compilers run at once (default: the CPUs of this process)")
    build.add_argument("--force", action="store_true", help="compile every file anew")
    build.add_argument("--check", action="store_true", help="fail on compiler warnings and on register spills")
    build.add_argument("--output", type=Path, help="also copy the library and its manifest into this folder")
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
    path = build_library(jobs=arguments.jobs, output=arguments.output, force=arguments.force)
    open_library(path)
    print(path)
    return _check() if arguments.check else 0


def _check() -> int:
    reports, warnings = compiler_reports()
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
    path = find_library()
    if path is None:
        print("library   none for these sources; `powertrain kernels build` (or the first call on a GPU) builds it")
        return 0
    verify_library(path)
    open_library(path)
    manifest = Manifest.read(path.parent / "manifest.json")
    print(f"library   {path} ({manifest.size / 1e6:.1f} MB, built by CUDA {manifest.nvcc} in {manifest.seconds:.0f} s)")
    for folder, values in sorted(manifest.targets.items()):
        print(f"          src/{folder}: {'; '.join(values)}")
    return 0
