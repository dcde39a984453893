import os
import pwd
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from powertrain.files import ABANDONED_SECONDS
from powertrain.native import build, loader, store, toolchain
from powertrain.native.errors import KernelBuildError, KernelsUnavailable
from powertrain.training.signals import Stopped

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def test_key_follows_sources_headers_and_flags(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [toolchain.library_key(tree)]
    header = tree / "src" / "common" / "scale.h"
    header.write_text("#define SCALE 3.f\n")
    keys.append(toolchain.library_key(tree))
    (tree / "src" / "sm80" / "extra.cu").write_text("__global__ void extra() {}\n")
    keys.append(toolchain.library_key(tree))
    monkeypatch.setattr(toolchain, "COMMON_FLAGS", (*toolchain.COMMON_FLAGS, "-DEXTRA"))
    keys.append(toolchain.library_key(tree))
    monkeypatch.setattr("platform.machine", lambda: "another")  # two may share a home directory
    keys.append(toolchain.library_key(tree))
    assert len(set(keys)) == 5
    (tree / "README.md").write_text("no source")
    assert toolchain.library_key(tree) == keys[-1]


def test_objects_of_two_machines_have_two_names(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (unit, *_), nvcc = toolchain.units(tree), toolchain.Nvcc(tree / "nvcc", (13, 0))
    here = build._object(tree, unit, nvcc)
    monkeypatch.setattr("platform.machine", lambda: "another")
    assert build._object(tree, unit, nvcc) != here


def test_only_what_includes_a_changed_header_is_compiled_anew(tree: Path) -> None:
    (tree / "src" / "sm80" / "extra.cu").write_text("__global__ void extra() {}\n")
    before = {unit.name: unit.digest for unit in toolchain.units(tree)}
    (tree / "src" / "common" / "scale.h").write_text("#define SCALE 5.f\n")
    after = {unit.name: unit.digest for unit in toolchain.units(tree)}
    assert before["sm80/extra.cu"] == after["sm80/extra.cu"]
    assert before["common/scale.cu"] != after["common/scale.cu"]


def test_real_sources_are_found_and_in_known_folders() -> None:
    root = toolchain.kernel_sources()
    assert {unit.name.split("/")[0] for unit in toolchain.units(root)} <= set(toolchain.ARCHITECTURES)


def test_unknown_folder_is_refused(tree: Path) -> None:
    (tree / "src" / "sm70").mkdir()
    (tree / "src" / "sm70" / "old.cu").write_text("")
    with pytest.raises(KernelsUnavailable, match=r"sm70/old\.cu.*common, sm80, sm90"):
        toolchain.units(tree)


def test_missing_nvcc_is_one_sentence_that_says_what_to_do(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.os, "access", lambda *_: False)
    with pytest.raises(KernelsUnavailable) as error:
        loader.build_library()
    message = str(error.value)
    assert "nvcc was not found" in message
    assert "powertrain kernels build" in message
    assert "PyTorch path" in message
    assert "\n" not in message


def test_old_nvcc_is_refused_with_both_versions(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "toolkit" / "bin" / "nvcc"
    fake.parent.mkdir(parents=True)
    fake.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    with pytest.raises(KernelsUnavailable, match=r"CUDA 11\.8.*12\.4"):
        toolchain.find_nvcc()


def test_ptxas_reports() -> None:
    text = textwrap.dedent("""\
        ptxas info    : 0 bytes gmem
        ptxas info    : Compiling entry function '_Z4fastv' for 'sm_80'
        ptxas info    : Function properties for _Z4fastv
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
        ptxas info    : Used 168 registers, used 1 barriers, 400 bytes cmem[0]
        ptxas info    : Compiling entry function '_Z4slowv' for 'sm_90a'
        ptxas info    : Function properties for _Z4slowv
            32 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
        ptxas info    : Used 255 registers, used 0 barriers
        """)
    fast, slow = build.parse_ptxas("sm80/x.cu", text)
    assert (fast.kernel, fast.target, fast.registers, fast.spill_bytes) == ("_Z4fastv", "sm_80", 168, 0)
    assert (slow.kernel, slow.target, slow.registers, slow.spill_bytes, slow.stack_bytes) == (
        "_Z4slowv",
        "sm_90a",
        255,
        64,
        32,
    )


@needs_nvcc
def test_build_load_reuse_damage_and_check(
    tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build.build_library(output=tmp_path / "carried")
    progress = capfd.readouterr().err
    assert "building the CUDA kernels once: 1 of 1 files" in progress
    assert "common/scale.cu" in progress
    loaded = loader.open_library(path)
    assert loaded.pt_abi_version() == loader.ABI_VERSION
    assert build.find_library() == path

    build.build_library()
    assert capfd.readouterr().err == ""  # nothing is compiled twice

    reports, warnings = build.compiler_reports()
    assert {report.target for report in reports} == {"sm_80", "sm_90"}
    assert not warnings

    # A wheel carries the library: no compiler and no cache are needed then.
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "empty"))
    shutil.copytree(tmp_path / "carried", tree / "lib")
    assert build.find_library() == tree / "lib" / toolchain.LIBRARY_NAME
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "cache"))

    whole = path.read_bytes()
    path.unlink()  # the loaded library keeps its pages
    path.write_bytes(whole[:-100])
    with pytest.raises(KernelsUnavailable, match="is damaged"):
        loader.open_library(path)
    assert loader.open_library(build.build_library(force=True)).pt_abi_version() == loader.ABI_VERSION

    monkeypatch.setattr(loader, "ABI_VERSION", loader.ABI_VERSION + 1)
    with pytest.raises(KernelsUnavailable, match=r"speaks ABI version \d+"):
        loader.open_library(path)


