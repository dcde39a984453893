"""The ctypes structs against the C header, field by field, as a C compiler lays them out."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from kernels import stage_calls
from powertrain.native import abi, toolchain

STRUCTS: dict[str, type[ctypes.Structure]] = {
    "pt_tensor": stage_calls.Strided,
    "pt_problem": stage_calls.Problem,
    "pt_kernel_attributes": abi.KernelAttributes,
    "pt_sizes": stage_calls.Sizes,
    "pt_pack_params": stage_calls.Pack,
    "pt_chunk_state_params": stage_calls.ChunkState,
    "pt_chunk_scan_params": stage_calls.ChunkScan,
    "pt_chunk_scan_grad_params": stage_calls.ChunkScanGrad,
    "pt_query_scan_params": stage_calls.QueryScan,
    "pt_key_grads_params": stage_calls.KeyGrads,
    "pt_state_flow_params": stage_calls.StateFlow,
    "pt_gate_grad_params": stage_calls.GateGrad,
    "pt_forward_params": stage_calls.ForwardPass,
    "pt_backward_params": stage_calls.BackwardPass,
    "pt_cross_entropy_params": abi.CrossEntropy,
}


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_structs_are_those_of_the_header(tmp_path: Path) -> None:
    header = toolchain.kernel_sources() / "include" / "powertrain_kernels.h"
    lines = ['#include "powertrain_kernels.h"', "#include <stddef.h>", "#include <stdio.h>", "int main(void) {"]
    for name, struct in STRUCTS.items():
        lines.append(f'  printf("{name} %zu\\n", sizeof({name}));')
        lines += [f'  printf("{name}.{field} %zu\\n", offsetof({name}, {field}));' for field, _ in struct._fields_]
    lines += ['  printf("version %d\\n", PT_ABI_VERSION);', "  return 0;", "}"]
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text("\n".join(lines))
    subprocess.run(["cc", f"-I{header.parent}", str(source), "-o", str(program)], check=True)
    output = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in (line.split() for line in output.splitlines())}
    expected = {"version": abi.ABI_VERSION}
    for name, struct in STRUCTS.items():
        expected[name] = ctypes.sizeof(struct)
        expected |= {f"{name}.{field}": getattr(struct, field).offset for field, _ in struct._fields_}
    assert found == expected
