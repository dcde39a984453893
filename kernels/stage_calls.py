"""The stages of the kernel library through ctypes, without powertrain's own Python: the ABI's structures, inputs packed and states unpacked in
torch from the layouts documented in src/common/layout.cuh, so that a wrong index map in a kernel cannot cancel against itself."""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK, NORM = 64, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # cpu: a library built by emulation/build.py
P, I32, I64, F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Strided(ctypes.Structure):
    _fields_ = [("data", P), ("stride_b", I64), ("stride_t", I64), ("stride_h", I64)]


class Problem(ctypes.Structure):
    _fields_ = [
        ("dtype", I32), ("arch", I32), ("batch", I32), ("query_heads", I32), ("key_heads", I32), ("head_dim", I32), ("chunk_size", I32),
        ("state_scale", F32), ("seq_len", I64),
    ]  # fmt: skip


class Sizes(ctypes.Structure):
    _fields_ = [
        ("packed_q", I64), ("packed_k", I64), ("packed_v", I64), ("packed_dn", I64), ("gates", I64), ("states", I64),
        ("boundary", I64), ("dots", I64), ("chunk_state_workspace", I64), ("steps_workspace", I64),
        ("reserved", I64 * 6),
    ]  # fmt: skip


class Pack(ctypes.Structure):
    _fields_ = [
        ("q", Strided), ("k", Strided), ("v", Strided), ("query_scale", P), ("key_scale", P), ("value_scale", P), ("log_G", P),
        ("log_G_stride_b", I64), ("log_G_stride_t", I64), ("log_G_stride_h", I64), ("cu_seqlens", P), ("num_cu_seqlens", I32), ("gates", P),
        ("packed_q", P), ("packed_k", P), ("packed_v", P), ("decayed_v", P),
    ]  # fmt: skip


class ChunkState(ctypes.Structure):
    _fields_ = [
        ("reverse", I32), ("x", P), ("u", P), ("gates", P), ("initial", P), ("states", P), ("final_state", P), ("workspace", P),
    ]  # fmt: skip


class ChunkScan(ctypes.Structure):
    _fields_ = [
        ("reverse", I32), ("has_boundary", I32), ("q", P), ("k", P), ("u", P), ("gates", P), ("states", P), ("out", Strided),
        ("out_scale", P), ("normalizer", P),
    ]  # fmt: skip


class ChunkScanGrad(ctypes.Structure):
    _fields_ = [
        ("reverse", I32), ("has_boundary", I32), ("q", P), ("k", P), ("v", P), ("dn", P), ("gates", P), ("states", P),
        ("out", Strided), ("x_scale", P), ("value_scale", P), ("dn_scale", P), ("row_scale", P), ("dots", P),
    ]  # fmt: skip


class QueryScan(ctypes.Structure):
    _fields_ = [
        ("q", P), ("k", P), ("v", P), ("unpacked_q", Strided), ("unpacked_k", Strided), ("unpacked_v", Strided), ("gates", P), ("initial", P), ("out", Strided), ("normalizer", P), ("states", P),
        ("final_state", P), ("workspace", P),
    ]  # fmt: skip


class KeyGrads(ctypes.Structure):
    _fields_ = [
        ("q", P), ("k", P), ("v", P), ("dn", P), ("dy", Strided), ("y", Strided), ("normalizer", P), ("gates", P), ("dv", Strided),
        ("dk", Strided), ("dots", P), ("grad_states", P), ("final_state", P), ("workspace", P),
    ]  # fmt: skip


class StateFlow(ctypes.Structure):
    _fields_ = [("states", P), ("grad_states", P), ("gates", P), ("key_dots", P), ("every_chunk", I32), ("flow", P)]


class GateGrad(ctypes.Structure):
    _fields_ = [
        ("query_dots", P), ("key_dots", P), ("flow", P), ("step_dots", P), ("gates", P), ("has_documents", I32),
        ("has_initial_state", I32), ("dn_scale", P), ("value_scale", P), ("dlog_G", P), ("dlog_G_stride_b", I64),
        ("dlog_G_stride_t", I64), ("dlog_G_stride_h", I64),
    ]  # fmt: skip


