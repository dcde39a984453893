import shutil
from pathlib import Path

import pytest
import torch

from powertrain.native import binding, build, cli
from tests.native.conftest import tiny_binding


@pytest.fixture
def cli_tree(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cli, "kernel_sources", lambda: tree)
    monkeypatch.setattr(binding, "_SOURCE", tiny_binding(tree))
    return tree


def test_info_without_a_library_says_what_to_do(cli_tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert str(cli_tree) in output
    assert "none for these sources;" in output
    assert "none for these sources and this torch;" in output


@pytest.mark.parametrize("jobs", [0, -1])
def test_build_refuses_to_build_with_no_compiler_at_once(jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "build_library", lambda **_: pytest.fail("it builds"))
    with pytest.raises(ValueError, match=f"--jobs {jobs} is not allowed: it must be at least 1"):
        cli.main(["build", f"--jobs={jobs}"])


def test_info_names_a_library_of_ones_own(
    cli_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POWERTRAIN_KERNELS_LIBRARY", str(tmp_path / "none.so"))
    assert cli.main(["info"]) == 1
    assert f"POWERTRAIN_KERNELS_LIBRARY: {tmp_path / 'none.so'} does not load" in capsys.readouterr().err


def test_info_says_which_kernels_a_gpu_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli._devices() == ["device    none that torch sees: power_retention takes its PyTorch path"]
    capabilities = [(7, 5), (8, 6), (9, 0), (10, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA")
    chosen = [line.split(": ")[1] for line in cli._devices()]
    assert chosen == ["none, the kernels need 8.0", "src/sm80", "src/sm90", "src/sm80"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_build_check_fails_on_a_warning(cli_tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "--check"]) == 0
    assert "0 warnings, 0 with spills" in capfd.readouterr().out
    source = cli_tree / "src" / "common" / "scale.cu"
    source.write_text(source.read_text() + "static int unused_function() { return 1; }\n")
    assert cli.main(["build", "--check"]) == 1
    assert "unused_function" in capfd.readouterr().err
    assert cli.main(["info"]) == 0
    output = capfd.readouterr().out
    assert str(build.find_library()) in output
    assert str(binding.find_binding()) in output


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_build_check_fails_on_a_warning_in_the_binding(
    cli_tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "torch_binding.cpp"
    source.write_text(source.read_text() + "static int unused_function() { return 1; }\n")
    assert cli.main(["build", "--check"]) == 1
    assert "torch_binding.cpp" in (complaint := capfd.readouterr().err)
    assert "unused_function" in complaint


def test_check_fails_on_a_spill(
    cli_tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spilling = build.KernelReport("sm80/x.cu", "_Z4slowv", "sm_80", 255, 64, 32)
    monkeypatch.setattr(cli, "build_library", lambda **_: cli_tree)
    monkeypatch.setattr(cli, "open_library", lambda _: None)
    monkeypatch.setattr(cli, "compiler_reports", lambda: ([spilling], []))
    assert cli.main(["build", "--check"]) == 1
    assert "_Z4slowv (sm_80): 64 bytes" in capsys.readouterr().err
