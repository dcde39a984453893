"""What a model remembers between decoding steps: one cache per layer, of the kind of its mixer.

    power     the state, and the keys and values not yet folded into it: constant size, constant cost per token
    linear    the state: constant size, constant cost per token
    window    the keys and values of the last `window` tokens
    softmax   the keys and values of all tokens: grows with the context

Shapes: B batch, T new tokens, n cached tokens, Hq and Hk query and key heads, D head dim, F = dim phi.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from powertrain.models.config import MixerConfig, ModelConfig
from powertrain.models.mixers import LayerCache
from powertrain.ops import power_retention, power_retention_inference, softmax_attention, window_attention

# Keys that wait before a power layer folds them into its state, unless mixer.switch_over_seq_len says otherwise; the
# default of `power_retention_inference`.
FOLD_LENGTH = 512


class TokenBuffer:
    """Keys, values and log gates of the last tokens, in order, appended to in amortised constant time per token.

    `limit` is the number of tokens to keep; None keeps all.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._storage: list[Tensor | None] = []
        self._start = self._stop = 0

    def __len__(self) -> int:
        return self._stop - self._start

    def append(self, k: Tensor, v: Tensor, log_G: Tensor | None) -> None:
        """Add T tokens: k and v (B, T, Hk, D), log_G (B, T, Hk) or None in every call."""
        new = [k, v, log_G]
        T = k.shape[1]
        if self._limit is not None and self._limit < T:
            new = [None if x is None else x[:, -self._limit :] for x in new]
            T, self._start, self._stop = self._limit, 0, 0
        self._drop(len(self) + T)
        if not self._storage or self._stop + T > self._capacity:
            # Half as much again: moves cost constant time per token. 256: the first steps after a prefill need none.
            self._move(capacity=len(self) + T + max(len(self) // 2, 256), like=new)
        for stored, x in zip(self._storage, new, strict=True):
            if stored is not None and x is not None:
                stored[:, self._stop : self._stop + T] = x
        self._stop += T

    def tokens(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tokens kept: k and v (B, n, Hk, D), log_G (B, n, Hk) or None; views, until the next append."""
        k, v, log_G = (None if x is None else x[:, self._start : self._stop] for x in self._storage)
        assert k is not None
        assert v is not None
        return k, v, log_G

    def clear(self) -> None:
        """Forget all tokens and keep the memory."""
        self._start = self._stop = 0

    @property
    def _capacity(self) -> int:
        k = self._storage[0]
        assert k is not None
        return k.shape[1]

    def _drop(self, length: int) -> None:
        """Forget the oldest of `length` tokens beyond the limit."""
        if self._limit is not None and length > self._limit:
            self._start += length - self._limit

    def _move(self, capacity: int, like: list[Tensor | None]) -> None:
        """Move the tokens to the front of a larger buffer, or of this one where only the limit made it run full."""
        old = self._storage or [None if x is None else x[:, :0] for x in like]
        self._storage = [None if x is None else x.new_empty(x.shape[0], capacity, *x.shape[2:]) for x in old]
        for target, source in zip(self._storage, old, strict=True):
            if target is not None and source is not None:
                target[:, : len(self)] = source[:, self._start : self._stop]
        self._start, self._stop = 0, len(self)


class AttentionCache:
    """Cache of a softmax layer, or of a window layer, whose op and window it is given."""

    def __init__(self, attention: Callable[..., Tensor], window: int | None = None) -> None:
        self._attention = attention
        self._tokens = TokenBuffer(limit=window)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, log_G: Tensor | None) -> Tensor:
        """Output (B, T, Hq, D) for q (B, T, Hq, D) and its own k, v (B, T, Hk, D) and log_G (B, T, Hk)."""
        if q.shape[1] > 1:
            k, v, log_G = _prepend(self._tokens, k, v, log_G)
            out = self._attention(_align(q, k), k, v, log_G=log_G)[:, -q.shape[1] :]
            self._tokens.clear()
            self._tokens.append(k, v, log_G)
            return out
        self._tokens.append(k, v, log_G)
        k, v, log_G = self._tokens.tokens()
        bias = None
        if log_G is not None:
            # Between key j and the query, the newest token, lie the gates j+1 ... n.
            bias = (log_G.flip(1).cumsum(1).flip(1) - log_G).transpose(1, 2)[:, :, None].to(q.dtype)
        # The query heads of one key head are rows of one problem: nothing is causal about a single position.
        B, _, Hq, D = q.shape
        q = q.view(B, k.shape[2], Hq // k.shape[2], D)
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
        return out.view(B, 1, Hq, D)


class StateCache:
    """Cache of a power or linear layer: state (B, Hk, F, D), sum_of_keys (B, Hk, F), and the keys not yet in them."""

    def __init__(self, mixer: MixerConfig) -> None:
        self._chunk_size = mixer.chunk_size
        if mixer.kind == "linear":
            # Degree 1 has a state so small that reading keys instead never pays.
            self._deg, self._fold_length, self._switch_over_seq_len = 1, 1, None
        else:
            self._deg, self._fold_length = mixer.deg, mixer.switch_over_seq_len or FOLD_LENGTH
            self._switch_over_seq_len = mixer.switch_over_seq_len
        self._state: Tensor | None = None
        self._sum_of_keys: Tensor | None = None
        self._waiting = TokenBuffer()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, log_G: Tensor | None) -> Tensor:
        """Output (B, T, Hq, D) for q (B, T, Hq, D) and its own k, v (B, T, Hk, D) and log_G (B, T, Hk)."""
        if q.shape[1] > 1:
            k, v, log_G = _prepend(self._waiting, k, v, log_G)
            self._waiting.clear()
            out, self._state, self._sum_of_keys = power_retention(
                _align(q, k),
                k,
                v,
                log_G,
                initial_state=self._state,
                sum_of_keys=self._sum_of_keys,
                return_final_state=True,
                deg=self._deg,
                chunk_size=self._chunk_size,
                switch_over_seq_len=self._switch_over_seq_len,
            )
            return out[:, -q.shape[1] :]
        self._waiting.append(k, v, log_G)
        k, v, log_G = self._waiting.tokens()
        out, self._state, self._sum_of_keys = power_retention_inference(
            q,
            k,
            v,
            log_G,
            initial_state=self._state,
            sum_of_keys=self._sum_of_keys,
            deg=self._deg,
            switch_over_seq_len=self._fold_length,
        )
        if len(self._waiting) >= self._fold_length:
            self._waiting.clear()
        return out


class DecodeCache:
    """Cache of a whole model, for B sequences of equal length; pass it to `GPT.forward`, which advances it."""

    def __init__(self, config: ModelConfig) -> None:
        self.position = 0
        self.layers: list[LayerCache] = [_layer_cache(mixer) for mixer in config.layer_mixers]


def _layer_cache(mixer: MixerConfig) -> LayerCache:
    match mixer.kind:
        case "power" | "linear":
            return StateCache(mixer)
        case "softmax":
            return AttentionCache(softmax_attention)
        case "window":
            return AttentionCache(functools.partial(window_attention, window=mixer.window), window=mixer.window)
    raise AssertionError(f"MixerConfig let kind {mixer.kind!r} through")


def _prepend(cached: TokenBuffer, k: Tensor, v: Tensor, log_G: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The cached tokens followed by the new ones."""
    if len(cached) == 0:
        return k, v, log_G
    k_old, v_old, log_G_old = cached.tokens()
    assert (log_G_old is None) == (log_G is None)
    both = None if log_G_old is None or log_G is None else torch.cat([log_G_old, log_G], dim=1)
    return torch.cat([k_old, k], dim=1), torch.cat([v_old, v], dim=1), both


def _align(q: Tensor, k: Tensor) -> Tensor:
    """Zero queries before q, so that the last query meets the last key; the ops want as many queries as keys."""
    return F.pad(q, (0, 0, 0, 0, k.shape[1] - q.shape[1], 0))
