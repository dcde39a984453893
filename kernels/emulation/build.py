"""Builds the kernel sources for the CPU emulation: `python kernels/emulation/build.py OUTPUT [--without sm80 ...]`.

The sources are copied with `__shared__` turned into static storage; the files that hold PTX or start kernels are replaced by their emulated twins.
Needs g++ and the CUDA headers, no nvcc and no GPU.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent


def translate(text: str) -> str:
    text = text.replace("extern __shared__", "extern").replace("__shared__", "static")
    text = re.sub(r"extern (__align__\(\d+\) )?(\w+) (\w+)\[\];", r"\2* \3 = (\2*)emulate::shared_memory;", text)
    conversion = r'asm\("cvt\.rn\.(bf16|f16)x2\.f32 %0, %1, %2;" : "=r"\((\w+)\) : "f"\((\w+)\), "f"\((\w+)\)\);'
    text = re.sub(conversion, lambda m: f"{m[2]} = emulate::pack({m[4]}, {m[3]}, {str(m[1] == 'f16').lower()});", text)
    transposing = r'asm volatile\("ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16[^;]*;"\s*: "=r"\((\w+)\[0\]\)[^:]*: "r"\((\w+)\)\);'
    text = re.sub(transposing, r"emulate::load_matrices(\1, 4, \2, true);", text)
    return text


def cuda_include() -> Path:
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", "/usr/local/cuda-13.0"):
        if home and (Path(home) / "include/cuda_bf16.h").is_file():
            return Path(home) / "include"
    if nvcc := shutil.which("nvcc"):
        for parent in Path(nvcc).resolve().parents:
            if (parent / "include/cuda_bf16.h").is_file():
                return parent / "include"
    raise SystemExit("no CUDA headers: set CUDA_HOME to a folder with include/cuda_bf16.h")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--without", nargs="*", default=[], help="folders of src to leave out (an empty sm80 or sm90 takes their place)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        emulation = KERNELS / "emulation"
        for source in sorted((KERNELS / "src").rglob("*.cu*")) + sorted((KERNELS / "src").rglob("*.h")):
            relative = source.relative_to(KERNELS / "src")
            if relative.parts[0] in args.without:
                continue
            twin = emulation / relative
            target = root / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(twin.read_text() if twin.is_file() else translate(source.read_text()))
        for arch in args.without:
            (root / f"no_{arch}.cu").write_text(
                '#include "common/stages.h"\n'
                f"namespace powertrain::{arch} {{\n"
                "bool supports(const pt_problem&, int) { return false; }\n"
                "int64_t chunk_state_workspace(const pt_problem&) { return 0; }\n"
                + "".join(
                    f'int {s}(const pt_problem&, const pt_{s}_params&, cudaStream_t) {{ return fail(PT_UNSUPPORTED, "left out"); }}\n'
                    for s in ("chunk_state", "chunk_scan", "chunk_scan_grad")
                )
                + (
                    "int64_t steps_workspace(const pt_problem&) { return 0; }\nbool has_segments(const pt_problem&, bool) { return false; }\n"
                    + "".join(
                        f'int {s}(const pt_problem&, const pt_{s}_params&, cudaStream_t) {{ return fail(PT_UNSUPPORTED, "left out"); }}\n'
                        for s in ("query_scan", "key_grads")
                    )
                    if arch == "sm90"
                    else ""
                )
                + "}\n"
            )
        flags = ["-std=c++20", "-O2", "-fPIC", "-w", "-fno-strict-aliasing", "-include", str(emulation / "emulate.h")]
        flags += [f"-I{path}" for path in (KERNELS / "include", root / "common", emulation, cuda_include())]
        units = sorted(root.rglob("*.cu")) + [emulation / "emulate.cpp"]

        def compile_unit(unit: Path) -> Path:
            target = root / (str(unit).replace("/", "_") + ".o")
            subprocess.run(["g++", *flags, "-x", "c++", "-c", str(unit), "-o", str(target)], check=True)
            return target

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            objects = list(pool.map(compile_unit, units))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["g++", "-shared", "-o", str(args.output), *map(str, objects)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
