"""What a conversion weighs: numbers and bytes of the weights, and memory a sequence at several lengths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .shards import count_parameters
from .surgery import AttentionSite, SwapPlan

LENGTHS = (4096, 32768, 131072)  # tokens


@dataclass(frozen=True)
class Footprint:
    """Weights taken over and new ones, in numbers and bytes; bytes a sequence of each length, before and after.

    `teacher` and `converted` map a length in tokens to bytes: softmax layers keep bf16 keys and values (a sliding
    window at most its size), swapped layers their fp32 state and bf16 window.
    """

    kept_parameters: int
    kept_bytes: int
    new_parameters: int
    new_bytes: int
    teacher: dict[int, int]
    converted: dict[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "kept_parameters": self.kept_parameters,
            "kept_bytes": self.kept_bytes,
            "new_parameters": self.new_parameters,
            "new_bytes": self.new_bytes,
            "memory_bytes": {
                str(length): {"teacher": self.teacher[length], "converted": self.converted[length]}
                for length in self.teacher
            },
        }

    def rows(self) -> list[tuple[str, str]]:
        """Lines of a table: label and text."""
        heads = "".join(f"{f'{length // 1024}K':>12}" for length in self.teacher)
        return [
            ("parameters taken over", f"{self.kept_parameters:,} ({_size(self.kept_bytes)})"),
            ("new parameters", f"{self.new_parameters:,} ({_size(self.new_bytes)})"),
            ("memory a sequence", heads),
            ("  teacher's KV cache", "".join(f"{_size(size):>12}" for size in self.teacher.values())),
            ("  converted", "".join(f"{_size(size):>12}" for size in self.converted.values())),
        ]


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"


def kv_bytes(sites: Iterable[AttentionSite], length: int) -> int:
    """Bytes of the bf16 KV cache that a sequence of `length` tokens needs in these softmax layers."""
    return sum(
        2 * site.kv_heads * (site.head_dim + site.value_dim) * min(length, site.sliding_window or length)
        for site in sites
    )


def footprint(
    plan: SwapPlan, new_parameters: int, config: Any, folder: Path | None = None, files: Iterable[str] = ()
) -> Footprint:
    """What the conversion that a plan describes weighs.

    Args:
        plan: made for this config.
        new_parameters: numbers that it adds, stored as fp32.
        config: of the teacher.
        folder, files: where its shards lie; without them its weights are counted on the meta device, tied ones once.
    """
    names = set(files)
    if folder is not None and names:
        numbers = count_parameters(folder, names)
        size = sum((folder / name).stat().st_size for name in names)
    else:
        numbers, size = _on_meta(config)
    return Footprint(
        kept_parameters=numbers,
        kept_bytes=size,
        new_parameters=new_parameters,
        new_bytes=4 * new_parameters,
        teacher={length: kv_bytes((*plan.swap, *plan.keep), length) for length in LENGTHS},
        converted={length: plan.state_bytes() + kv_bytes(plan.keep, length) for length in LENGTHS},
    )


def _on_meta(config: Any) -> tuple[int, int]:
    """Numbers and bytes of a model's parameters in the dtype that its config names."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    dtype = getattr(config, "dtype", None)
    return numbers, numbers * (dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize
