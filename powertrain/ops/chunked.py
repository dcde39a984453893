"""The chunked implementation: power retention in time and memory linear in T, as explicit forward and backward in
PyTorch, on any device.

It works on bilinear causal attention without a division, o[t] = sum_{s <= t} (q[t] . k[s])^deg * decay(s -> t) * u[s],
where u = [v, 1] has a column of ones whose result is the normaliser; `normalized.py` divides. One chunk that spans the
sequence is the quadratic form.

Between chunks, content travels in a state. Three functions serve both directions, with the roles of q and k exchanged
(names as in Mamba-2, arXiv:2405.21060):

    chunk_state(x, y)         sum over a chunk of phi(x)^T y                   forward (k, u), backward (q, grad_o)
    chunk_scan(x, S)          phi(x) S                                         forward (q, S), backward (k, dS)
    chunk_scan_grad(x, S, y)  gradient of x through phi(x) S for y, its own    backward (q, S, grad_o) and (k, dS, u)

Internally a state multiplies *monomials*, and carries the whole multinomial weight: S = weight^2 * sum monomial(k) u^T,
so that phi is formed without weights on either side. The public state has the weight once.

Shape legend: N sequences (one key head of one row each), R query heads per key head, T tokens, G chunks in a segment, C
chunk, F dim phi, K key dim, W = V + 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from powertrain.ops.decay import Decay, scan_documents_from_end
from powertrain.ops.intra_chunk import intra_chunk_bwd, intra_chunk_fwd
from powertrain.ops.plan import Plan, Segment
from powertrain.ops.sympow import monomials, monomials_backward, phi_dimension, phi_weights


def chunk_state(x: Tensor, y: Tensor, *, deg: int, plan: Plan) -> Tensor:
    """Return weight^2 * sum over rows of monomials(x)^T y, `(M, F, W)`, for x `(M, L, K)` and y `(M, L, W)`."""
    M, _, K = x.shape
    state = y.new_zeros(M, phi_dimension(K, deg), y.shape[-1])
    for rows in _row_blocks(x, plan):
        state.baddbmm_(monomials(x[:, rows].mT.contiguous(), deg), y[:, rows])
    return state.mul_(phi_weights(K, deg, x)[:, None] ** 2)


def chunk_scan(x: Tensor, state: Tensor, *, deg: int, plan: Plan) -> Tensor:
    """Return monomials(x) state, `(M, L, W)`, for x `(M, L, K)` and state `(M, F, W)`."""
    out = x.new_empty(*x.shape[:2], state.shape[-1])
    for rows in _row_blocks(x, plan):
        out[:, rows] = torch.bmm(monomials(x[:, rows].mT.contiguous(), deg).mT, state)
    return out


def chunk_scan_grad(x: Tensor, state: Tensor, y: Tensor, *, deg: int, plan: Plan) -> Tensor:
    """Return the gradient of x through `chunk_scan(x, state)` for the gradient y `(M, L, W)` of its result."""
    grad = torch.empty_like(x)
    for rows in _row_blocks(x, plan):
        grad_monomials = torch.bmm(state, y[:, rows].mT)
        grad[:, rows] = monomials_backward(x[:, rows].mT.contiguous(), grad_monomials, deg).mT
    return grad


def _row_blocks(x: Tensor, plan: Plan) -> Iterator[slice]:
    size = max(1, plan.phi_columns // x.shape[0])
    for start in range(0, x.shape[1], size):
        yield slice(start, min(start + size, x.shape[1]))


@dataclass(frozen=True)
class _SegmentInputs:
    """The inputs of one segment of one group of sequences, cut into chunks; `*_before` and `*_after` are decay factors
    to the chunk's ends.
    """

    q: Tensor  # (N, G, R, C, K)
    k: Tensor  # (N, G, C, K)
    u: Tensor  # (N, G, C, W)
    tokens: Decay  # (N*G, C)
    from_start: Tensor | None  # (N, G, 1, C, 1)
    to_end: Tensor | None  # (N, G, C, 1)
    across: Tensor | None  # (N, G, 1, 1)
    first_read: int  # the first chunk before which there is any state
    end_written: int  # one past the last chunk whose content is needed in a state

    @classmethod
    def cut(
        cls, q: Tensor, k: Tensor, u: Tensor, decay: Decay, segment: Segment, *, reads: bool, writes: bool
    ) -> "_SegmentInputs":
        span, shape = slice(segment.start, segment.stop), (segment.chunks, segment.chunk_size)
        decays = decay.chunks(segment.start, *shape)
        from_start, to_end, across = decays.from_start(q.dtype), decays.to_end(q.dtype), decays.across(q.dtype)
        return cls(
            q=_chunk_rows(q, segment),
            k=k[:, span].unflatten(1, shape),
            u=u[:, span].unflatten(1, shape),
            tokens=decays.tokens.flatten_chunks(),
            from_start=None if from_start is None else from_start[:, :, None, :, None],
            to_end=None if to_end is None else to_end[..., None],
            across=None if across is None else across[..., None, None],
            first_read=0 if reads else 1,
            end_written=segment.chunks if writes else segment.chunks - 1,
        )

    def states(self, state: Tensor | None, *, deg: int, plan: Plan) -> list[Tensor]:
        """Return the internal states `(N, F, W)` before each chunk from `first_read` on, and after the last chunk where
        it is written.
        """
        states = [] if state is None else [state]
        if self.end_written > 0:
            u = self.u[:, : self.end_written]
            if self.to_end is not None:
                u = u * self.to_end[:, : self.end_written]
            updates = chunk_state(self.k[:, : self.end_written].flatten(0, 1), u.flatten(0, 1), deg=deg, plan=plan)
            for chunk, update in enumerate(updates.unflatten(0, (-1, self.end_written)).unbind(1)):
                states.append(_decayed_sum(update, states[-1] if states else None, self.across, chunk))
        return states

    def read_rows(self, rows: Tensor) -> Tensor:
        """Return `rows (N, G, R, C, D)` of the chunks that read a state as one batch `(N * chunks, R * C, D)`."""
        return rows[:, self.first_read :].flatten(2, 3).flatten(0, 1)


def _decayed_sum(update: Tensor, carried: Tensor | None, across: Tensor | None, chunk: int) -> Tensor:
    if carried is None:
        return update
    return update + (carried if across is None else carried * across[:, chunk])


def _chunk_rows(x: Tensor, segment: Segment) -> Tensor:
    """`(N, R, T, D)` to `(N, G, R, C, D)` for the segment's tokens."""
    return x[:, :, segment.start : segment.stop].unflatten(2, (segment.chunks, segment.chunk_size)).transpose(1, 2)


