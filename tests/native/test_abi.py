"""The ctypes structs against the C header, field by field, as a C compiler lays them out."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from powertrain.native import abi, toolchain

STRUCTS: dict[str, type[ctypes.Structure]] = {
    "pt_tensor": abi.StridedTensor,
    "pt_problem": abi.Problem,
    "pt_sizes": abi.Sizes,
    "pt_kernel_attributes": abi.KernelAttributes,
    **{f"{name}_params": parameters for name, parameters in abi.STAGE_PARAMETERS.items()},
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


def test_every_stage_of_the_header_is_declared() -> None:
    text = (toolchain.kernel_sources() / "include" / "powertrain_kernels.h").read_text()
    stages = re.findall(r"PT_API int (pt_\w+)\(const pt_problem\* problem, const \1_params\* params", text)
    assert set(stages) == set(abi.STAGE_PARAMETERS)
