"""Checks and times every stage of the kernel library alone, against float64, without powertrain's own Python.

    python kernels/check_stages.py LIBRARY [--arch 90] [--time] [--output FILE]

Inputs are packed and states unpacked here in torch, from the layouts documented in src/common/layout.cuh, so that a wrong index map in a
kernel cannot cancel against itself. Errors are relative norms; `plain` is the same quantity from the quadratic formula evaluated in the
same 16-bit type with fp32 accumulation. Exits with 1 if any quantity is worse than twice that.
"""

import argparse
import ctypes
import json
import math
import statistics
import sys
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
        ("boundary", I64), ("dots", I64), ("chunk_state_workspace", I64), ("reserved", I64 * 7),
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


def error(out: Tensor, reference: Tensor) -> float:
    if not torch.isfinite(out).all():
        return math.nan
    wrong, size = float((out.double() - reference).norm()), float(reference.norm())
    return wrong / size if size > 0 else (0.0 if wrong == 0 else math.inf)  # nothing enters the first chunk


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
        self.decay_in, self.decay_out = (a[..., : c.tokens].permute(0, 2, 1).float() for a in (chunk_in, chunk_out))
        arrays = [log2.unflatten(-1, (-1, BLOCK)).cumsum(-1), block_in, block_out, chunk_in, chunk_out, block, chunk]
        parts = [a.float().flatten() for a in arrays] + [starts.expand(c.batch, -1).flatten().view(torch.float32)]
        aligned = [torch.nn.functional.pad(a, (0, -a.numel() % 64)) for a in parts]
        gates = torch.cat(aligned).contiguous()
        assert gates.numel() * 4 == self.sizes.gates, (gates.numel() * 4, self.sizes.gates)
        return gates

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


def quadratic(run: Run, exact: bool) -> dict[str, Tensor]:
    """The op and its gradients from T x T weights: in float64, or rounded to the 16-bit type where tensor cores would take operands."""
    c = run.case
    group = c.query_heads // c.key_heads
    wide = torch.float64 if exact else torch.float32

    def rounded(x: Tensor) -> Tensor:
        return x if exact else x.to(c.dtype).to(wide)

    q, dy = (x.to(wide).permute(0, 2, 1, 3) for x in (run.q, run.dy))  # (B, Hq, T, K)
    k, v = (x.to(wide).permute(0, 2, 1, 3).repeat_interleave(group, 1) for x in (run.k, run.v))
    G = run.log_G.double().permute(0, 2, 1).cumsum(-1)
    start = torch.zeros(c.tokens, dtype=torch.int64, device=DEVICE)
    for s in c.documents:
        start[s:] = s
    at = torch.arange(c.tokens, device=DEVICE)
    visible = (at[None, :] <= at[:, None]) & (start[None, :] == start[:, None])
    D = (
        torch.where(visible, (G[..., :, None] - G[..., None, :]).clamp(max=0).exp(), 0.0)
        .to(wide)
        .repeat_interleave(group, 1)
    )
    s = q @ k.transpose(-1, -2)
    W = rounded(s * s * D)
    n, d = W @ v, W.sum(-1, keepdim=True)
    first = start[None, None, :, None] == 0
    G_in = (
        torch.where(first, G[..., None].exp(), 0.0).to(wide).repeat_interleave(group, 1)
    )  # decay from the initial state
    pairs = tile_pairs(c.head_dim)
    weights = torch.tensor([2.0 if p[2] else 1.0 for p in pairs], device=DEVICE, dtype=wide)[:, None]
    if c.boundary:
        S0 = run.initial.to(wide).unflatten(0, (c.batch, c.key_heads)).repeat_interleave(group, 1)
        pq = phi(q) * weights
        o = torch.einsum("bhtgr,bhgrc->bhtc", pq, rounded(S0[..., : c.head_dim + 1])) * G_in
        n, d = n + o[..., :-1], d + o[..., -1:]
    y = rounded(n / d)
    dn = dy / d
    unit = 1.0 if exact or c.dtype != torch.float16 else 2.0 ** -(float(dn.abs().max().log2().floor()) + 1)
    dn = rounded(dn * unit) / unit
    last = -(dn * y).sum(-1, keepdim=True)
    dW = dn @ v.transpose(-1, -2) + last
    ds = rounded(2 * s * D * dW * unit) / unit
    dq, dk, dv = ds @ k, ds.transpose(-1, -2) @ q, W.transpose(-1, -2) @ dn
    row, column = (W * dW).sum(-1), (W * dW).sum(-2)
    out = {"y": y, "normalizer": d.squeeze(-1)}

    def by_key_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (c.key_heads, group)).sum(2)

    if c.boundary:  # gradients through the initial and the final state
        x = torch.cat([dn, last], -1)
        dphi = torch.einsum("bhtc,bhgrc->bhtgr", x, S0[..., : c.head_dim + 1]) * G_in[..., None] * weights
        dq = dq + phi_vjp(q, dphi)
        dinitial = torch.einsum("bhtgr,bhtc->bhgrc", phi(q), x * G_in)
        through = torch.where(start[-1] == 0, G[..., -1].exp(), 0.0).to(wide).flatten()[:, None, None, None]
        out["dinitial"] = by_key_head(dinitial).flatten(0, 1) + through * run.dfinal.to(wide)[..., : c.head_dim + 1]
        row = row + (x * o).sum(-1)
        end = torch.where(start == start[-1], (G[..., -1:] - G).exp(), 0.0).to(wide)[..., None]
        E = rounded(run.dfinal.to(wide).unflatten(0, (c.batch, c.key_heads))[..., : c.head_dim + 1])
        kk, vv = (t.to(wide).permute(0, 2, 1, 3) for t in (run.k, run.v))
        # The final state enters the loss as <dfinal, S> over all entries with the tile weights, hence the same weights here.
        dv_end = torch.einsum("bhtgr,bhgrc->bhtc", rounded(phi(kk)) * weights, E) * end
        ones = torch.cat([vv, torch.ones_like(vv[..., :1])], -1)
        dk_end = phi_vjp(kk, torch.einsum("bhtc,bhgrc->bhtgr", ones, E) * end[..., None] * weights)
    dq, dk, dv, column = rounded(dq), by_key_head(dk), by_key_head(dv), by_key_head(column)
    if c.boundary:
        column = column + (dv_end * ones).sum(-1)
        dk, dv = dk + dk_end, dv + dv_end[..., :-1]
    out |= {"dq": dq, "dk": rounded(dk), "dv": rounded(dv), "query_dots": row, "key_dots": column}
    return {name: x.permute(0, 2, 1, 3) if name in ("y", "dq", "dk", "dv") else x for name, x in out.items()}


