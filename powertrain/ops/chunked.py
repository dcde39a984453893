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

Tokens lie along the last axis of every tensor: monomials are formed by long vector operations, and matrix products have
the tokens where a BLAS is fast.

Shape legend: N sequences of a group (one key head of one row each), R query heads per key head, T tokens, G chunks in a
segment, C chunk, M chunks in a batch, L tokens of all query heads in a chunk, F dim phi, K key dim, W = V + 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from powertrain.ops.carry import carried_sums
from powertrain.ops.decay import Decay, kept, scan_documents_from_end
from powertrain.ops.intra_chunk import intra_chunk_bwd, intra_chunk_fwd
from powertrain.ops.layout import cut, join
from powertrain.ops.monomials import Monomials, internal_state, multinomials, public_state
from powertrain.ops.plan import Plan, Segment
from powertrain.ops.sympow import phi_dimension


def chunk_state(x: Tensor, y: Tensor, *, deg: int, plan: Plan) -> Tensor:
    """Return weight^2 * sum over tokens of y monomials(x)^T, `(M, W, F)`, for x `(M, K, L)` and y `(M, W, L)`."""
    M, K, _ = x.shape
    state = y.new_zeros(M, y.shape[1], phi_dimension(K, deg))
    for tokens in _token_blocks(x, plan):
        for rows, tile in Monomials.of(x[..., tokens], deg, plan.phi_elements).tiles():
            state[..., rows].baddbmm_(y[..., tokens], tile.mT)
    return state if deg == 1 else state.mul_(multinomials(K, deg, x))


def chunk_scan(x: Tensor, state: Tensor, *, deg: int, plan: Plan) -> Tensor:
    """Return state monomials(x), `(M, W, L)`, for x `(M, K, L)` and state `(M, W, F)`."""
    out = x.new_zeros(x.shape[0], state.shape[1], x.shape[2])
    for tokens in _token_blocks(x, plan):
        for rows, tile in Monomials.of(x[..., tokens], deg, plan.phi_elements).tiles():
            out[..., tokens].baddbmm_(state[..., rows], tile)
    return out


def chunk_scan_grad(x: Tensor, state: Tensor, y: Tensor, *, deg: int, plan: Plan) -> Tensor:
    """Return the gradient of x through `chunk_scan(x, state)` for the gradient y `(M, W, L)` of its result."""
    grad = x.new_empty(x.shape)
    for tokens in _token_blocks(x, plan):
        monomials, y_tokens = Monomials.of(x[..., tokens], deg, plan.phi_elements), y[..., tokens]

        def write_grad(rows: slice, out: Tensor, y_tokens: Tensor = y_tokens) -> None:
            torch.bmm(state[..., rows].mT, y_tokens, out=out)

        grad[..., tokens] = monomials.backward(write_grad)
    return grad


