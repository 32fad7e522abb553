"""Models whose parameters are spread over processes: by `torch.distributed.fsdp.fully_shard`, tensor parallelism, or DeepSpeed's
ZeRO-3."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jactus_kernels import JactusError


def is_sharded(model: nn.Module) -> bool:
    """Whether of some parameter this process has a part: a DTensor, or one that ZeRO-3 has partitioned."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) or _partitioned(p) for p in model.parameters())


def _partitioned(p: Any) -> bool:
    """Whether DeepSpeed holds the parameter, and lends it whole to whoever asks: otherwise it is empty."""
    return hasattr(p, "ds_id")


def whole_shape(p: Tensor) -> torch.Size:
    """The shape of a parameter when it is whole."""
    return getattr(p, "ds_shape", p.shape)


def refuse_sharded(step: str, model: nn.Module) -> None:
    """Raise JactusError for a model of which this process has only a part."""
    if is_sharded(model):
        raise JactusError(
            f"{step}: the parameters of {type(model).__name__} are spread over processes (DTensor, ZeRO-3); calibrate, plan and "
            "compress before fully_shard or deepspeed.initialize, and after training write it with jactus.save_pretrained, which all "
            "ranks call, and reload it"
        )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict put together on the CPU of rank 0, and nothing on the others: all ranks must call it."""
    if any(map(_partitioned, model.parameters())):
        return _gathered(model)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return whole


@torch.no_grad()
def _gathered(model: nn.Module) -> dict[str, Tensor]:
    """`whole_state` under ZeRO-3, a parameter at a time, and a tied one once."""
    from deepspeed.runtime.zero import GatheredParameters

    state = model.state_dict(keep_vars=True)
    whole: dict[int, Tensor] = {}
    for t in {id(t): t for t in state.values()}.values():
        with GatheredParameters([t], enabled=_partitioned(t)):
            if dist.get_rank() == 0:
                whole[id(t)] = t.detach().to("cpu", copy=True)
    return {name: whole[id(t)] for name, t in state.items() if id(t) in whole}