def cancelling_terms(run: Run) -> dict[str, float]:
    """Norms of what dq, dk and the dots would be if the terms of dW = dn . v - (dy . y) / d did not cancel, at T = 1 (elsewhere they do not)."""
    if run.case.tokens > 1:
        return {}
    group = run.case.query_heads // run.case.key_heads
    q, dy = run.q.double(), run.dy.double()
    k, v = (x.double().repeat_interleave(group, 2) for x in (run.k, run.v))
    s = (q * k).sum(-1, keepdim=True)
    dW = 2 * (dy * v).abs().sum(-1, keepdim=True) / s**2  # y = v, d = s^2
    dots = float((s**2 * dW).norm())
    return {
        "dq": float((2 * s * dW * k).norm()),
        "dk": float((2 * s * dW * q).norm()),
        "query_dots": dots,
        "key_dots": dots,
    }


def phi_vjp(x: Tensor, dphi: Tensor) -> Tensor:
    parts = x.unflatten(-1, (-1, 8))
    out = torch.zeros_like(parts)
    for t, (i, j, _) in enumerate(tile_pairs(x.shape[-1])):
        d = dphi[..., t, :].unflatten(-1, (8, 8))
        out[..., i, :] += (d * parts[..., j, None, :]).sum(-1)
        out[..., j, :] += (d * parts[..., i, :, None]).sum(-2)
    return out.flatten(-2)


