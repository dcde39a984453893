"""Peak matrix rates of known GPUs, for the model FLOPs utilisation (MFU; Chowdhery et al., 2022, appendix B)."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Dense bf16 tensor-core FLOP/s with fp32 accumulation, from NVIDIA's data sheets and architecture white papers (half
# of the figure where a sheet gives it with sparsity). Names as the driver reports them; see `entry`.
PEAK_BF16_FLOPS = (
    ("B200", 2.25e15),  # Blackwell B200 (HGX B200 data sheet, one of eight)
    ("GH200", 989.4e12),  # Grace Hopper data sheet
    ("H200 NVL", 835.5e12),  # H200 data sheet
    ("H200", 989.4e12),  # H200 data sheet
    ("H100 NVL", 835.5e12),  # H100 data sheet
    ("H100 PCIe", 756.5e12),  # H100 data sheet
    ("H100", 989.4e12),  # H100 data sheet, SXM
    ("H800", 989.4e12),  # as H100 SXM; only links and fp64 differ
    ("A100", 312e12),  # A100 data sheet
    ("A800", 312e12),  # as A100
    ("L40S", 362.05e12),  # L40S data sheet
    ("L40", 181.05e12),  # L40 data sheet
    ("L4", 121e12),  # L4 data sheet
    ("A10G", 70e12),  # A10G data sheet
    ("A40", 149.7e12),  # A40 data sheet
    ("A30", 165e12),  # A30 data sheet
    ("RTX 4090", 165.2e12),  # Ada white paper
    ("RTX 3090", 71e12),  # Ampere GA102 white paper
)
# Of these the tables say nothing, although the names of others stand in theirs: a share of a GPU, and cards with fewer
# or slower units, or more of them.
_OTHERS = ("MIG", "Laptop GPU", "H800 PCIe", "RTX 4090 D", "RTX 3090 Ti")


def entry(device_name: str, table: Iterable[tuple[str, float]]) -> tuple[str, float] | None:
    """Return the entry of a table by device that speaks for the device, or None.

    Args:
        device_name: what the driver calls it.
        table: (part of a name, number); the first part that stands in the device's name as whole words counts, so
            that longer ones come first. GH200 is no H200, and RTX A4000 no A40.
    """
    if any(_stands_in(name, device_name) for name in _OTHERS):
        return None
    return next((found for found in table if _stands_in(found[0], device_name)), None)


def _stands_in(name: str, device_name: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", device_name) is not None


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of one device in `precision`, or None where no data sheet says it.

    Only bf16 has a peak: in fp32 the matrix rate depends on whether TF32 is allowed.
    """
    if not precision.startswith("bf16"):
        return None
    found = entry(device_name, PEAK_BF16_FLOPS)
    return found[1] if found else None
