"""Builds the kernel library once per content key, however many processes ask for it at once."""

import hashlib
import os
import platform
import re
import shlex
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from powertrain.native import store
from powertrain.native.errors import KernelBuildError, KernelsUnavailable
from powertrain.native.store import cache_root
from powertrain.native.toolchain import (
    ARCHITECTURES,
    LIBRARY_NAME,
    LINK_FLAGS,
    Nvcc,
    Unit,
    find_compiler,
    find_ninja,
    find_nvcc,
    include_flags,
    kernel_sources,
    library_key,
    units,
)


@dataclass(frozen=True)
class KernelReport:
    """What ptxas says of one compiled kernel."""

    unit: str
    kernel: str
    target: str
    registers: int
    spill_bytes: int
    stack_bytes: int


def find_library() -> Path | None:
    """A built library for the present sources: from the cache, else the one that the wheel carries; None without."""
    sources = kernel_sources()
    key = library_key(sources)
    return store.find(LIBRARY_NAME, key, (cache_root() / key, sources / "lib"))


def build_library(
    *, jobs: int | None = None, output: Path | None = None, force: bool = False, objects: bool = False
) -> Path:
    """Builds the library for the present sources unless it is in the cache, and returns its path.

    Safe when many processes start at once: one builds, the others wait for the lock and take the result. A library
    appears under its key only whole (temporary directory, fsync, atomic rename). Progress goes to stderr.

    Args:
        jobs: compilers run at once; default: the CPUs of this process.
        output: a folder to copy the library and its manifest into as well (how a wheel comes to carry them).
        force: build even if the cache holds the library; objects are compiled anew too.
        objects: build also where the cache lacks objects of the present compiler, which `compiler_reports` reads.

    Raises:
        KernelsUnavailable: no compiler, or no sources.
        KernelBuildError: the compiler failed; the message holds its output.
    """
    sources = kernel_sources()
    key = library_key(sources)
    folder = cache_root() / key
    with store.building():
        found = store.find(LIBRARY_NAME, key, (folder,)) is not None
        if force or not found or (objects and _not_compiled(sources, find_nvcc())):
            _build_locked(sources, key, cache_root(), jobs=jobs or len(os.sched_getaffinity(0)), force=force)
    if output is not None:
        store.copy_out(folder / LIBRARY_NAME, output)
    return folder / LIBRARY_NAME


def compiler_reports() -> tuple[list[KernelReport], list[str]]:
    """What the compiler said of each unit of the library in the cache: `(kernels, warnings)`, where lost speed is a
    warning.

    Raises:
        KernelsUnavailable: a unit was not compiled into this cache.
    """
    sources = kernel_sources()
    nvcc = find_nvcc()
    reports, warnings = [], []
    for unit in units(sources):
        log = _object(cache_root(), unit, nvcc).with_suffix(".log")
        if not log.is_file():
            raise KernelsUnavailable(f"{unit.name} was not compiled into this cache; run `powertrain kernels build`.")
        text = log.read_text()
        reports += parse_ptxas(unit.name, text)
        warnings += [f"{unit.name}: {line}" for line in text.splitlines() if _COMPLAINT.search(line)]
    return reports, warnings


# ptxas tells as information that it serialises wgmma, which costs a third of a kernel's speed.
_COMPLAINT = re.compile(r"\bwarning\b|Potential Performance Loss", re.IGNORECASE)
_PTXAS_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_PTXAS_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_PTXAS_REGISTERS = re.compile(r"Used (\d+) registers")


def parse_ptxas(unit: str, text: str) -> list[KernelReport]:
    """The kernels that `ptxas -v` names in `text`, with their registers and spills."""
    reports = []
    kernel = target = ""
    stack = spill = 0
    for line in text.splitlines():
        if match := _PTXAS_ENTRY.search(line):
            kernel, target, stack, spill = match[1], match[2], 0, 0
        elif match := _PTXAS_FRAME.search(line):
            stack, spill = int(match[1]), int(match[2]) + int(match[3])
        elif kernel and (match := _PTXAS_REGISTERS.search(line)):
            reports.append(KernelReport(unit, kernel, target, int(match[1]), spill, stack))
            kernel = ""
    return reports