FAKE_NVCC = """\
#!/bin/sh
[ "$1" = --version ] && { echo "Cuda compilation tools, release 13.1"; exit; }
echo $$ > %s
exec sleep 60
"""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped])
def test_compilers_end_with_the_build(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    compiler, running = tmp_path / "toolkit" / "bin" / "nvcc", tmp_path / "running"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(FAKE_NVCC % running)
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))

    def interrupt(signum: int, frame: object) -> None:
        raise error(signum)

    def wait_and_interrupt() -> None:
        while not (running.exists() and running.read_text().strip()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR2)

    previous = signal.signal(signal.SIGUSR2, interrupt)
    thread = threading.Thread(target=wait_and_interrupt, daemon=True)
    try:
        thread.start()
        started = time.monotonic()
        with pytest.raises(error):
            build.build_library()
        assert time.monotonic() - started < 30
    finally:
        signal.signal(signal.SIGUSR2, previous)
    # That of one that has ended, and that its parent has not looked at yet, is empty.
    command_line = Path("/proc", running.read_text().strip(), "cmdline")
    while command_line.exists() and command_line.read_bytes():
        assert time.monotonic() - started < 30
        time.sleep(0.02)


@needs_nvcc
def test_a_cache_may_be_named_from_the_working_directory(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POWERTRAIN_CACHE", "near")
    assert build.build_library().is_relative_to(tmp_path / "near" / "kernels")
    assert build.compiler_reports()[0]


@needs_nvcc
def test_objects_of_another_compiler_are_not_those_that_are_checked(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    build.build_library()
    real = toolchain.find_nvcc()
    newer = toolchain.Nvcc(real.path, (real.version[0], real.version[1] + 1))
    monkeypatch.setattr(build, "find_nvcc", lambda: newer)
    build.build_library()
    with pytest.raises(KernelsUnavailable, match="was not compiled into this cache"):
        build.compiler_reports()
    capfd.readouterr()
    build.build_library(objects=True)
    assert "1 of 1 files" in capfd.readouterr().err
    assert build.compiler_reports()[0]


@needs_nvcc
def test_a_damaged_object_says_how_to_be_rid_of_it(tree: Path) -> None:
    build.build_library().unlink()
    (damaged,) = (build.cache_root() / "objects").glob("*.o")
    damaged.write_bytes(damaged.read_bytes()[:500])
    with pytest.raises(KernelBuildError, match="`powertrain kernels build --force` compiles every object anew"):
        build.build_library()
    assert loader.open_library(build.build_library(force=True))


def test_a_user_without_a_home_is_told_what_to_set(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    for name in ("POWERTRAIN_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(KernelsUnavailable, match="set POWERTRAIN_CACHE"):
        build.cache_root()


def test_what_killed_builds_left_goes_after_a_day(tree: Path) -> None:
    home = build.cache_root()
    (home / "objects").mkdir(parents=True)
    kept = [home / "objects" / name for name in ("a.o", "a.log", "b.o.17.part")]
    left = [home / "objects" / "c.o.18.part", home / ".0123-build" / "build.ninja"]
    running = home / ".4567-build" / "build.ninja"
    for path in (*kept, *left, running):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    for path in (kept[0], kept[1], left[0], left[1].parent):
        os.utime(path, (time.time() - ABANDONED_SECONDS - 60,) * 2)
    with store.building():
        assert sorted(p for p in home.rglob("*") if p.is_file()) == sorted([*kept, running, home / "lock"])
        assert not left[1].parent.exists()


@needs_nvcc
def test_compile_error_shows_the_compilers_words_and_leaves_nothing(tree: Path) -> None:
    (tree / "src" / "common" / "scale.cu").write_text("int broken = missing;\n")
    with pytest.raises(KernelBuildError, match=r"scale\.cu\(1\).*missing"):
        build.build_library()
    assert build.find_library() is None
    assert not list(build.cache_root().glob("*/" + toolchain.LIBRARY_NAME))


@needs_nvcc
def test_concurrent_builds_build_once(tree: Path, tmp_path: Path) -> None:
    script = textwrap.dedent("""\
        import sys
        from pathlib import Path
        from powertrain.native import build
        build.kernel_sources = lambda: Path(sys.argv[1])
        print(build.build_library(jobs=1))
        """)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tree)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "POWERTRAIN_CACHE": str(tmp_path / "shared")},
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert sum("building the CUDA kernels once" in errors for _, errors in results) == 1