def _unchunk_rows(x: Tensor) -> Tensor:
    """`(N, G, R, C, D)` to `(N, R, G*C, D)`."""
    return x.transpose(1, 2).flatten(2, 3)


@dataclass(frozen=True)
class ChunkedForward:
    out: Tensor  # (N, R, T, W)
    final_state: Tensor | None  # (N, F, W) with public weights
    saved_states: Tensor  # (N, segments - 1, F, W) with internal weights: the states before each segment but the first


def chunked_fwd(
    q: Tensor, k: Tensor, u: Tensor, decay: Decay, state: Tensor | None, *, deg: int, plan: Plan, final_state: bool
) -> ChunkedForward:
    """Return o, and where asked the state after the last token, for q `(N, R, T, K)`, k `(N, T, K)`, u `(N, T, W)`,
    state `(N, F, W)` or None.
    """
    N, R, _, K = q.shape
    F, W = phi_dimension(K, deg), u.shape[-1]
    segments = plan.segments()
    weight = phi_weights(K, deg, q)[:, None]
    out = u.new_empty(N, R, plan.tokens, W)
    saved = u.new_empty(N, len(segments) - 1, F, W)
    final = u.new_empty(N, F, W) if final_state else None
    for group in plan.groups():
        carried = None if state is None else state[group] * weight
        for index, segment in enumerate(segments):
            if index > 0:
                assert carried is not None
                saved[group, index - 1] = carried
            inputs = _SegmentInputs.cut(
                q[group], k[group], u[group], decay[group], segment,
                reads=carried is not None, writes=final_state or segment is not segments[-1],
            )  # fmt: skip
            out_chunks = intra_chunk_fwd(
                inputs.q.flatten(0, 1),
                inputs.k.flatten(0, 1),
                inputs.u.flatten(0, 1),
                inputs.tokens,
                deg=deg,
                plan=plan,
            ).unflatten(0, inputs.q.shape[:2])
            states = inputs.states(carried, deg=deg, plan=plan)
            reading = segment.chunks - inputs.first_read
            if reading > 0:
                before = torch.stack(states[:reading], dim=1).flatten(0, 1)
                read = chunk_scan(inputs.read_rows(inputs.q), before, deg=deg, plan=plan).view(
                    -1, reading, R, segment.chunk_size, W
                )
                if inputs.from_start is not None:
                    read.mul_(inputs.from_start[:, inputs.first_read :])
                out_chunks[:, inputs.first_read :] += read
            out[group, :, segment.start : segment.stop] = _unchunk_rows(out_chunks)
            carried = states[-1] if states else None
        if final is not None:
            assert carried is not None
            final[group] = carried / weight
    return ChunkedForward(out, final, saved)


@dataclass(frozen=True)
class ChunkedBackward:
    q: Tensor
    k: Tensor
    u: Tensor
    log_g: Tensor | None  # (N, T) fp64
    state: Tensor | None


