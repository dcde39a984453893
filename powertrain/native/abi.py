"""The C ABI of `kernels/include/powertrain_kernels.h` in ctypes: structs, field by field, and the functions' types."""

import ctypes
from ctypes import POINTER, c_char, c_char_p, c_float, c_int32, c_int64, c_void_p

ABI_VERSION = 5
"""The `PT_ABI_VERSION` that these structs mirror."""

DTYPE_BF16, DTYPE_FP16 = 0, 1
STAGES = ("chunk_state", "chunk_scan", "chunk_scan_grad")


class StridedTensor(ctypes.Structure):
    """`pt_tensor`: `(B, T, H, D)`, the last dimension contiguous, strides in elements."""

    _fields_ = (("data", c_void_p), ("stride_b", c_int64), ("stride_t", c_int64), ("stride_h", c_int64))


class Problem(ctypes.Structure):
    """`pt_problem`."""

    _fields_ = (
        ("dtype", c_int32),
        ("arch", c_int32),
        ("batch", c_int32),
        ("query_heads", c_int32),
        ("key_heads", c_int32),
        ("head_dim", c_int32),
        ("chunk_size", c_int32),
        ("state_scale", c_float),
        ("seq_len", c_int64),
    )


class PassSizes(ctypes.Structure):
    """`pt_pass_sizes`, in bytes."""

    _fields_ = (
        ("saved", c_int64),
        ("forward_workspace", c_int64),
        ("backward_workspace", c_int64),
        ("scales", c_int64),
    )


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


class Forward(ctypes.Structure):
    """`pt_forward_params`."""

    _fields_ = (
        ("q", StridedTensor),
        ("k", StridedTensor),
        ("v", StridedTensor),
        ("log_G", c_void_p),
        ("log_G_stride_b", c_int64),
        ("log_G_stride_t", c_int64),
        ("log_G_stride_h", c_int64),
        ("cu_seqlens", c_void_p),
        ("num_cu_seqlens", c_int32),
        ("initial_state", c_void_p),
        ("initial_sum_of_keys", c_void_p),
        ("out", StridedTensor),
        ("normalizer", c_void_p),
        ("final_state", c_void_p),
        ("final_sum_of_keys", c_void_p),
        ("saved", c_void_p),
        ("workspace", c_void_p),
    )


class Backward(ctypes.Structure):
    """`pt_backward_params`."""

    _fields_ = (
        ("dy", StridedTensor),
        ("y", StridedTensor),
        ("normalizer", c_void_p),
        ("saved", c_void_p),
        ("cu_seqlens", c_void_p),
        ("num_cu_seqlens", c_int32),
        ("has_initial_state", c_int32),
        ("dfinal_state", c_void_p),
        ("dfinal_sum_of_keys", c_void_p),
        ("dq", StridedTensor),
        ("dk", StridedTensor),
        ("dv", StridedTensor),
        ("dlog_G", c_void_p),
        ("dlog_G_stride_b", c_int64),
        ("dlog_G_stride_t", c_int64),
        ("dlog_G_stride_h", c_int64),
        ("dinitial_state", c_void_p),
        ("dinitial_sum_of_keys", c_void_p),
        ("workspace", c_void_p),
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
    """Gives the functions of a loaded library that are called from here their argument types."""
    library.pt_last_error.restype = c_char_p
    library.pt_pass_sizes_of.argtypes = (POINTER(Problem), c_int32, c_int32, POINTER(PassSizes))
    library.pt_selected_arch.argtypes = (POINTER(Problem), c_int32, POINTER(c_int32))
    library.pt_compiled_archs.argtypes = (POINTER(c_int32), c_int32, POINTER(c_int32))
    library.pt_kernel_count.argtypes = (POINTER(c_int32),)
    library.pt_kernel_info.argtypes = (c_int32, POINTER(KernelAttributes))
    library.pt_forward.argtypes = (POINTER(Problem), POINTER(Forward), c_void_p)
    library.pt_backward.argtypes = (POINTER(Problem), POINTER(Backward), c_void_p)
    library.pt_cross_entropy.argtypes = (POINTER(CrossEntropy), c_void_p)
