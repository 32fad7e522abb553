"""How a run sums: what of `calibrate`'s arguments steers the sums and not the method."""

from dataclasses import dataclass
from typing import Any

import torch

from jactus_kernels import JactusError


@dataclass(frozen=True)
class Summing:
    """dtype and device of the sums (None: each on its layer's), the scale of the loss, bytes held at a time (None: no limit)."""

    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    loss_scale: float = 1.0
    memory_limit: int | None = None

    @classmethod
    def checked(
        cls,
        statistics_dtype: Any = "float32",
        statistics_device: Any = None,
        loss_scale: Any = 1.0,
        memory_limit: Any = None,
    ) -> "Summing":
        """As `calibrate` was given them. Raises JactusError naming the argument and what it may be."""
        named = getattr(torch, statistics_dtype, None) if isinstance(statistics_dtype, str) else statistics_dtype
        if named not in (torch.float32, torch.float64):
            raise JactusError(f"calibrate: statistics_dtype={statistics_dtype!r}; it may be float32 or float64")
        try:
            place = None if statistics_device is None else torch.device(statistics_device)
        except (RuntimeError, TypeError) as e:
            raise JactusError(f"calibrate: statistics_device={statistics_device!r} is no device: {e}") from e
        if not isinstance(loss_scale, int | float) or not 0 < loss_scale < float("inf"):
            raise JactusError(f"calibrate: loss_scale={loss_scale!r}; it may be any positive number")
        if memory_limit is not None and (not isinstance(memory_limit, int) or memory_limit <= 0):
            raise JactusError(
                f"calibrate: memory_limit={memory_limit!r}; it is a number of bytes, or None for no limit"
            )
        return cls(named, place, float(loss_scale), memory_limit)

    def decisive(self) -> dict[str, Any]:
        """What of it decides the sums, in plain values: all but where they are."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"statistics_dtype": dtype, "memory_limit": self.memory_limit, "loss_scale": self.loss_scale}


SUMMING = Summing()
