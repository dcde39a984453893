"""The C ABI of `kernels/include/powertrain_kernels.h` in ctypes: structs, field by field, and the functions' types."""

import ctypes
from ctypes import POINTER, c_char, c_char_p, c_float, c_int32, c_int64, c_void_p

ABI_VERSION = 2
"""The `PT_ABI_VERSION` that these structs mirror."""

DTYPE_BF16, DTYPE_FP16 = 0, 1
PACK_FEATURES, PACK_VALUES = 0, 1
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


class Sizes(ctypes.Structure):
    """`pt_sizes`, in bytes."""

    _fields_ = (
        ("packed_q", c_int64),
        ("packed_k", c_int64),
        ("packed_v", c_int64),
        ("packed_dn", c_int64),
        ("gates", c_int64),
        ("states", c_int64),
        ("boundary", c_int64),
        ("dots", c_int64),
        ("chunk_state_workspace", c_int64),
        ("reserved", c_int64 * 7),
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


class PowerScale(ctypes.Structure):
    """`pt_power_scale_params`."""

    _fields_ = (("x", StridedTensor), ("heads", c_int32), ("groups", c_int32), ("scale", c_void_p))


class RowScale(ctypes.Structure):
    """`pt_row_scale_params`."""

    _fields_ = (
        ("packed_q", c_void_p),
        ("normalizer", c_void_p),
        ("scaled_q", c_void_p),
        ("scaled_normalizer", c_void_p),
        ("row_scale", c_void_p),
    )


class Gates(ctypes.Structure):
    """`pt_gates_params`."""

    _fields_ = (
        ("log_G", c_void_p),
        ("log_G_stride_b", c_int64),
        ("log_G_stride_t", c_int64),
        ("log_G_stride_h", c_int64),
        ("cu_seqlens", c_void_p),
        ("num_cu_seqlens", c_int32),
        ("gates", c_void_p),
    )


class Pack(ctypes.Structure):
    """`pt_pack_params`."""

    _fields_ = (
        ("x", StridedTensor),
        ("heads", c_int32),
        ("kind", c_int32),
        ("scale", c_void_p),
        ("packed", c_void_p),
        ("gates", c_void_p),
        ("decayed", c_void_p),
    )


class PackGrad(ctypes.Structure):
    """`pt_pack_grad_params`."""

    _fields_ = (
        ("dy", StridedTensor),
        ("y", StridedTensor),
        ("normalizer", c_void_p),
        ("value_scale", c_void_p),
        ("dn_scale", c_void_p),
        ("packed_dn", c_void_p),
        ("gates", c_void_p),
        ("decayed", c_void_p),
    )


class GateGrad(ctypes.Structure):
    """`pt_gate_grad_params`."""

    _fields_ = (
        ("query_dots", c_void_p),
        ("key_dots", c_void_p),
        ("through", c_void_p),
        ("cu_seqlens", c_void_p),
        ("num_cu_seqlens", c_int32),
        ("has_initial_state", c_int32),
        ("scale", c_void_p),
        ("dlog_G", c_void_p),
        ("dlog_G_stride_b", c_int64),
        ("dlog_G_stride_t", c_int64),
        ("dlog_G_stride_h", c_int64),
    )


class StateFlow(ctypes.Structure):
    """`pt_state_flow_params`."""

    _fields_ = (("states", c_void_p), ("grad_states", c_void_p), ("gates", c_void_p), ("through", c_void_p))


class Boundary(ctypes.Structure):
    """`pt_boundary_params`."""

    _fields_ = (
        ("state", c_void_p),
        ("sum_of_keys", c_void_p),
        ("boundary", c_void_p),
        ("to_boundary", c_int32),
        ("gradient", c_int32),
        ("key_scale", c_void_p),
        ("value_scale", c_void_p),
    )


class ChunkState(ctypes.Structure):
    """`pt_chunk_state_params`."""

    _fields_ = (
        ("reverse", c_int32),
        ("x", c_void_p),
        ("u", c_void_p),
        ("gates", c_void_p),
        ("initial", c_void_p),
        ("states", c_void_p),
        ("final_state", c_void_p),
        ("workspace", c_void_p),
    )


class ChunkScan(ctypes.Structure):
    """`pt_chunk_scan_params`."""

    _fields_ = (
        ("reverse", c_int32),
        ("has_boundary", c_int32),
        ("q", c_void_p),
        ("k", c_void_p),
        ("u", c_void_p),
        ("gates", c_void_p),
        ("states", c_void_p),
        ("out", StridedTensor),
        ("out_scale", c_void_p),
        ("normalizer", c_void_p),
    )


class ChunkScanGrad(ctypes.Structure):
    """`pt_chunk_scan_grad_params`."""

    _fields_ = (
        ("reverse", c_int32),
        ("has_boundary", c_int32),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("dn", c_void_p),
        ("gates", c_void_p),
        ("states", c_void_p),
        ("out", StridedTensor),
        ("x_scale", c_void_p),
        ("value_scale", c_void_p),
        ("dn_scale", c_void_p),
        ("dots", c_void_p),
    )


STAGE_PARAMETERS: dict[str, type[ctypes.Structure]] = {
    "pt_power_scale": PowerScale,
    "pt_row_scale": RowScale,
    "pt_gates": Gates,
    "pt_pack": Pack,
    "pt_pack_grad": PackGrad,
    "pt_gate_grad": GateGrad,
    "pt_state_flow": StateFlow,
    "pt_boundary": Boundary,
    "pt_chunk_state": ChunkState,
    "pt_chunk_scan": ChunkScan,
    "pt_chunk_scan_grad": ChunkScanGrad,
}


def declare(library: ctypes.CDLL) -> None:
    """Gives every function of a loaded library its argument types."""
    library.pt_last_error.restype = c_char_p
    library.pt_sizes_of.argtypes = (POINTER(Problem), POINTER(Sizes))
    library.pt_selected_arch.argtypes = (POINTER(Problem), c_int32, POINTER(c_int32))
    library.pt_compiled_archs.argtypes = (POINTER(c_int32), c_int32, POINTER(c_int32))
    library.pt_kernel_count.argtypes = (POINTER(c_int32),)
    library.pt_kernel_info.argtypes = (c_int32, POINTER(KernelAttributes))
    for name, parameters in STAGE_PARAMETERS.items():
        getattr(library, name).argtypes = (POINTER(Problem), POINTER(parameters), c_void_p)