def exact_states(run: Run) -> tuple[Tensor, Tensor]:
    """States entering each chunk and the final one, (BHk, N + 1, tiles, 64, V + 1) in float64."""
    c = run.case
    k, v = (x.double().permute(0, 2, 1, 3).flatten(0, 1) for x in (run.k, run.v))
    g = run.log_G.double().permute(0, 2, 1).flatten(0, 1)
    u = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state = torch.zeros(*run.boundary_shape[:3], c.head_dim + 1, dtype=torch.float64, device=DEVICE)
    if run.initial is not None:
        state = run.initial.double()[..., : c.head_dim + 1]
    states = [state]
    for begin in range(0, c.tokens, c.chunk):
        end = min(begin + c.chunk, c.tokens)
        local = g[:, begin:end].cumsum(-1)
        decay, across = (local[:, -1:] - local).exp(), local[:, -1].exp()
        last = max([s for s in c.documents if begin <= s < end and s > 0], default=None)
        if last is not None:
            decay[:, : last - begin] = 0
            across = across * 0
        state = state * across[:, None, None, None] + torch.einsum(
            "htgr,htc->hgrc", phi(k[:, begin:end]), u[:, begin:end] * decay[..., None]
        )
        states.append(state)
    return torch.stack(states[:-1], 1), states[-1]


def check(library: ctypes.CDLL, case: Case, arch: int, stages: int) -> dict:
    run = Run(library, case, arch)
    reference, final = exact_states(run)
    forward = (
        run.forward()
        if stages > 1
        else {
            "states": run.new(*run.state_shape, dtype=case.dtype),
            "final": run.new(*run.boundary_shape, dtype=torch.float32),
        }
    )
    if stages == 1:
        run.chunk_state(False, forward["states"], forward["final"])
    synchronize()
    got = unpack_states(forward["states"], case.head_dim) / run.problem.state_scale
    eps = 2.0 ** (-9 if case.dtype == torch.bfloat16 else -12)  # half the spacing at 1
    rows = {
        "states": (error(got, reference), 2 * eps),
        "final": (error(forward["final"][..., : case.head_dim + 1], final), 2 * eps),
    }
    if stages > 1:
        exact, plain = quadratic(run, True), quadratic(run, False)
        terms = cancelling_terms(run) if stages > 3 else {}
        out = dict(forward)
        if stages > 2:
            out |= run.backward(forward, stages > 3)
            again = run.backward(run.forward(), stages > 3)
            synchronize()
            if any(not torch.equal(out[name].view(torch.uint8), again[name].view(torch.uint8)) for name in again):
                rows["deterministic"] = (math.nan, 0.0)
        synchronize()
        if "key_dots" in out:
            out["query_dots"] = out["query_dots"][..., : case.tokens]
            out["key_dots"] = out["key_dots"][0, ..., : case.tokens]
            # The queries' sums vanish exactly: their error is measured against the size of the keys'.
            size = exact["key_dots"].norm() / exact["key_dots"].numel() ** 0.5
            for group in (exact, plain, out):
                group["query_dots"] = group["query_dots"] + size
        if "dinitial" in out:
            out["dinitial"] = out["dinitial"][..., : case.head_dim + 1]
        for name in exact:
            if name in terms and exact[name].norm() < 1e-9 * terms[name]:  # T = 1: zero, the sum of terms that cancel
                wrong = float((out[name].double() - exact[name]).norm()) / terms[name]
                rows[name] = (wrong, eps)
            elif name in out:
                rows[name] = (error(out[name], exact[name]), error(plain[name], exact[name]))
        # The normaliser is not rounded to 16 bits at the end, the operands of its sum are.
        rows["normalizer"] = (rows["normalizer"][0], max(rows["normalizer"][1], eps / 2))
    return {name: {"error": e, "plain": p, "ok": e <= 2 * p} for name, (e, p) in rows.items()}


def median_ms(call, repeats: int = 10) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        call()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times)


def time_stages(library: ctypes.CDLL, case: Case, arch: int, stages: int) -> dict[str, float]:
    run = Run(library, case, arch)
    forward = run.forward() if stages > 1 else {"states": run.new(*run.state_shape, dtype=case.dtype)}
    out = {"chunk_state": median_ms(lambda: run.chunk_state(False, forward["states"], None))}
    if stages > 1:
        out["chunk_scan y"] = median_ms(
            lambda: run.chunk_scan(False, forward["states"], forward["y"], forward["normalizer"])
        )
    if stages > 2:
        back = run.backward(forward, stages > 3)
        out["chunk_state reverse"] = median_ms(lambda: run.chunk_state(True, back["dstates"], None))
        out["chunk_scan dv"] = median_ms(lambda: run.chunk_scan(True, back["dstates"], back["dv"], None))
        if stages > 3:
            out["chunk_scan_grad dq"] = median_ms(
                lambda: run.chunk_scan_grad(False, forward["states"], back["dq"], back["query_dots"])
            )
            out["chunk_scan_grad dk"] = median_ms(
                lambda: run.chunk_scan_grad(True, back["dstates"], back["dk"], back["key_dots"])
            )
    return out


