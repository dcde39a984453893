"""A tiny kernel tree and a private cache, so that the build is tested without the real sources' minutes."""

from pathlib import Path

import pytest

from powertrain.native import binding, build, loader, toolchain

KERNEL = """
#include "powertrain_kernels.h"
#include "scale.h"
__global__ void scale(float* x) { x[threadIdx.x] *= SCALE; }
extern "C" __attribute__((visibility("default"))) int pt_abi_version(void) { return PT_ABI_VERSION; }
extern "C" __attribute__((visibility("default"))) int launch(float* x) {
  scale<<<1, 32>>>(x);
  return cudaGetLastError();
}
"""

BINDING = """
#include "powertrain_kernels.h"
extern "C" __attribute__((visibility("default"))) int version() { return PT_ABI_VERSION; }
"""


def tiny_binding(tree: Path) -> Path:
    """A source in place of the real binding's, which takes seconds to compile."""
    source = tree.parent / "torch_binding.cpp"
    source.write_text(BINDING)
    return source


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "kernels"
    (root / "include").mkdir(parents=True)
    (root / "src" / "common").mkdir(parents=True)
    (root / "src" / "sm80").mkdir(parents=True)
    (root / "include" / "powertrain_kernels.h").write_text(f"#define PT_ABI_VERSION {loader.ABI_VERSION}\n")
    (root / "src" / "common" / "scale.h").write_text("#define SCALE 2.f\n")
    (root / "src" / "common" / "scale.cu").write_text(KERNEL)
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "cache"))
    for module in (toolchain, build, binding):
        monkeypatch.setattr(module, "kernel_sources", lambda: root)
    return root
