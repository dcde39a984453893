"""Building and finding the binding to torch; what it computes is tested by `tests/ops/test_cuda*.py`."""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from powertrain.native import binding, loader
from powertrain.native.errors import KernelBuildError, KernelsUnavailable
from tests.native.conftest import tiny_binding

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture
def source(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tiny_binding(tree)
    monkeypatch.setattr(binding, "_SOURCE", path)
    return path


def test_key_follows_source_header_flags_and_torch(source: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [binding.binding_key()]
    source.write_text(source.read_text() + "\n")
    keys.append(binding.binding_key())
    header = tree / "include" / "powertrain_kernels.h"
    header.write_text(header.read_text() + "\n")
    keys.append(binding.binding_key())
    monkeypatch.setattr(binding, "_FLAGS", (*binding._FLAGS, "-DEXTRA"))
    keys.append(binding.binding_key())
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    keys.append(binding.binding_key())
    assert len(set(keys)) == 5


@needs_compiler
@pytest.mark.usefixtures("source")
def test_build_reuse_carry_and_damage(
    tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert binding.find_binding() is None
    path = binding.build_binding(output=tmp_path / "carried")
    assert f"once for torch {torch.__version__}" in capfd.readouterr().err
    assert ctypes.CDLL(str(path)).version() == loader.ABI_VERSION
    assert binding.find_binding() == path
    assert binding.binding_warnings() == []
    binding.build_binding()
    assert capfd.readouterr().err == ""  # nothing is compiled twice

    # A wheel carries bindings for some releases of torch: no compiler and no cache are needed for those.
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "empty"))
    shutil.copytree(tmp_path / "carried", tree / "lib")
    carried = tree / "lib" / binding.binding_key() / binding.BINDING_NAME
    assert binding.find_binding() == carried
    carried.write_bytes(carried.read_bytes()[:-1])
    with pytest.raises(KernelsUnavailable, match="is damaged"):
        binding._load(carried)
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert binding.find_binding() is None


@needs_compiler
def test_compile_error_shows_the_compilers_words_and_leaves_nothing(source: Path) -> None:
    source.write_text("int broken = missing;\n")
    with pytest.raises(KernelBuildError, match="missing"):
        binding.build_binding()
    assert binding.find_binding() is None


@pytest.mark.usefixtures("source")
def test_missing_compiler_is_one_sentence_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(KernelsUnavailable) as error:
        binding.build_binding()
    message = str(error.value)
    assert "C++ compiler was not found" in message
    assert "install g++" in message
    assert "PyTorch path" in message
    assert "\n" not in message


@needs_compiler
@pytest.mark.usefixtures("source")
def test_missing_headers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    with pytest.raises(KernelsUnavailable, match=r"holds no C\+\+ headers"):
        binding.build_binding()
