"""What the CUDA path decides from shapes alone: what it supports, the chunk size, the sizes of its buffers."""

import functools
from typing import Any

import torch

from powertrain.native import abi
from powertrain.ops.sympow import phi_dimension

DTYPES = {torch.bfloat16: abi.DTYPE_BF16, torch.float16: abi.DTYPE_FP16}
DEVICE_TYPES = ["cuda"]  # tests of an emulated library add "cpu"
HEAD_DIMS = (32, 64, 128)
BLOCK = 64  # tokens of a packed block; rows of a phi tile
NORM_COLUMNS = 8  # columns that the normaliser occupies beside V
_MIN_CAPABILITY = (8, 0)
_CHUNK_SIZES = (128, 256, 512, 1024, 2048)
# Reading or writing one byte of a state costs as much time as this many FLOPs of a matrix product (400 TFLOP/s over 4.2
# TB/s).
_FLOPS_PER_BYTE = 95.0
# In each direction a state is written, read and written by the join of time segments, and read by chunk_scan,
# chunk_scan_grad and, for some chunks (counted as if for all), state_flow. At K = 32 in bf16 on Hopper query_scan and
# key_grads neither join nor read states: fewer passes, which are not counted apart (512 is as fast as 256 there).
_STATE_PASSES = 12


def unsupported_tensor(x: torch.Tensor) -> str | None:
    """Return why no kernel takes tensors of this dtype and device, or None where they do."""
    if x.device.type not in DEVICE_TYPES:
        return f"the tensors are on {x.device}, and the kernels need a CUDA device"
    if x.dtype not in DTYPES:
        return f"the dtype is {x.dtype}, and the kernels take bfloat16 and float16"
    capability = _capability(x.device.index or 0) if x.device.type == "cuda" else None
    if capability is not None and capability < _MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    return None


def unsupported_head(K: int, V: int, deg: int) -> str | None:
    """Return why the power-retention kernels take no head of this shape at this degree, or None where they do."""
    if deg != 2:
        return f"deg is {deg}, and the kernels are written for deg 2"
    if K != V or K not in HEAD_DIMS:
        return f"the head dims are K = {K}, V = {V}, and the kernels take K = V of 32, 64 or 128"
    return None


def unsupported(query: torch.Tensor, value: torch.Tensor, deg: int) -> str | None:
    """Return why the power-retention kernels do not take these inputs, or None where they do."""
    reason = unsupported_tensor(query) or unsupported_head(query.shape[3], value.shape[3], deg)
    if reason is not None:
        return reason
    if query.shape[0] * query.shape[2] > 65535:
        return f"there are {query.shape[0] * query.shape[2]} rows of query heads, and the kernels take 65535"
    return None


@torch.compiler.assume_constant_result  # asked once, while a compiler traces
def _capability(index: int) -> tuple[int, int]:
    return _read_capability(index)


@functools.cache
def _read_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def phi_tiles(head_dim: int) -> int:
    """Return the number of 64-row tiles that hold phi of `head_dim` features."""
    return head_dim // 8 * (head_dim // 8 + 1) // 2


def choose_chunk_size(*, tokens: int, head_dim: int, query_heads_per_key_head: int, has_state: bool) -> int:
    """Return the chunk size of least cost for these shapes, forward and backward together; one chunk where no state
    pays.

    The cost counts FLOPs per token and key head and the passes over the states, as the
    FLOPs of the same time.
    """
    group = query_heads_per_key_head
    state_flops = 2 * phi_dimension(head_dim, 2) * (head_dim + 1)
    state_bytes = _state_bytes(head_dim)

    def cost(chunk_size: int) -> float:
        chunks = -(-tokens // chunk_size)
        reading = (chunks - 1 + has_state) / chunks
        intra_chunk = 3.5 * group * (min(chunk_size, tokens) + 1) * 2 * head_dim
        queries = 3 * group * state_flops * reading
        updates = 3 * state_flops * (chunks - 1) / chunks
        return intra_chunk + queries + updates + _STATE_PASSES * state_bytes * _FLOPS_PER_BYTE / chunk_size * reading

    whole = -(-tokens // BLOCK) * BLOCK
    return min([size for size in _CHUNK_SIZES if size < whole] + [whole], key=cost)


def saved_bytes(
    *,
    batch: Any,
    tokens: Any,
    query_heads: Any,
    key_heads: Any,
    head_dim: int,
    chunk_size: Any,
    has_state: bool,
    scaled: bool,
) -> Any:
    """Return the bytes of what the forward pass keeps for the backward pass: packed q, k and v', gates, states, and in
    fp16 scales.

    Plain arithmetic in the shapes, which may be symbolic; `pt_pass_sizes_of` agrees (a test compares them).
    """
    blocks, chunks = (tokens + BLOCK - 1) // BLOCK, (tokens + chunk_size - 1) // chunk_size
    heads = batch * key_heads
    rows = batch * query_heads * head_dim + heads * head_dim + heads * (head_dim + NORM_COLUMNS)
    total = rows * blocks * BLOCK * 2 + gate_bytes(batch, key_heads, blocks, chunks)
    if has_state or chunk_size < tokens:
        total += heads * chunks * _state_bytes(head_dim)
    return total + (batch * (query_heads + 2 * key_heads) * 4 if scaled else 0)


def begun_bytes(*, batch: Any, tokens: Any, query_heads: Any, key_heads: Any, head_dim: int, chunk_size: Any) -> Any:
    """Return the bytes of what a backward pass in two calls keeps between them: packed dn' and the states' gradients.

    As `saved_bytes`; bf16 only.
    """
    blocks, chunks = (tokens + BLOCK - 1) // BLOCK, (tokens + chunk_size - 1) // chunk_size
    dn = batch * query_heads * blocks * BLOCK * (head_dim + NORM_COLUMNS) * 2
    return dn + batch * key_heads * chunks * _state_bytes(head_dim)


def _state_bytes(head_dim: int) -> int:
    """Return the size of one chunk's 16-bit state of one head."""
    return phi_tiles(head_dim) * BLOCK * (head_dim + NORM_COLUMNS) * 2


def gate_bytes(batch: Any, key_heads: Any, blocks: Any, chunks: Any) -> Any:
    """Return the size of the gates buffer (`layout.cuh`, Gates)."""
    heads = batch * key_heads
    tokens = _padded(heads * blocks * BLOCK * 4)
    return 5 * tokens + _padded(heads * blocks * 4) + _padded(heads * chunks * 4) + _padded(batch * blocks * BLOCK * 4)


def _padded(size: Any) -> Any:
    return (size + 255) // 256 * 256
