"""Models whose parameters are spread over processes, by `torch.distributed.fsdp.fully_shard` or tensor parallelism."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from jactus_kernels import JactusError


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter is a DTensor, of which this process has a part."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in model.parameters())


def refuse_sharded(step: str, model: nn.Module) -> None:
    """Raise JactusError for a model of which this process has only a part."""
    if is_sharded(model):
        raise JactusError(
            f"{step}: the parameters of {type(model).__name__} are spread over processes (DTensor); calibrate, plan and compress "
            "before fully_shard, and after training write it with jactus.save_pretrained, which all ranks call, and reload it"
        )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict put together on the CPU of rank 0, and nothing on the others: all ranks must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return whole
