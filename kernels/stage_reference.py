"""What the stages compute, from the quadratic formula: in float64, or as a plain evaluation in the 16-bit type would have it."""

import torch
from stage_calls import DEVICE, Run, phi, tile_pairs
from torch import Tensor


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
    # What crosses the ends of chunks, without a state from outside.
    ends = [min(end, c.tokens) for end in range(c.chunk, c.tokens + c.chunk, c.chunk)]
    crossing = torch.stack([(W * dW)[..., end:, :end].sum((-1, -2)) for end in ends], -1)

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
    out["flow"] = by_key_head(crossing)
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