def _token_blocks(x: Tensor, plan: Plan) -> Iterator[slice]:
    size = max(1, plan.phi_columns // x.shape[0])
    for start in range(0, x.shape[-1], size):
        yield slice(start, min(start + size, x.shape[-1]))


@dataclass(frozen=True)
class _SegmentInputs:
    """The inputs of one segment of one group of sequences, cut into chunks; `from_start`, `to_end` and `across` are
    decay factors to and from the chunk's ends, `of_start` and `of_end` whether tokens are of the documents there, and
    `unbroken` whether those are one.
    """

    q: Tensor  # (N, G, K, R, C)
    k: Tensor  # (N, G, K, C)
    u: Tensor  # (N, G, W, C)
    tokens: Decay  # (N*G, C)
    from_start: Tensor | None  # (N, G, 1, 1, C)
    to_end: Tensor | None  # (N, G, 1, C)
    across: Tensor | None  # (N, G, 1, 1)
    of_start: Tensor | None  # (N, G, 1, 1, C)
    of_end: Tensor | None  # (N, G, 1, C)
    unbroken: Tensor | None  # (N, G, 1, 1)
    first_read: int  # the first chunk before which there is any state
    end_written: int  # one past the last chunk whose content is needed in a state

    @classmethod
    def cut(
        cls, q: Tensor, k: Tensor, u: Tensor, decay: Decay, segment: Segment, *, reads: bool, writes: bool
    ) -> "_SegmentInputs":
        decays = decay.chunks(segment)
        from_start, to_end, across = decays.from_start(q.dtype), decays.to_end(q.dtype), decays.across(q.dtype)
        of_start, of_end = decays.of_start(), decays.of_end()
        return cls(
            q=cut(q, segment),
            k=cut(k, segment),
            u=cut(u, segment),
            tokens=decays.tokens.flatten_chunks(),
            from_start=None if from_start is None else from_start[:, :, None, None, :],
            to_end=None if to_end is None else to_end[:, :, None, :],
            across=None if across is None else across[..., None, None],
            of_start=None if of_start is None else of_start[:, :, None, None, :],
            of_end=None if of_end is None else of_end[:, :, None, :],
            unbroken=None if of_start is None else of_start[..., -1, None, None],
            first_read=0 if reads else 1,
            end_written=segment.chunks if writes else segment.chunks - 1,
        )

    def states(self, state: Tensor | None, chunks: int, *, deg: int, plan: Plan) -> Tensor | None:
        """Return the internal states `(N, n, W, F)` before each chunk from `first_read` on that follows one of the
        first `chunks`, and before the segment where there is one: `state`. None where there is none.
        """
        if chunks == 0:
            return None if state is None else state[:, None]
        u = self.u[:, :chunks]
        if self.to_end is not None:
            u = u * self.to_end[:, :chunks]
        k = self.of_writers(self.k[:, :chunks])
        updates = chunk_state(k.flatten(0, 1), u.flatten(0, 1), deg=deg, plan=plan)
        sums = carried_sums(updates.unflatten(0, (-1, chunks)), state, *self.over(slice(chunks)))
        return sums if state is None else torch.cat([state[:, None], sums], dim=1)

    def over(self, chunks: slice) -> tuple[Tensor | None, Tensor | None]:
        """Return `across` and `unbroken` of these chunks."""
        across, unbroken = (None if x is None else x[:, chunks] for x in (self.across, self.unbroken))
        return across, unbroken

    def read_rows(self, x: Tensor) -> Tensor:
        """Return `x (N, G, D, R, C)` of the chunks that read a state as one batch `(N * chunks, D, R * C)`, 0 where no
        state is read.
        """
        return self.of_readers(x[:, self.first_read :]).flatten(3).flatten(0, 1)

    def of_readers(self, x: Tensor) -> Tensor:
        """Return `x (N, chunks, D, R, C)` of the chunks that read a state, 0 for tokens of other documents than it."""
        return kept(x, None if self.of_start is None else self.of_start[:, self.first_read :])

    def of_writers(self, x: Tensor) -> Tensor:
        """Return `x (N, chunks, D, C)` of the first chunks, 0 for tokens of other documents than the state after."""
        return kept(x, None if self.of_end is None else self.of_end[:, : x.shape[1]])


@dataclass(frozen=True)
class ChunkedForward:
    out: Tensor  # (N, W, R, T)
    final_state: Tensor | None  # (N, W, F) with public weights


def chunked_fwd(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    decay: Decay,
    state: Tensor | None,
    saved_states: Tensor,
    *,
    deg: int,
    plan: Plan,
    final_state: bool,
) -> ChunkedForward:
    """Return o, and where asked the state after the last token, for q `(N, K, R, T)`, k `(N, K, T)`, u `(N, W, T)`,
    state `(N, W, F)` or None; and write the states before each segment but the first, with internal weights, to
    `saved_states (N, segments - 1, W, F)`.
    """
    N, K, R, _ = q.shape
    W, segments = u.shape[1], plan.segments()
    out = u.new_empty(N, W, R, plan.tokens)
    carried = None if state is None else internal_state(state, K, deg)
    for index, segment in enumerate(segments):
        if index > 0:
            assert carried is not None
            saved_states[:, index - 1] = carried
        inputs = _SegmentInputs.cut(
            q, k, u, decay, segment,
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
        states = inputs.states(carried, inputs.end_written, deg=deg, plan=plan)
        reading = segment.chunks - inputs.first_read
        if reading > 0:
            assert states is not None
            before = states[:, :reading].flatten(0, 1)
            read = chunk_scan(inputs.read_rows(inputs.q), before, deg=deg, plan=plan).view(
                -1, reading, W, R, segment.chunk_size
            )
            if inputs.from_start is None:
                out_chunks[:, inputs.first_read :] += read
            else:
                out_chunks[:, inputs.first_read :].addcmul_(
                    inputs.of_readers(read), inputs.from_start[:, inputs.first_read :]
                )
        out[..., segment.start : segment.stop] = join(out_chunks)
        carried = None if states is None else states[:, -1]
    final = None
    if final_state:
        assert carried is not None
        final = public_state(carried, K, deg)
    return ChunkedForward(out, final)


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
    """Return the gradients of `chunked_fwd` for `grad_out (N, W, R, T)` and `grad_final_state (N, W, F)`.

    `grad_out_dot_out (N, T)` is the sum of grad_out * out over values and query heads: all that the gates need of the
    output.
    """
    segments = plan.segments()
    K = q.shape[1]
    weight = multinomials(K, deg, q)
    grad_q, grad_k, grad_u = torch.empty_like(q), torch.empty_like(k), torch.empty_like(u)
    grad_log_g = None if decay.G is None else q.new_empty(q.shape[0], plan.tokens, dtype=torch.float64)
    # Like a state, its gradient is kept with the whole multinomial weight: d(internal state) * weight^2.
    carried_grad = None if grad_final_state is None else internal_state(grad_final_state, K, deg)
    for index in reversed(range(len(segments))):
        segment = segments[index]
        G, C = segment.chunks, segment.chunk_size
        if index > 0:
            carried: Tensor | None = saved_states[:, index - 1]
        else:
            carried = None if state is None else internal_state(state, K, deg)
        inputs = _SegmentInputs.cut(
            q,
            k,
            u,
            decay,
            segment,
            reads=carried is not None,
            writes=carried_grad is not None,
        )
        first, end = inputs.first_read, inputs.end_written
        grad_chunks = cut(grad_out, segment)
        dq, dk, du = intra_chunk_bwd(
            inputs.q.flatten(0, 1), inputs.k.flatten(0, 1), inputs.u.flatten(0, 1), inputs.tokens,
            grad_chunks.flatten(0, 1), deg=deg, plan=plan,
        )  # fmt: skip
        dq, dk, du = dq.unflatten(0, (-1, G)), dk.unflatten(0, (-1, G)), du.unflatten(0, (-1, G))

        # The state before each chunk from `first` on.
        states = inputs.states(carried, G - 1, deg=deg, plan=plan)
        # Gradients of the states before each chunk from `first` on.
        grads_before = None
        if first < G:
            y = grad_chunks[:, first:]
            if inputs.from_start is not None:
                y = y * inputs.from_start[:, first:]
            x_rows, y_rows = inputs.read_rows(inputs.q), y.flatten(3).flatten(0, 1)
            assert states is not None
            before = states.flatten(0, 1)
            into_q = chunk_scan_grad(x_rows, before, y_rows, deg=deg, plan=plan)
            dq[:, first:] += inputs.of_readers(into_q.view_as(dq[:, first:]))
            updates = chunk_state(x_rows, y_rows, deg=deg, plan=plan).unflatten(0, (-1, G - first))
            grads_before = carried_sums(updates, carried_grad, *inputs.over(slice(first, G)), from_end=True)
        boundary = None
        if end > 0:
            # Gradients of the states after each of the first `end` chunks.
            parts = [] if grads_before is None else [grads_before[:, 1 - first :]]
            parts += [] if carried_grad is None else [carried_grad[:, None]]
            after = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            k_rows, u_rows = inputs.of_writers(inputs.k[:, :end]), inputs.u[:, :end]
            into_u = chunk_scan(k_rows.flatten(0, 1), after.flatten(0, 1), deg=deg, plan=plan)
            into_u = inputs.of_writers(into_u.unflatten(0, (-1, end)))
            if inputs.to_end is not None:
                into_u.mul_(inputs.to_end[:, :end])
                u_rows = u_rows * inputs.to_end[:, :end]
            du[:, :end] += into_u
            into_k = chunk_scan_grad(
                k_rows.flatten(0, 1), after.flatten(0, 1), u_rows.flatten(0, 1), deg=deg, plan=plan
            )
            dk[:, :end] += inputs.of_writers(into_k.unflatten(0, (-1, end)))
            if grad_log_g is not None:
                # The product of the state after a chunk and its gradient: what the chunk wrote, which equals
                # into_u . u, and what it carried over.
                boundary = (into_u * inputs.u[:, :end]).sum((-2, -1), dtype=torch.float64)
                if first < end:
                    assert states is not None
                    across, unbroken = inputs.over(slice(first, end))
                    assert across is not None
                    carried_over = kept(after[:, first:] * states[:, : end - first] / weight, unbroken)
                    boundary[:, first:] += (carried_over * across).sum((-2, -1), dtype=torch.float64)
        span = slice(segment.start, segment.stop)
        grad_q[..., span], grad_k[..., span], grad_u[..., span] = map(join, (dq, dk, du))
        if grad_log_g is not None:
            of_G = (du * inputs.u).sum(2, dtype=torch.float64)
            of_G = grad_out_dot_out[:, span].double().view(-1, G, C) - of_G
            grad_log_g[:, span] = _grad_log_gates(of_G, boundary, inputs.tokens)
        carried_grad = grads_before[:, 0] if grads_before is not None and first == 0 else None
    grad_state = None
    if state is not None:
        grad_state = torch.zeros_like(state) if carried_grad is None else public_state(carried_grad, K, deg)
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
            later = torch.where(document[:, :ends] == document[:, :ends, -1:], later, 0.0)
        grad[:, :ends] += later
    return grad.flatten(1, 2)
