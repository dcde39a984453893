"""Tensors of several processes in safetensors files, one a process, and back into tensors that are cut differently.

A tensor may be divided over processes (DTensor) or be the same on all of them. Each file holds pieces: boxes of tensors
with their offsets in the whole. Reading copies from the pieces whatever part of them a process needs now, so that the
number of processes and the way of sharding may differ. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

_BLOCK = 1 << 22
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message is one sentence for the user."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that this process holds."""

    name: str
    local: Tensor  # the box, on its device
    offsets: tuple[int, ...]  # of its first element in the whole tensor
    shape: tuple[int, ...]  # of the whole tensor


def local_piece(name: str, tensor: Tensor) -> Piece:
    """Return what this process holds of `tensor`: its shard, or all of it."""
    if not isinstance(tensor, DTensor):
        return Piece(name, tensor, (0,) * tensor.ndim, tuple(tensor.shape))
    local, offsets, sizes = tensor.to_local(), [0] * tensor.ndim, list(tensor.shape)
    for mesh_dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            # As torch.chunk divides: equal parts rounded up, the last ones smaller or empty.
            dim, count = placement.dim, tensor.device_mesh.size(mesh_dim)
            part = -(-sizes[dim] // count)
            start = min(part * tensor.device_mesh.get_local_rank(mesh_dim), sizes[dim])
            offsets[dim] += start
            sizes[dim] = min(part, sizes[dim] - start)
        else:
            assert isinstance(placement, Replicate), f"{name} has a partial placement"
    assert list(local.shape) == sizes, f"{name} is sharded in an order of its own"
    return Piece(name, local, tuple(offsets), tuple(tensor.shape))


def pieces_to_write(tensors: Mapping[str, Tensor], rank: int, size: int) -> list[Piece]:
    """Return the pieces that process `rank` of `size` writes: together all write each element once.

    A tensor that all have is written by one of them, so that all write about as many bytes.
    """
    loads = [(0, r) for r in range(size)]
    pieces = []
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if isinstance(tensor, DTensor):
            coordinates = tensor.device_mesh.get_coordinate()
            assert coordinates is not None
            first = all(c == 0 for c, p in zip(coordinates, tensor.placements, strict=True) if isinstance(p, Replicate))
            piece = local_piece(name, tensor)
            if first and piece.local.numel():
                pieces.append(piece)
            continue
        load, owner = heapq.heappop(loads)
        heapq.heappush(loads, (load + tensor.nbytes, owner))
        if owner == rank:
            pieces.append(local_piece(name, tensor))
    return pieces


class HostCopies:
    """Copies pieces to memory of the host, which is allocated once and page-locked where they come from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Return the pieces with their values of now; valid until the next call."""
        copies, cuda = [], False
        for piece in pieces:
            local = piece.local.detach()
            buffer = self._buffers.get(piece.name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[piece.name] = buffer
            buffer.copy_(local, non_blocking=True)
            cuda |= local.is_cuda
            copies.append(Piece(piece.name, buffer, piece.offsets, piece.shape))
        if cuda:
            torch.cuda.synchronize()
        return copies


def _bytes(tensor: Tensor) -> memoryview:
    values: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(values)


def write_pieces(path: Path, pieces: list[Piece], metadata: dict[str, str]) -> dict[str, Any]:
    """Write host pieces as a safetensors file and flush it to the disk; the digest is made on the way.

    The format is written here because safetensors' own writer gathers the whole file in memory first.

    Returns:
        Plain values: `bytes`, `sha256` of the file, and its `pieces` as `[name, offsets]`.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for piece in pieces:
        end = position + piece.local.nbytes
        header[piece.name] = {
            "dtype": _DTYPES[piece.local.dtype],
            "shape": list(piece.local.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, count = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        views = [memoryview(struct.pack("<Q", len(text)) + text), *(_bytes(piece.local) for piece in pieces)]
        for view in views:
            for start in range(0, len(view), _BLOCK):
                block = view[start : start + _BLOCK]
                digest.update(block)
                count += len(block)
                while block:
                    block = block[file.write(block) :]
        os.fsync(file.fileno())
    return {
        "bytes": count,
        "sha256": digest.hexdigest(),
        "pieces": [[piece.name, list(piece.offsets)] for piece in pieces],
    }


def _overlap(
    start: tuple[int, ...], size: tuple[int, ...], other: tuple[int, ...], other_size: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Return the part that two boxes of one tensor share, as slices of the first and of the second, or None."""
    mine, theirs = [], []
    for a, n, b, m in zip(start, size, other, other_size, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        mine.append(slice(low - a, high - a))
        theirs.append(slice(low - b, high - b))
    return tuple(mine), tuple(theirs)


class PieceReader:
    """Reads pieces of the files of one directory into tensors.

    Args:
        files: name of a file -> its pieces as `write_pieces` returned them.
    """

    def __init__(self, directory: Path, files: Mapping[str, list[list[Any]]]) -> None:
        self.directory = directory
        self._where: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for file, pieces in files.items():
            for name, offsets in pieces:
                self._where.setdefault(name, []).append((file, tuple(offsets)))

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` (or this process's shards of them) in place with what the files hold under their names.

        Errors:
            CheckpointError: a file cannot be read, or its pieces do not cover a tensor.
        """
        by_file: dict[str, list[tuple[Piece, tuple[int, ...]]]] = {}
        missing: dict[str, int] = {}
        for name, tensor in tensors.items():
            target = local_piece(name, tensor)
            missing[name] = target.local.numel()
            for file, offsets in self._where.get(name, ()):
                by_file.setdefault(file, []).append((target, offsets))
        for file, wanted in by_file.items():
            try:
                with safe_open(str(self.directory / file), framework="pt") as source:
                    for target, offsets in wanted:
                        missing[target.name] -= self._copy(source, target, offsets)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.directory / file} cannot be read: {error}") from error
        short = [name for name, count in missing.items() if count]
        if short:
            raise CheckpointError(f"{self.directory} does not hold all of {', '.join(short[:3])}")

    @staticmethod
    def _copy(source: Any, target: Piece, offsets: tuple[int, ...]) -> int:
        """Copy what the piece of that name in an open file shares with `target`; return its number of elements."""
        values = source.get_slice(target.name)
        found = _overlap(target.offsets, tuple(target.local.shape), offsets, tuple(values.get_shape()))
        if found is None:
            return 0
        mine, theirs = found
        part = values[theirs] if theirs else source.get_tensor(target.name)
        with torch.no_grad():
            place = target.local[mine] if mine else target.local
            place.copy_(part)
        return place.numel()


def metadata_of(path: Path) -> dict[str, str]:
    """Return the texts that `write_pieces` put into the header of a file."""
    try:
        with safe_open(str(path), framework="pt") as source:
            return source.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
