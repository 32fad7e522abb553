"""One file, safetensors with a JSON header: written atomically, digested, and checked when read."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jactus_kernels import JactusError

FORMAT = 1


def write(path: str | os.PathLike, kind: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` and `meta` to `path`; on any failure a file that was there before is left whole.

    Raises JactusError when the disk refuses.
    """
    path = Path(path)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {"kind": kind, "format": FORMAT, "digest": digest(tensors, meta), "meta": meta}
    with atomic(path) as partial:
        save_file(tensors, partial, metadata={"jactus": json.dumps(header)})


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` which takes its place, durably, only when the block succeeds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as e:
        raise JactusError(
            f"could not write {path}: {e}; what was there before is untouched: free some space or choose another path"
        ) from e


def read(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and meta of a file that `write` made.

    Raises JactusError when it is missing, truncated, corrupted, of another kind, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise JactusError(f"{path} is not a file; a jactus {kind} file was expected")
    try:
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
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        if isinstance(e, JactusError):
            raise
        raise JactusError(f"{path} is truncated or corrupted ({e}); make it again") from e
    if digest(tensors, header["meta"]) != header["digest"]:
        raise JactusError(f"{path} is corrupted: its contents do not match their digest; make it again")
    return tensors, header["meta"]


def digest(tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    """A digest of names, dtypes, shapes and bytes, whatever the order, and of meta as JSON."""
    hasher = xxhash.xxh3_128(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        hasher.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        update(hasher, t)
    return hasher.hexdigest()


def update(hasher: Any, tensor: Tensor) -> None:
    """Feed a tensor's bytes to a hasher."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # numpy has no bfloat16; the bytes are the same seen as integers
    hasher.update(np.ascontiguousarray(flat.view(torch.uint8).numpy()))


def pack(S: Tensor) -> Tensor:
    """The lower triangle of S (n, n) by rows, as one vector of n(n+1)/2."""
    return torch.cat([S[i, : i + 1] for i in range(S.shape[0])]) if S.shape[0] else S.new_empty(0)


def unpack(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack`; the strict upper triangle is zero."""
    S = packed.new_zeros(n, n)
    for i, row in enumerate(packed.split(list(range(1, n + 1)))):
        S[i, : i + 1] = row
    return S
