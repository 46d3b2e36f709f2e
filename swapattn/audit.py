"""Find what a model computes over all pairs of tokens, without knowing its architecture."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

PRIME = 211  # a length that no width of a model equals, so that a T×T tensor cannot be mistaken


class _PairwiseOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the modules in which an operator returns a tensor with two dimensions of the sequence length."""

    def __init__(self, length: int, where: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length, self.where, self.sites = length, where, dict[str, str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # Masking code asks whether all tokens are real or all of one sequence; there are no values: yes.
            return bool(1) if args[0].dtype == torch.bool else 1
        result = func(*args, **(kwargs or {}))
        name = str(func)
        outputs = result if isinstance(result, tuple | list) else (result,)
        pairwise = any(
            isinstance(x, torch.Tensor) and x.is_floating_point() and list(x.shape).count(self.length) >= 2
            for x in outputs
        )
        if "scaled_dot_product" in name:  # its fused forms return no weights; a window calls it on short blocks
            pairwise = min(args[0].shape[-2], args[1].shape[-2]) >= self.length
        if pairwise and self.where:
            self.sites.setdefault(self.where[-1], name)
        return result


def quadratic_sites(model: nn.Module, *, length: int = PRIME, device: str = "cpu") -> dict[str, str]:
    """Modules that compute something over all pairs of tokens, with the operator that shows it.

    Args:
        model: a causal LM; on the meta device nothing is computed.
        length: prime sequence length to run, longer than any local window.
        device: device of the token ids.

    Returns:
        path of the innermost module -> operator. Empty for a model that is linear in the length.
    """
    where: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if name:
            enter = lambda _m, _a, name=name: where.append(name)  # noqa: E731 - binds the loop's name
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(lambda *_: where.pop() and None, always_call=True))
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    mode = _PairwiseOps(length, where)
    try:
        with torch.no_grad(), mode:
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return mode.sites
