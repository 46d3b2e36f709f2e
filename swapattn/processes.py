"""What the processes of a distributed run agree on; alone, every function here does nothing or the obvious."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed

from .errors import UsageError

_SHARDED = "SWAPATTN_FSDP"


def count() -> int:
    """Processes of this run: what torchrun or accelerate launch say."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str) -> None:
    """Meet the other processes, over gloo on CPUs and NCCL on GPUs, of which this process takes its own.

    Raises:
        UsageError: the launcher asks for a way of sharding that there is not.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        raise UsageError("distill does not run under DeepSpeed: shard with FSDP2 (accelerate launch --use_fsdp)")
    if _yes("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "2") != "2":
            raise UsageError("distill shards with FSDP2: add --fsdp_version 2 (or FSDP_VERSION=2)")
        if _yes("FSDP_OFFLOAD_PARAMS"):
            raise UsageError("distill does not offload parameters: leave out --fsdp_offload_params")
        # transformers and accelerate would shard as well, each in its own way, if they saw it
        del os.environ["ACCELERATE_USE_FSDP"]
        os.environ[_SHARDED] = "true"
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")


def sharded() -> bool:
    """Whether parameters are to be sharded over the processes; known once they have met."""
    return count() > 1 and _yes(_SHARDED)


def _yes(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def from_first(value: Any) -> Any:
    """The first process's value, in every process; everybody waits for it."""
    if count() == 1:
        return value
    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def copy_from_first_(tensors: Iterable[torch.Tensor]) -> None:
    """Give tensors in place the values that they have in the first process."""
    if count() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), src=0)


def mean(figure: torch.Tensor) -> torch.Tensor:
    """Mean of a number over the processes, queued on its device."""
    if count() == 1:
        return figure
    total = figure.clone()
    distributed.all_reduce(total)
    return total / count()


class Agreement:
    """Whether any process says yes, asked on the CPU so that no GPU is waited for."""

    def __init__(self) -> None:
        self.group = distributed.new_group(backend="gloo") if count() > 1 else None

    def any(self, *questions: bool) -> tuple[bool, ...]:
        """For each question whether it is true in any process; every process has to ask."""
        if self.group is None:
            return questions
        answers = torch.tensor([int(question) for question in questions])
        distributed.all_reduce(answers, op=distributed.ReduceOp.MAX, group=self.group)
        return tuple(bool(answer) for answer in answers.tolist())