def cases(head_dim: int, dtype: torch.dtype) -> dict[str, Case]:
    base = {"head_dim": head_dim, "dtype": dtype}
    return {
        "two chunks": Case(**base),
        "no gate": Case(gate=0.0, **base),
        "tail": Case(batch=2, tokens=1000, chunk=192, **base),
        "T=1": Case(tokens=1, chunk=64, **base),
        "chunk beyond T": Case(tokens=300, chunk=1024, **base),
        "grouped heads": Case(query_heads=6, key_heads=2, tokens=700, chunk=128, **base),
        "documents": Case(tokens=1024, chunk=256, documents=(1, 65, 128, 300, 512, 777), gate=0.01, **base),
        "boundary": Case(tokens=600, chunk=256, boundary=True, query_heads=4, key_heads=2, **base),
        "strong gate": Case(tokens=512, chunk=512, gate=20.0, **base),
        "segments": Case(tokens=1000, chunk=64, query_heads=1, key_heads=1, gate=0.001, boundary=True, **base),
        "segments and documents": Case(tokens=1000, chunk=64, query_heads=2, key_heads=1, documents=(500,), **base),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--arch", type=int, default=0, choices=(0, 80, 90))
    parser.add_argument(
        "--stages",
        type=int,
        default=4,
        help="1 chunk_state, 2 and chunk_scan, 3 and their reverse, 4 and chunk_scan_grad",
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--cases", nargs="+", help="only these")
    parser.add_argument("--time", action="store_true", help="time the headline problem")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024])
    parser.add_argument("--output", help="write everything as JSON")
    args = parser.parse_args()
    library = ctypes.CDLL(args.library)
    library.pt_last_error.restype = ctypes.c_char_p
    record: dict = {
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU emulation",
        "torch": torch.__version__,
        "kernels": [],
        "checks": [],
        "times_ms": [],
    }
    count = I32()
    library.pt_kernel_count(ctypes.byref(count))
    for index in range(count.value):
        info = KernelInfo()
        if library.pt_kernel_info(index, ctypes.byref(info)):
            raise RuntimeError(library.pt_last_error().decode())
        record["kernels"].append(
            {name: getattr(info, name) for name, _ in KernelInfo._fields_} | {"name": info.name.decode()}
        )
    good = True
    for head_dim in args.head_dims:
        for dtype in args.dtypes:
            for name, case in cases(head_dim, getattr(torch, dtype)).items():
                if args.cases and name not in args.cases:
                    continue
                rows = check(library, case, args.arch, args.stages)
                record["checks"].append({"head_dim": head_dim, "dtype": dtype, "case": name, "rows": rows})
                good &= all(row["ok"] for row in rows.values())
                text = "  ".join(
                    f"{n} {r['error']:.1e}/{r['plain']:.1e}{'' if r['ok'] else ' <--'}" for n, r in rows.items()
                )
                print(f"K={head_dim} {dtype} {name}: {text}", flush=True)
    if args.time:
        for head_dim in args.head_dims:
            for dtype in args.dtypes:
                for chunk in args.chunks:
                    case = Case(
                        tokens=65536,
                        query_heads=8,
                        key_heads=8,
                        head_dim=head_dim,
                        chunk=chunk,
                        gate=0.01,
                        dtype=getattr(torch, dtype),
                    )
                    times = time_stages(library, case, args.arch, args.stages)
                    record["times_ms"].append({"head_dim": head_dim, "dtype": dtype, "chunk": chunk, "stages": times})
                    text = "  ".join(f"{n} {ms:.3f}" for n, ms in times.items())
                    print(f"K={head_dim} {dtype} chunk={chunk} ms: {text}  total {sum(times.values()):.3f}", flush=True)
    if args.output:
        with open(args.output, "w") as file:
            json.dump(record, file, indent=1)
    print("all within twice the plain evaluation" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