class ForwardPass(ctypes.Structure):
    _fields_ = [
        ("phase", I32), ("q", Strided), ("k", Strided), ("v", Strided), ("log_G", P), ("log_G_stride_b", I64), ("log_G_stride_t", I64),
        ("log_G_stride_h", I64), ("cu_seqlens", P), ("num_cu_seqlens", I32), ("initial_state", P), ("initial_sum_of_keys", P),
        ("out", Strided), ("normalizer", P), ("final_state", P), ("final_sum_of_keys", P), ("saved", P), ("workspace", P),
    ]  # fmt: skip


class BackwardPass(ctypes.Structure):
    _fields_ = [
        ("phase", I32), ("dy", Strided), ("y", Strided), ("normalizer", P), ("saved", P), ("has_documents", I32), ("has_initial_state", I32),
        ("dfinal_state", P), ("dfinal_sum_of_keys", P), ("dq", Strided), ("dk", Strided), ("dv", Strided),
        ("dlog_G", P), ("dlog_G_stride_b", I64), ("dlog_G_stride_t", I64), ("dlog_G_stride_h", I64), ("dinitial_state", P),
        ("dinitial_sum_of_keys", P), ("begun", P), ("workspace", P),
    ]  # fmt: skip


class KernelInfo(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 96),
        ("arch", I32),
        ("registers", I32),
        ("local_bytes", I32),
        ("shared_bytes", I32),
        ("threads", I32),
    ]


def strided(x: Tensor) -> Strided:
    return Strided(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def blocks_of(x: Tensor) -> Tensor:
    """(B, T, H, D) -> (B, H, Tp/64, 8, 8, D), zero beyond T."""
    batch, tokens, heads, width = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -tokens % BLOCK))
    return padded.permute(0, 2, 1, 3).reshape(batch, heads, -1, 8, 8, width)


def pack_features(x: Tensor) -> Tensor:
    blocks = blocks_of(x)
    return (
        blocks.unflatten(-1, (-1, 8)).permute(0, 1, 2, 5, 3, 6, 4).contiguous()
    )  # feature group, token group, feature, token


def pack_values(x: Tensor, norm: Tensor) -> Tensor:
    """norm (B, T, H, n): the first n columns of the last group."""
    padded = torch.nn.functional.pad(norm, (0, NORM - norm.shape[-1]))
    blocks = blocks_of(torch.cat([x, padded.to(x.dtype)], -1))
    return (
        blocks.unflatten(-1, (-1, 8)).permute(0, 1, 2, 5, 3, 4, 6).contiguous()
    )  # column group, token group, token, column


def hi_lo(x: Tensor, dtype: torch.dtype) -> Tensor:
    high = x.to(dtype)
    return torch.stack([high, (x - high.to(x.dtype)).to(dtype)], -1)