def _not_compiled(sources: Path, nvcc: Nvcc) -> list[Unit]:
    return [unit for unit in units(sources) if not _object(cache_root(), unit, nvcc).is_file()]


def _object(home: Path, unit: Unit, nvcc: Nvcc) -> Path:
    key = hashlib.sha256(
        f"{unit.name}\0{unit.digest}\0{' '.join(unit.flags)}\0{nvcc.release}\0{platform.machine()}".encode()
    )
    return home / "objects" / f"{key.hexdigest()[:24]}.o"


def _build_locked(sources: Path, key: str, home: Path, *, jobs: int, force: bool) -> None:
    nvcc, ninja = find_nvcc(), find_ninja()
    find_compiler()  # which nvcc needs, too
    all_units = units(sources)
    objects = {unit.name: _object(home, unit, nvcc) for unit in all_units}
    missing = all_units if force else _not_compiled(sources, nvcc)
    (home / "objects").mkdir(parents=True, exist_ok=True)
    store.say(
        f"building the CUDA kernels once: {len(missing)} of {len(all_units)} files to compile "
        f"with nvcc {nvcc.release}, {jobs} at a time, into {home}"
    )
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{key}-", dir=home) as temporary:
        work = Path(temporary)
        library = work / LIBRARY_NAME
        rules = _ninja_file(sources, nvcc, missing, objects, library)
        (work / "build.ninja").write_text(rules)
        _run_ninja([ninja, "-C", str(work), "-j", str(jobs)])
        store.publish(
            library.read_bytes(),
            home / key,
            LIBRARY_NAME,
            key=key,
            compiler=f"CUDA {nvcc.release}",
            targets={folder: list(values) for folder, values in ARCHITECTURES.items()},
            seconds=time.monotonic() - start,
        )


def _ninja_file(sources: Path, nvcc: Nvcc, missing: list[Unit], objects: dict[str, Path], library: Path) -> str:
    def escape(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    compiler = shlex.quote(str(nvcc.path)).replace("$", "$$")
    includes = shlex.join(include_flags(sources)).replace("$", "$$")
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        # The log stays beside the object: `build --check` reads registers, spills and warnings from it. $$$$ is the
        # shell's own number: two builds may compile one object at once, where there are no locks.
        f"  command = ({compiler} $flags {includes} -c $in -o $out.$$$$.part > $log 2>&1 && mv $out.$$$$.part $out)"
        " || (cat $log; exit 1)",
        "  description = $name",
        "rule link",
        f"  command = {compiler} {' '.join(LINK_FLAGS)} $in -o $out",
        f"  description = {LIBRARY_NAME}",
    ]
    for unit in missing:
        target = objects[unit.name]
        lines += [
            f"build {escape(str(target))}: compile {escape(str(unit.source))}",
            f"  flags = {shlex.join(unit.flags).replace('$', '$$')}",
            f"  log = {shlex.quote(str(target.with_suffix('.log'))).replace('$', '$$')}",
            f"  name = {unit.name}",
        ]
    inputs = " ".join(escape(str(path)) for path in objects.values())
    lines += [f"build {escape(str(library))}: link {inputs}", ""]
    return "\n".join(lines)


def _run_ninja(command: list[str]) -> None:
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t, %e s] "}
    output: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                output.append(line)
                if line.startswith("["):
                    store.say(line.rstrip())
        except BaseException:
            process.terminate()  # ninja ends its compilers; `with` would wait for them, minutes
            raise
    if process.returncode != 0:
        failed = "".join(line for line in output if line.startswith("FAILED"))
        # An object of the cache that a crash of the machine has left damaged.
        advice = " `powertrain kernels build --force` compiles every object anew." if LIBRARY_NAME in failed else ""
        raise KernelBuildError(f"The kernels did not compile.{advice}\n" + "".join(output[-200:]))
