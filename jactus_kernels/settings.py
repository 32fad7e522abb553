"""What the user may override: which backend runs, and how exactly float32 products are made.

Process-wide rather than per thread, because autograd runs a CUDA backward on a thread of its own.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

from .errors import JactusError

BACKENDS = ("auto", "fused", "triton", "torch")
PRECISIONS = ("auto", "ieee", "tf32x3", "tf32")


@dataclass(frozen=True)
class Settings:
    """backend: auto, fused, triton or torch; fp32: auto, ieee, tf32x3 or tf32.

    "fused" runs the Triton kernels wherever they fuse something and the vendor's library for the products that are
    left; "triton" runs those too by a kernel; "torch" runs no kernel; "auto" lets the policy choose between fused and
    torch for every shape.

    fp32 "auto" is the fastest mode that is as accurate as float32: three TF32 products on NVIDIA, plain float32 on
    AMD. "tf32" is faster and makes errors of about 1e-3. It only concerns Triton kernels on float32 inputs.
    """

    backend: str = "auto"
    fp32: str = "auto"

    def __post_init__(self) -> None:
        for name, value, allowed in (("backend", self.backend, BACKENDS), ("fp32", self.fp32, PRECISIONS)):
            if value not in allowed:
                raise JactusError(f"{name}={value!r} (or JACTUS_{name.upper()}) must be one of {', '.join(allowed)}")


_current: Settings | None = None


def current() -> Settings:
    """The settings in force: those of the innermost `use`, else the environment's JACTUS_BACKEND and JACTUS_FP32."""
    if _current is not None:
        return _current
    return _made(os.environ.get("JACTUS_BACKEND", "auto"), os.environ.get("JACTUS_FP32", "auto"))


@lru_cache(maxsize=64)  # asked on every call of a layer on a GPU
def _made(backend: str, fp32: str) -> Settings:
    return Settings(backend, fp32)


@contextmanager
def use(backend: str | None = None, fp32: str | None = None) -> Iterator[Settings]:
    """Override the backend or the float32 precision within a `with` block, for the whole process.

    What is recomputed in a backward (gradient checkpointing) takes the route in force then: let the block enclose it.

    Raises JactusError for a name that is not known.
    """
    global _current
    before = _current
    given = {name: value for name, value in (("backend", backend), ("fp32", fp32)) if value is not None}
    _current = replace(current(), **given)
    try:
        yield _current
    finally:
        _current = before