def tile_pairs(head_dim: int) -> list[tuple[int, int, int]]:
    n = head_dim // 8
    return [(i, (i + d) % n, d) for i in range(n) for d in range(n // 2)] + [
        (i, i + n // 2, n // 2) for i in range(n // 2)
    ]


def phi(x: Tensor) -> Tensor:
    """(..., K) -> (..., tiles, 64): the products of every tile, no weights."""
    parts = x.unflatten(-1, (-1, 8))
    return torch.stack(
        [(parts[..., i, :, None] * parts[..., j, None, :]).flatten(-2) for i, j, _ in tile_pairs(x.shape[-1])], -2
    )


def unpack_states(states: Tensor, head_dim: int) -> Tensor:
    """(BHk, N, tiles, (V+8)/8, 64, 8) 16-bit -> (BHk, N, tiles, 64, V+1) float64 without weights, hi + lo joined."""
    s = states.double().permute(0, 1, 2, 4, 3, 5).flatten(-2)
    weights = torch.tensor([2.0 if d else 1.0 for _, _, d in tile_pairs(head_dim)], device=s.device, dtype=s.dtype)
    s = s / weights[:, None, None]
    return torch.cat([s[..., :head_dim], s[..., head_dim : head_dim + 1] + s[..., head_dim + 1 : head_dim + 2]], -1)


@dataclass
class Case:
    batch: int = 1
    tokens: int = 512
    query_heads: int = 2
    key_heads: int = 2
    head_dim: int = 64
    chunk: int = 256
    gate: float = 0.02  # mean of -log_G; 0: none
    documents: tuple[int, ...] = ()  # starts of further documents in every row
    boundary: bool = False
    dtype: torch.dtype = torch.bfloat16


class Run:
    """Inputs, buffers and stage calls of one case."""

    def __init__(self, library: ctypes.CDLL, case: Case, arch: int, seed: int = 0):
        self.library, self.case = library, case
        c = case
        g = torch.Generator(device=DEVICE).manual_seed(seed)

        def normal(heads: int) -> Tensor:
            return torch.randn(c.batch, c.tokens, heads, c.head_dim, generator=g, device=DEVICE).to(c.dtype)

        self.q, self.k, self.v, self.dy = (
            normal(c.query_heads),
            normal(c.key_heads),
            normal(c.key_heads),
            normal(c.query_heads),
        )
        noise = torch.rand(c.batch, c.tokens, c.key_heads, generator=g, device=DEVICE)
        self.log_G = -2 * c.gate * noise
        scale = 2.0 ** -max(0, math.ceil(math.log2(c.tokens / 4096))) if c.dtype == torch.float16 else 1.0
        self.problem = Problem(
            1 if c.dtype == torch.float16 else 0,
            arch,
            c.batch,
            c.query_heads,
            c.key_heads,
            c.head_dim,
            c.chunk,
            scale,
            c.tokens,
        )
        self.sizes = Sizes()
        self.call("pt_sizes_of", ctypes.byref(self.sizes))
        self.gates = self.make_gates()
        self.packed_q, self.packed_k = pack_features(self.q), pack_features(self.k)
        self.packed_v = pack_values(self.v, torch.ones_like(self.v[..., :1]))
        decay = self.decay_out[..., None]
        self.decayed_v = pack_values((self.v.float() * decay).to(c.dtype), hi_lo(decay[..., 0], c.dtype))
        tiles = len(tile_pairs(c.head_dim))
        self.state_shape = (c.batch * c.key_heads, -(-c.tokens // c.chunk), tiles, (c.head_dim + NORM) // 8, BLOCK, 8)
        self.boundary_shape = (c.batch * c.key_heads, tiles, BLOCK, c.head_dim + NORM)
        self.workspace = torch.full((self.sizes.chunk_state_workspace // 4 + 1,), math.nan, device=DEVICE)
        self.initial = self.dfinal = self.dfinal_scaled = self.dn_scale = None
        if c.boundary:
            keys = torch.randn(c.batch * c.key_heads, 64, c.head_dim, generator=g, device=DEVICE).double()
            values = torch.randn(c.batch * c.key_heads, 64, c.head_dim, generator=g, device=DEVICE).double()
            self.initial = self.boundary_from(keys, values, 1.0)
            self.dfinal = self.boundary_from(keys.flip(1), values.flip(1), 1e-3)

    def boundary_from(self, keys: Tensor, values: Tensor, factor: float) -> Tensor:
        columns = torch.cat([values, torch.ones_like(values[..., :1]), torch.zeros_like(values[..., : NORM - 1])], -1)
        return (factor * torch.einsum("htgr,htc->hgrc", phi(keys), columns)).float().contiguous()

    def call(self, name: str, *args: object) -> None:
        function = getattr(self.library, name)
        if function(ctypes.byref(self.problem), *args):
            raise RuntimeError(f"{name}: {self.library.pt_last_error().decode()}")

    def stream(self) -> P:
        return P(torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else None)

    def make_gates(self) -> Tensor:
        c = self.case
        n = -(-c.tokens // BLOCK)
        padded = n * BLOCK
        log2 = torch.zeros(c.batch, c.key_heads, padded, dtype=torch.float64, device=DEVICE)
        log2[..., : c.tokens] = self.log_G.double().permute(0, 2, 1) / math.log(2)
        closed = torch.zeros(padded, dtype=torch.float64, device=DEVICE)
        starts = torch.zeros(padded, dtype=torch.int32, device=DEVICE)
        for start in c.documents:
            closed[start] = 1
            starts[start:] = start
        closed = closed.expand_as(log2)

        def decays(size: int) -> tuple[Tensor, Tensor, Tensor]:
            extra = -padded % size
            parts = [torch.nn.functional.pad(a, (0, extra)).unflatten(-1, (-1, size)) for a in (log2, closed)]
            into = [a.cumsum(-1) for a in parts]
            out = [a[..., -1:] - a for a in into]
            decay_in = torch.where(into[1] > 0, 0.0, 2.0 ** into[0])
            decay_out = torch.where(out[1] > 0, 0.0, 2.0 ** out[0])
            return decay_in.flatten(-2)[..., :padded], decay_out.flatten(-2)[..., :padded], decay_in[..., -1]

        block_in, block_out, block = decays(BLOCK)
        chunk_in, chunk_out, chunk = decays(c.chunk)
        self.chunk_decay = chunk  # (B, Hk, N) float64
        self.decay_in, self.decay_out = (a[..., : c.tokens].permute(0, 2, 1).float() for a in (chunk_in, chunk_out))
        arrays = [log2.unflatten(-1, (-1, BLOCK)).cumsum(-1), block_in, block_out, chunk_in, chunk_out, block, chunk]
        parts = [a.float().flatten() for a in arrays] + [starts.expand(c.batch, -1).flatten().view(torch.float32)]
        aligned = [torch.nn.functional.pad(a, (0, -a.numel() % 64)) for a in parts]
        gates = torch.cat(aligned).contiguous()
        assert gates.numel() * 4 == self.sizes.gates, (gates.numel() * 4, self.sizes.gates)
        return gates

    def pack(self, gates_alone: bool = False) -> dict[str, Tensor]:
        """What pt_pack makes of the inputs; the attributes of the same names are what it should make. Without a gate or documents it gets none."""
        c = self.case
        names = ("gates",) if gates_alone else ("gates", "packed_q", "packed_k", "packed_v", "decayed_v")
        out = {name: torch.full_like(getattr(self, name), math.nan) for name in names}
        log_G = self.log_G if c.gate else None
        starts = [row * c.tokens + start for row in range(c.batch) for start in (0, *c.documents)]
        offsets = torch.tensor([*starts, c.batch * c.tokens], dtype=torch.int32, device=DEVICE) if c.documents else None
        params = Pack(
            *([Strided()] * 3 if gates_alone else map(strided, (self.q, self.k, self.v))),
            *(None, None, None),
            *((None, 0, 0, 0) if log_G is None else (log_G.data_ptr(), *log_G.stride())),
            *((None, 0) if offsets is None else (offsets.data_ptr(), offsets.numel())),
            *(x.data_ptr() for x in out.values()),
        )
        self.call("pt_pack", ctypes.byref(params), self.stream())
        synchronize()
        return out

    def chunk_state(self, reverse: bool, states: Tensor | None, final: Tensor | None) -> None:
        x, u = (self.packed_q, self.decayed_dn) if reverse else (self.packed_k, self.decayed_v)
        boundary = (self.dfinal if self.dn_scale is None else self.dfinal_scaled) if reverse else self.initial
        params = ChunkState(
            reverse,
            *(None if t is None else t.data_ptr() for t in (x, u, self.gates, boundary, states, final, self.workspace)),
        )
        self.call("pt_chunk_state", ctypes.byref(params), self.stream())

    def chunk_scan(self, reverse: bool, states: Tensor, out: Tensor, normalizer: Tensor | None) -> None:
        u, scale = (self.packed_dn, self.dn_scale) if reverse else (self.packed_v, None)
        inputs = [t.data_ptr() for t in (self.packed_q, self.packed_k, u, self.gates, states)]
        optional = [None if t is None else t.data_ptr() for t in (scale, normalizer)]
        params = ChunkScan(reverse, self.case.boundary, *inputs, strided(out), *optional)
        self.call("pt_chunk_scan", ctypes.byref(params), self.stream())

    def chunk_scan_grad(self, reverse: bool, states: Tensor, out: Tensor, dots: Tensor) -> None:
        inputs = [self.packed_q, self.packed_k, self.packed_v, self.packed_dn, self.gates, states]
        scale = None if self.dn_scale is None else self.dn_scale.data_ptr()
        pointers = [t.data_ptr() for t in inputs]
        params = ChunkScanGrad(
            reverse, self.case.boundary, *pointers, strided(out), None, None, scale, None, dots.data_ptr()
        )
        self.call("pt_chunk_scan_grad", ctypes.byref(params), self.stream())

    def query_scan(self, final: bool = True, final_only: bool = False, packs: bool = False) -> dict[str, Tensor]:
        """y, normalizer, states and if wanted final (or that alone), where pt_query_scan takes the problem; with `packs` of the tensors as they are, packed as
        packed_q, packed_k and packed_v."""
        c = self.case
        out = {
            "y": self.new(*self.q.shape, dtype=c.dtype),
            "normalizer": self.new(c.batch, c.query_heads, c.tokens, dtype=torch.float32),
            "states": self.new(*self.state_shape, dtype=c.dtype),
        }
        if final:
            out["final"] = self.new(*self.boundary_shape, dtype=torch.float32)
        workspace = self.new(self.sizes.steps_workspace // 4, dtype=torch.float32)
        packed = {name: getattr(self, name) for name in ("packed_q", "packed_k", "packed_v")}
        if packs:
            packed = {name: torch.full_like(x, math.nan) for name, x in packed.items()}
            out |= {name: x for name, x in packed.items() if not (final_only and name == "packed_q")}
        params = QueryScan(
            *(x.data_ptr() for x in packed.values()),
            strided(self.q) if packs and not final_only else Strided(),
            *(map(strided, (self.k, self.v)) if packs else [Strided()] * 2),
            self.gates.data_ptr(),
            None if self.initial is None else self.initial.data_ptr(),
            Strided() if final_only else strided(out["y"]),
            *(out[name].data_ptr() if name in out else None for name in ("normalizer", "states", "final")),
            workspace.data_ptr(),
        )
        self.call("pt_query_scan", ctypes.byref(params), self.stream())
        return out

    def key_grads(self, final_only: bool = False, packs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """dv, dk, key_dots (2, B, Hk, Tp), dstates and dinitial (or that alone), where pt_key_grads takes the problem; with `packs`, what the forward
        pass made, of dy as it is, packed as packed_dn."""
        c = self.case
        padded = -(-c.tokens // BLOCK) * BLOCK
        out = {
            "dv": self.new(*self.v.shape, dtype=c.dtype),
            "dk": self.new(*self.k.shape, dtype=c.dtype),
            "key_dots": self.new(2, c.batch, c.key_heads, padded, dtype=torch.float32),
            "dstates": self.new(*self.state_shape, dtype=c.dtype),
            "dinitial": self.new(*self.boundary_shape, dtype=torch.float32),
        }
        workspace = self.new(self.sizes.steps_workspace // 4, dtype=torch.float32)
        dn = self.packed_dn
        if packs:
            dn = out["packed_dn"] = torch.full_like(dn, math.nan)
        params = KeyGrads(
            *(t.data_ptr() for t in (self.packed_q, self.packed_k, self.packed_v, dn)),
            *(
                (strided(self.dy), strided(packs["y"]), packs["normalizer"].data_ptr())
                if packs
                else (Strided(), Strided(), None)
            ),
            self.gates.data_ptr(),
            *(Strided() if final_only else strided(out[name]) for name in ("dv", "dk")),
            *(out[name].data_ptr() for name in ("key_dots", "dstates", "dinitial")),
            workspace.data_ptr(),
        )
        self.call("pt_key_grads", ctypes.byref(params), self.stream())
        return out

    def state_flow(self, states: Tensor, grad_states: Tensor, key_dots: Tensor | None, every_chunk: bool) -> Tensor:
        """(B, Hk, N)"""
        flow = self.new(self.case.batch, self.case.key_heads, self.state_shape[1], dtype=torch.float32)
        tensors = (states, grad_states, self.gates, key_dots)
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        self.call("pt_state_flow", ctypes.byref(StateFlow(*pointers, every_chunk, flow.data_ptr())), self.stream())
        synchronize()
        return flow

    def gate_grad(
        self,
        query_dots: Tensor,
        key_dots: Tensor,
        flow: Tensor | None,
        scales: tuple[Tensor, Tensor] | None,
        step_dots: Tensor | None = None,
    ) -> Tensor:
        """(B, T, Hk); `scales` are dn_scale and value_scale."""
        batch, tokens, heads = self.log_G.shape
        guarded = self.new(batch, tokens + 64, heads, dtype=torch.float32)  # what lies beyond a row stays as it is
        out = guarded[:, :tokens]
        tensors = (query_dots, key_dots, flow, step_dots, self.gates)
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        optional = (None, None) if scales is None else [t.data_ptr() for t in scales]
        of_case = (bool(self.case.documents), self.case.boundary)
        params = GateGrad(*pointers, *of_case, *optional, out.data_ptr(), *out.stride())
        self.call("pt_gate_grad", ctypes.byref(params), self.stream())
        synchronize()
        assert guarded[:, tokens:].isnan().all()
        return out

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)

    def pack_dn(self, dy: Tensor, y: Tensor, normalizer: Tensor) -> Tensor:
        """Packs dn' (and decayed_dn) and, in fp16, sets dn_scale (B, Hk): powers of two that bring the largest |dn'| of a key head below 1."""
        d = normalizer.permute(0, 2, 1)[..., None]
        dn = dy.float() / d
        self.dn_scale = None
        if dy.dtype == torch.float16:
            last = -(dn * y.float()).sum(-1, keepdim=True)
            largest = torch.cat([dn, last], -1).abs().unflatten(2, (self.case.key_heads, -1)).amax((1, 3, 4))
            self.dn_scale = (2.0 ** -(largest.log2().floor() + 1)).contiguous()
            dn = dn * self.dn_scale.repeat_interleave(dn.shape[2] // self.case.key_heads, 1)[:, None, :, None]
        dn = dn.to(dy.dtype)
        last = -(dn.float() * y.float()).sum(-1)
        decay = self.decay_in.repeat_interleave(dn.shape[2] // self.case.key_heads, 2)
        self.decayed_dn = pack_values((dn.float() * decay[..., None]).to(dy.dtype), hi_lo(last * decay, dy.dtype))
        return pack_values(dn, hi_lo(last, dy.dtype))

    def forward(self) -> dict[str, Tensor]:
        c = self.case
        out = {
            "states": self.new(*self.state_shape, dtype=c.dtype),
            "final": self.new(*self.boundary_shape, dtype=torch.float32),
            "y": self.new(*self.q.shape, dtype=c.dtype),
            "normalizer": self.new(c.batch, c.query_heads, c.tokens, dtype=torch.float32),
        }
        self.chunk_state(False, out["states"], out["final"])
        self.chunk_scan(False, out["states"], out["y"], out["normalizer"])
        return out

    def backward(self, forward: dict[str, Tensor], grad_stage: bool) -> dict[str, Tensor]:
        c = self.case
        self.packed_dn = self.pack_dn(self.dy, forward["y"], forward["normalizer"])
        out = {
            "dstates": self.new(*self.state_shape, dtype=c.dtype),
            "dinitial": self.new(*self.boundary_shape, dtype=torch.float32),
            "dv": self.new(*self.v.shape, dtype=c.dtype),
        }
        if self.dn_scale is not None and self.dfinal is not None:
            self.dfinal_scaled = self.dfinal * self.dn_scale.flatten()[:, None, None, None]
        self.chunk_state(True, out["dstates"], out["dinitial"])
        self.chunk_scan(True, out["dstates"], out["dv"], None)
        if grad_stage:
            padded = -(-c.tokens // BLOCK) * BLOCK
            out["dq"], out["dk"] = self.new(*self.q.shape, dtype=c.dtype), self.new(*self.k.shape, dtype=c.dtype)
            out["query_dots"] = self.new(c.batch, c.query_heads, padded, dtype=torch.float32)
            out["key_dots"] = self.new(2, c.batch, c.key_heads, padded, dtype=torch.float32)
            self.chunk_scan_grad(False, forward["states"], out["dq"], out["query_dots"])
            self.chunk_scan_grad(True, out["dstates"], out["dk"], out["key_dots"])
        if self.dn_scale is not None:
            out["dinitial"] /= self.dn_scale.flatten()[:, None, None, None]
            if grad_stage:
                out["query_dots"] /= self.dn_scale.repeat_interleave(c.query_heads // c.key_heads, 1)[..., None]
                out["key_dots"] /= self.dn_scale[..., None]
        return out