def chunked_bwd(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    decay: Decay,
    state: Tensor | None,
    saved_states: Tensor,
    grad_out: Tensor,
    grad_out_dot_out: Tensor,
    grad_final_state: Tensor | None,
    *,
    deg: int,
    plan: Plan,
) -> ChunkedBackward:
    """Return the gradients of `chunked_fwd` for `grad_out (N, R, T, W)` and `grad_final_state (N, F, W)`.

    `grad_out_dot_out (N, T)` is the sum of grad_out * out over columns and query heads: all that the gates need of the
    output.
    """
    K = q.shape[-1]
    segments = plan.segments()
    weight = phi_weights(K, deg, q)[:, None]
    grad_q, grad_k, grad_u = torch.empty_like(q), torch.empty_like(k), torch.empty_like(u)
    grad_log_g = None if decay.G is None else q.new_empty(q.shape[0], plan.tokens, dtype=torch.float64)
    grad_state = None if state is None else torch.empty_like(state)
    for group in plan.groups():
        # Like a state, its gradient is kept with the whole multinomial weight: d(internal state) * weight^2.
        carried_grad = None if grad_final_state is None else grad_final_state[group] * weight
        for index in reversed(range(len(segments))):
            segment = segments[index]
            G, C = segment.chunks, segment.chunk_size
            if index > 0:
                carried: Tensor | None = saved_states[group, index - 1]
            else:
                carried = None if state is None else state[group] * weight
            inputs = _SegmentInputs.cut(
                q[group],
                k[group],
                u[group],
                decay[group],
                segment,
                reads=carried is not None,
                writes=carried_grad is not None,
            )
            first, end = inputs.first_read, inputs.end_written
            grad_chunks = _chunk_rows(grad_out[group], segment)
            dq, dk, du = intra_chunk_bwd(
                inputs.q.flatten(0, 1), inputs.k.flatten(0, 1), inputs.u.flatten(0, 1), inputs.tokens,
                grad_chunks.flatten(0, 1), deg=deg, plan=plan,
            )  # fmt: skip
            dq, dk, du = dq.unflatten(0, (-1, G)), dk.unflatten(0, (-1, G)), du.unflatten(0, (-1, G))

            states = inputs.states(carried, deg=deg, plan=plan)
            # state_grads[c]: the gradient of the state after chunk c, for c from first - 1 (the state before the first
            # reader) to end - 1.
            state_grads: dict[int, Tensor] = {} if carried_grad is None else {G - 1: carried_grad}
            if first < G:
                y = grad_chunks[:, first:]
                if inputs.from_start is not None:
                    y = y * inputs.from_start[:, first:]
                x_rows, y_rows = inputs.read_rows(inputs.q), y.flatten(2, 3).flatten(0, 1)
                before = torch.stack(states[: G - first], dim=1).flatten(0, 1)
                dq[:, first:] += chunk_scan_grad(x_rows, before, y_rows, deg=deg, plan=plan).view_as(dq[:, first:])
                updates = chunk_state(x_rows, y_rows, deg=deg, plan=plan).unflatten(0, (-1, G - first))
                for c in reversed(range(first, G)):
                    state_grads[c - 1] = _decayed_sum(updates[:, c - first], state_grads.get(c), inputs.across, c)
            boundary = None
            if end > 0:
                after = torch.stack([state_grads[c] for c in range(end)], dim=1).flatten(0, 1)
                k_rows, u_rows = inputs.k[:, :end], inputs.u[:, :end]
                into_u = chunk_scan(k_rows.flatten(0, 1), after, deg=deg, plan=plan).unflatten(0, (-1, end))
                if inputs.to_end is not None:
                    into_u.mul_(inputs.to_end[:, :end])
                    u_rows = u_rows * inputs.to_end[:, :end]
                du[:, :end] += into_u
                dk[:, :end] += chunk_scan_grad(
                    k_rows.flatten(0, 1), after, u_rows.flatten(0, 1), deg=deg, plan=plan
                ).unflatten(0, (-1, end))  # fmt: skip
                if grad_log_g is not None:
                    written = torch.stack(states[len(states) - end :], dim=1).flatten(0, 1)
                    boundary = (after * written / weight**2).sum((-2, -1), dtype=torch.float64).view(-1, end)
            span = slice(segment.start, segment.stop)
            grad_q[group, :, span], grad_k[group, span], grad_u[group, span] = (
                _unchunk_rows(dq),
                dk.flatten(1, 2),
                du.flatten(1, 2),
            )
            if grad_log_g is not None:
                of_G = grad_out_dot_out[group, span].double() - (du * inputs.u).sum(-1, dtype=torch.float64).flatten(
                    1, 2
                )
                grad_log_g[group, span] = _grad_log_gates(of_G.view(-1, G, C), boundary, inputs.tokens)
            carried_grad = state_grads.get(-1)
        if grad_state is not None:
            grad_state[group] = 0.0 if carried_grad is None else carried_grad / weight
    return ChunkedBackward(grad_q, grad_k, grad_u, grad_log_g, grad_state)


def _grad_log_gates(grad_G: Tensor, boundary: Tensor | None, tokens: Decay) -> Tensor:
    """Return the gradient of log_G, `(N, G*C)`, from that of its cumulative sum `(N, G, C)` and the product of state
    and state gradient at chunk ends.

    The sum over later tokens restarts at each chunk, where it equals that product: rounding does not pile up over the
    sequence.
    """
    N, G, C = grad_G.shape
    document = None if tokens.document is None else tokens.document.view(N, G, C)
    grad = scan_documents_from_end(grad_G, document)
    if boundary is not None:
        ends = boundary.shape[1]
        later = boundary[..., None]
        if document is not None:
            later = later * (document[:, :ends] == document[:, :ends, -1:])
        grad[:, :ends] += later
    return grad.flatten(1, 2)
