"""Generation: prefill the prompt once, then one token at a time from the cache."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from powertrain.config import read_config
from powertrain.data.tokenizers import Tokenizer, load_tokenizer
from powertrain.inference.cache import DecodeCache
from powertrain.models.gpt import GPT
from powertrain.training.checkpoint import Checkpoint, CheckpointError, read_weights


def generate_tokens(
    model: GPT,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield the next token of each row of `prompt`, (B,) int64 on the model's device, `max_new_tokens` times.

    prompt (B, T) int64 with T >= 1. temperature 0 takes the likeliest token; top_k keeps the k likeliest, top_p the
    fewest likeliest tokens whose probabilities reach p (Holtzman et al. 2020, arXiv:1904.09751); both apply after
    the temperature. seed is at least -2^63 and below 2^64.
    Equal arguments give equal tokens on one device. The cost per token does not depend on the context for power,
    linear and window layers. Errors: ValueError for an empty prompt, an argument out of range, or
    logits that are not finite.
    """
    _check(prompt, max_new_tokens, temperature, top_k, top_p, seed)
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    cache = DecodeCache(model.config)
    tokens = prompt.to(device)
    for _ in range(max_new_tokens):
        # Entered for each token: a generator must not leave inference mode switched on in its caller.
        with torch.inference_mode():
            logits = model(tokens, cache=cache, logits_to_keep=1).logits
            next_token = sample(logits[:, -1].float(), temperature, top_k, top_p, generator)
        yield next_token
        tokens = next_token[:, None]


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """One token (B,) int64 from logits (B, vocab), fp32; see `generate_tokens` for the arguments."""
    best = logits.amax(dim=-1, keepdim=True)
    if not best.isfinite().all():
        raise ValueError("the model's logits are not finite, so there is nothing to draw from: it has diverged")
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    # The likeliest token stays 0 whatever the temperature; of a subnormal number, the reciprocal is infinite.
    logits = (logits - best) / max(temperature, torch.finfo(torch.float32).tiny)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # A token stays while the likelier ones before it have not reached p: at least one always does.
        surplus = ordered.cumsum(dim=-1) - ordered >= top_p
        logits = logits.masked_fill(surplus.scatter(-1, order, surplus), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, until it ends its document or has `max_new_tokens` tokens.

    An empty prompt starts a new document. A piece may be several tokens, because it never ends within a character.
    """
    # Documents are stored with this token before their first, see powertrain.data.shards.
    ids = [tokenizer.eod_id, *tokenizer.encode(prompt).tolist()]
    decode = tokenizer.decode_stream()
    for token in generate_tokens(
        model,
        torch.tensor([ids]),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    ):
        if token.item() == tokenizer.eod_id:
            return
        piece = decode(int(token.item()))
        if piece is not None:
            yield piece


def run_directory(path: str | Path) -> Path:
    """The run directory that `path` is, or that the checkpoint or the exported file `path` lies in."""
    path = Path(path)
    if path.parent.name == "checkpoints":
        return path.parent.parent
    return path.parent if path.is_file() else path


def load_run(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer]:
    """The model, in evaluation mode on `device`, and the tokenizer of a run.

    path: a run directory, whose best checkpoint is taken (the last where none was validated), or a checkpoint or a file
    of `powertrain export` in one.
    A checkpoint's files are verified against the sizes and SHA-256 that it states; an exported file states none.
    Errors: ValueError where there is no run, no checkpoint, or one that is damaged or of another model.
    """
    model, tokenizer, _ = load_run_and_checkpoint(Path(path), device)
    return model, tokenizer


def load_run_and_checkpoint(path: Path, device: str | torch.device) -> tuple[GPT, Tokenizer, Checkpoint | None]:
    """What `load_run` returns, and the checkpoint that the weights are of; None for an exported file."""
    run = run_directory(path)
    config_file = run / "config.yaml"
    if not path.exists() or not config_file.is_file():
        raise ValueError(f"{path} is neither a run directory nor a checkpoint in one: there is no {config_file}")
    tokenizer = load_tokenizer(run / "tokenizer")
    config = read_config(config_file).model
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    source = _best_checkpoint(run) if path == run else path
    try:
        checkpoint = None if source.is_file() else Checkpoint(source)
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    try:
        if checkpoint is None:
            model.load_state_dict(load_file(source))
        else:
            read_weights(checkpoint, model)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{source} does not hold the weights of the model in {config_file}: {error}") from error
    return model.to(device).eval(), tokenizer, checkpoint


def _best_checkpoint(run: Path) -> Path:
    for name in ("best", "last"):
        checkpoint = run / "checkpoints" / name
        if checkpoint.exists():
            return checkpoint
    raise ValueError(f"{run} has no checkpoint yet: there is neither checkpoints/best nor checkpoints/last in it")


def _check(
    prompt: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> None:
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt of shape {tuple(prompt.shape)}: must be (B, T) with T of at least 1")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be at least 0 and finite; 0 takes the likeliest token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1, or None for all tokens")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1, or None for all tokens")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed}: must be at least -2^63 and below 2^64")
