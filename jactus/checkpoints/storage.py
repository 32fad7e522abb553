"""One file, safetensors with a JSON header: written atomically, digested, and checked when read."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import torch
import xxhash
from huggingface_hub.dataclasses import type_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jactus_kernels import JactusError

from .writing import atomic

Kind = TypeVar("Kind")
FORMAT = 1
NAMED = {  # what safetensors calls the dtypes that are written
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# What reading of a file that is not what it says ends in.
WRONG = (
    SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError,
    RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class Triangle:
    """The lower triangle of S (n, n), which is packed when its turn to be written comes, and not before."""

    S: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.S.dtype

    @property
    def shape(self) -> torch.Size:
        n = self.S.shape[0]
        return torch.Size((n * (n + 1) // 2,))

    def detach(self) -> Tensor:
        return pack(self.S.detach())


def write(path: str | os.PathLike, kind: str, tensors: Mapping[str, Tensor | Triangle], meta: dict[str, Any]) -> None:
    """Write `tensors` and `meta` to `path`; on any failure a file that was there before is left whole.

    One tensor at a time is packed and brought to the CPU: sums are most of what a machine has. `save_file` wants them all.
    Raises JactusError when the disk refuses.
    """
    path = Path(path)
    own = {"kind": kind, "format": FORMAT, "digest": digest(tensors, meta), "meta": meta}
    # the widest first, so that each lies where its dtype may
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    described: dict[str, Any] = {"__metadata__": {"jactus": json.dumps(own)}}
    end = 0
    for name in order:
        t = tensors[name]
        start, end = end, end + t.shape.numel() * t.dtype.itemsize
        described[name] = {"dtype": NAMED[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    with atomic(path, 8 + len(header) + end) as partial, partial.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            file.write(_bytes(tensors[name].detach()).data)


def read(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and meta of a file that `write` made.

    Raises JactusError when it is missing, truncated, corrupted, of another kind, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise JactusError(f"{path} is not a file; a jactus {kind} file was expected")
    with parsed(path, kind):
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("jactus", "null"))
            if header is None or header["kind"] != kind:
                found = "another program's file" if header is None else f"a {header['kind']} file"
                raise JactusError(f"{path} is {found}, not a jactus {kind} file")
            if header["format"] > FORMAT:
                raise JactusError(
                    f"{path} has format {header['format']}, newer than {FORMAT}: upgrade jactus-kernels to read it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if digest(tensors, header["meta"]) != header["digest"]:
            raise JactusError(f"{path} is corrupted: its contents do not match their digest; make it again")
        if not isinstance(header["meta"], dict):
            raise TypeError("its header holds no settings")
    return tensors, header["meta"]


def mapped(path: str | os.PathLike, *names: str) -> list[Tensor]:
    """Tensors of a file that was written or read before, which come from the disk as they are used, and go when they are let go.

    Raises JactusError when they cannot be had.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(name) for name in names]
    except (SafetensorError, OSError) as e:
        raise JactusError(f"{path} was there before and cannot be read now ({e}); begin again") from e


@contextmanager
def parsed(path: str | os.PathLike, kind: str) -> Iterator[None]:
    """What is read from `path` inside the block is right, or JactusError names the file."""
    try:
        yield
    except JactusError as e:
        if str(path) in str(e):
            raise
        raise JactusError(f"{path} is a {kind} file that cannot be used: {e}") from e
    except WRONG as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise JactusError(f"{path} cannot be read: {e}") from e
        what = f"{type(e).__name__}: {e}" if isinstance(e, KeyError | RecursionError) else e
        raise JactusError(f"{path} is truncated or corrupted ({what}); make it again") from e


def made(kind: type[Kind], values: Any) -> Kind:
    """The data class `kind` of `values` by name, as JSON has them, if each is of the type that its field says.

    Raises TypeError and ValueError naming what is not.
    """
    hints, given = get_type_hints(kind), dict(values)
    for name in given.keys() & hints.keys():
        if hints[name] is float and type(given[name]) is int:
            given[name] = float(given[name])
        type_validator(f"{kind.__name__}.{name}", given[name], hints[name])
    return kind(**given)


def digest(tensors: Mapping[str, Tensor | Triangle], meta: dict[str, Any]) -> str:
    """A digest of names, dtypes, shapes and bytes, whatever the order, and of meta as JSON."""
    hasher = xxhash.xxh3_128(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        hasher.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        update(hasher, t.detach())
    return hasher.hexdigest()


def update(hasher: Any, tensor: Tensor) -> None:
    """Feed a tensor's bytes to a hasher."""
    hasher.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> np.ndarray:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # numpy has no bfloat16; the bytes are the same seen as integers
    return np.ascontiguousarray(flat.view(torch.uint8).numpy())


def pack(S: Tensor) -> Tensor:
    """The lower triangle of S (n, n) by rows, as one vector of n(n+1)/2."""
    return torch.cat([S[i, : i + 1] for i in range(S.shape[0])]) if S.shape[0] else S.new_empty(0)


def unpack(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack`; the strict upper triangle is zero. Raises ValueError where it is another size's."""
    if packed.shape != (n * (n + 1) // 2,):
        raise ValueError(f"a triangle of {n} rows has {n * (n + 1) // 2} numbers, not {tuple(packed.shape)}")
    return put_(packed.new_zeros(n, n), packed)


def put_(S: Tensor, packed: Tensor) -> Tensor:
    """What `pack` made, into the lower triangle of S (n, n); returns S."""
    for i, row in enumerate(packed.split(list(range(1, len(S) + 1)))):
        S[i, : i + 1] = row
    return S
