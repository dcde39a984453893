"""What Python needs of the C ABI of `kernels/include/powertrain_kernels.h`, in ctypes. The passes of power retention
are called from C++ (`torch_binding.cpp`), which includes the header.
"""

import ctypes
from ctypes import POINTER, c_char, c_char_p, c_int32, c_int64, c_void_p

ABI_VERSION = 13
"""The `PT_ABI_VERSION` that this package speaks."""

DTYPE_BF16, DTYPE_FP16 = 0, 1


class KernelAttributes(ctypes.Structure):
    """`pt_kernel_attributes`."""

    _fields_ = (
        ("name", c_char * 96),
        ("arch", c_int32),
        ("registers", c_int32),
        ("local_bytes", c_int32),
        ("shared_bytes", c_int32),
        ("threads", c_int32),
    )


class CrossEntropy(ctypes.Structure):
    """`pt_cross_entropy_params`."""

    _fields_ = (
        ("dtype", c_int32),
        ("has_log_sum_exp", c_int32),
        ("write_gradients", c_int32),
        ("rows", c_int64),
        ("columns", c_int64),
        ("row_stride", c_int64),
        ("logits", c_void_p),
        ("labels", c_void_p),
        ("ignore_index", c_int64),
        ("factors", c_void_p),
        ("losses", c_void_p),
        ("log_sum_exp", c_void_p),
    )


def declare(library: ctypes.CDLL) -> None:
    """Gives the functions of a loaded library that are called from Python their argument types."""
    library.pt_last_error.restype = c_char_p
    library.pt_kernel_count.argtypes = (POINTER(c_int32),)
    library.pt_kernel_info.argtypes = (c_int32, POINTER(KernelAttributes))
    library.pt_cross_entropy.argtypes = (POINTER(CrossEntropy), c_void_p)
