"""Families that compute attention themselves: the smallest code that hands their queries, keys and values to a swap.

A file of the checkpoint runtime: it imports torch, transformers and its neighbours only.

transformers' attention interface never sees these families. Their swapped attention modules, and no others, get a
class of their own; a kept layer is the stock module. The bias of ALiBi (arXiv 2108.12409) is linear in the distance:
in the linear branch the decay, which is such a bias inside an exponential, takes its place, and the local branch keeps
it (see `AttentionCall`).
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention import PADDING_ONLY, compute
from .made import Made


class _Adapted(Made, nn.Module):
    """What the adapted attention classes share; each comes before its stock class."""

    swap: Any
    stock: type

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, options: dict[str, Any]
    ) -> torch.Tensor:
        """Output `[B, T, Hq, Dv]` of the swap for q `[B, Hq, T, D]`, k and v; `surgery` puts a probe in its place."""
        return compute(self.swap, q, k, v, mask, options)

    def observed(self) -> bool:
        """Whether the layer is to compute the teacher's softmax."""
        swap = getattr(self, "swap", None)
        return swap is not None and swap.observer is not None


class _Inner(_Adapted):
    """Families whose method `_attn` is the softmax itself."""

    def options(self) -> dict[str, Any]:
        """Arguments of the softmax."""
        raise NotImplementedError

    def _attn(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None) -> Any:
        if not self.observed():
            return self.attend(query, key, value, attention_mask, self.options()).transpose(1, 2), None
        mask = _full_mask(attention_mask, query)
        output, weights = super()._attn(query, key, value, mask)  # type: ignore[misc]
        call = self.swap.call(query, key, value, attention_mask, 0, self.options())
        self.swap.observer(self.swap, call, output.transpose(1, 2))
        return output, weights


class _GPTJ(_Inner):
    def options(self: Any) -> dict[str, Any]:
        return {"scaling": 1 / self.scale_attn}


class _GPTNeo(_Inner):
    def options(self: Any) -> dict[str, Any]:
        window = self.config.window_size if self.attention_type == "local" else None
        return {"scaling": 1.0, "sliding_window": window}


class _Whole(_Adapted):
    """Families whose forward holds everything, from the projections to the output."""

    layer_idx: int
    slopes: tuple[float, ...]  # of ALiBi
    _placed: torch.Tensor | None = None

    def alibi(self, device: torch.device) -> torch.Tensor:
        """The slopes on a device; kept there, for a copy from the host would be no part of a CUDA graph."""
        if self._placed is not None and self._placed.device == device:
            return self._placed
        slopes = torch.tensor(self.slopes, dtype=torch.float64, device=device)
        if not torch.compiler.is_compiling():  # where it may be a tensor without values
            self._placed = slopes
        return slopes

    def run(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mask: Any,
        given: dict[str, Any],
        options: dict[str, Any],
        output: nn.Module,
        teacher: Callable[[Any], Any],
    ) -> Any:
        """The output projection's result, or (of a layer that is observed) whatever the stock forward returns."""
        q, k, v = qkv
        if not self.observed():
            cache = next((x for x in given.values() if isinstance(x, Cache)), None)  # its name changes
            if cache is not None:
                cache.update(k, v, self.layer_idx)
            return output(self.attend(q, k, v, mask, options).flatten(2))
        seen: list[torch.Tensor] = []
        handle = output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            result = teacher(mask)
        finally:
            handle.remove()
        self.swap.observer(
            self.swap, self.swap.call(q, k, v, mask, 0, options), seen[0].view(*seen[0].shape[:2], q.shape[1], -1)
        )
        return result


class _Falcon(_Whole):
    def forward(
        self: Any, hidden_states: torch.Tensor, alibi: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        q, k, v = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
        repeats = k.shape[1] // self.num_kv_heads  # stock repeats the KV heads before it caches them
        k, v = k[:, ::repeats], v[:, ::repeats]
        options: dict[str, Any] = {"scaling": self.inv_norm_factor}
        mask = attention_mask
        if alibi is None:
            q, k = _function(self, "apply_rotary_pos_emb")(q, k, *kwargs["position_embeddings"])
        else:
            options["alibi"] = self.alibi(q.device) * self.inv_norm_factor
            if mask is not None and mask.dim() == 4:  # the bias is in it: hidden is what is far below any bias
                mask = mask > torch.finfo(mask.dtype).min / 2

        def teacher(_: Any) -> Any:
            # Stock takes a mask of ours for eager's, and adds the bias to the scores as well.
            ours = self.config._attn_implementation.startswith(PADDING_ONLY)
            full = _full_mask(mask, q) if ours else attention_mask
            return super(_Falcon, self).forward(hidden_states, alibi=alibi, attention_mask=full, **kwargs)

        result = self.run((q, k, v), mask, kwargs, options, self.dense, teacher)
        return result if isinstance(result, tuple) else (result, None)


class _Bloom(_Whole):
    def forward(
        self: Any, hidden_states: torch.Tensor, residual: torch.Tensor, alibi: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        q, k, v = self._reshape(self.query_key_value(hidden_states))
        options = {"scaling": self.inv_norm_factor, "alibi": self.alibi(q.device)}

        def teacher(mask: Any) -> Any:
            return super(_Bloom, self).forward(hidden_states, residual, alibi, _full_mask(mask, q), **kwargs)

        result = self.run((q, k, v), attention_mask, kwargs, options, self.dense, teacher)
        if isinstance(result, tuple):
            return result
        return _function(self, "dropout_add")(result, residual, self.hidden_dropout, self.training), None


class _Mpt(_Whole):
    def forward(
        self: Any, hidden_states: torch.Tensor, position_bias: Any, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        mixed = self.Wqkv(hidden_states)
        mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv) if self.clip_qkv else mixed
        q, k, v = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in mixed.chunk(3, dim=2))
        options: dict[str, Any] = {"scaling": self.softmax_scale}
        if position_bias is not None:
            options["alibi"] = self.alibi(q.device)
        mask = attention_mask  # of a kept layer beside this one: true where hidden
        mask = ~mask if mask is not None and mask.dim() == 4 else mask

        def teacher(_: Any) -> Any:
            full = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None
            full = _full_mask(mask, q).bool() if full is None else full
            return super(_Mpt, self).forward(hidden_states, position_bias, attention_mask=full, **kwargs)

        result = self.run((q, k, v), mask, kwargs, options, self.out_proj, teacher)
        return result if isinstance(result, tuple) else (result, None)


# Model type -> its attention class, as long as transformers computes it out of reach of the interface.
_STOCK: dict[str, tuple[str, type[_Adapted]]] = {
    "bloom": ("BloomAttention", _Bloom),
    "falcon": ("FalconAttention", _Falcon),
    "gpt_neo": ("GPTNeoSelfAttention", _GPTNeo),
    "gptj": ("GPTJAttention", _GPTJ),  # on the interface from transformers 5.24 on
    "mpt": ("MptAttention", _Mpt),
}


def needs_adapter(model_type: str) -> bool:
    """Whether only an adapter can swap a type's attention in this transformers."""
    if model_type not in _STOCK:
        return False
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    return _adapter(getattr(module, _STOCK[model_type][0])) is not None


def _adapter(kind: type) -> type[_Adapted] | None:
    """What swaps a stock attention class; None if the interface does, or nothing."""
    file = kind.__module__
    if not file.startswith("transformers.models.") or hasattr(sys.modules[file], "ALL_ATTENTION_FUNCTIONS"):
        return None
    return dict(_STOCK.values()).get(kind.__name__)


def adaptable(model: nn.Module) -> list[nn.Module]:
    """The attention modules, stock or adapted already, that only an adapter can swap."""
    return [m for m in model.modules() if isinstance(m, _Adapted) or _adapter(type(m)) is not None]


@functools.cache
def _adapted(stock: Any) -> type:
    adapter = _adapter(stock)
    assert adapter is not None
    own = {"stock": stock, "made_by": (_adapted, stock), "__module__": stock.__module__}
    return type("Adapted" + stock.__name__, (adapter, stock), own)


def adapt_(module: nn.Module) -> None:
    """Give an adaptable module the class that computes its `swap`; leave any other as it is."""
    if _adapter(type(module)) is not None:
        stock: Any = type(module)
        module.__class__ = _adapted(stock)
        if not hasattr(module, "layer_idx"):
            module.layer_idx = module.layer_id  # gpt_neo's name for it
        if isinstance(module, _Whole):
            heads: Any = getattr(module, "num_heads", None) or module.n_heads  # the latter is mpt's name for it
            module.slopes = _slopes(module, heads)


def release_(module: nn.Module) -> None:
    """Give an adapted module its stock class back."""
    if isinstance(module, _Adapted):
        module.__class__ = module.stock
        for name in ("slopes", "_placed"):
            vars(module).pop(name, None)


def _function(module: nn.Module, name: str) -> Any:
    """A function of the family's own file."""
    return getattr(sys.modules[type(module).__module__], name)


def _slopes(module: nn.Module, heads: int) -> tuple[float, ...]:
    """The family's own ALiBi slopes, read off two neighbouring positions of the bias that it builds."""
    return _measured_slopes(str(type(module).__module__), heads)


@functools.cache
def _measured_slopes(file: str, heads: int) -> tuple[float, ...]:
    names = sys.modules[file]
    if hasattr(names, "build_mpt_alibi_tensor"):
        bias = names.build_mpt_alibi_tensor(heads, 2, device="cpu")
    else:
        bias = names.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long, device="cpu"), heads, torch.float32)
    bias = bias.reshape(heads, 2)
    return tuple((bias[:, 1] - bias[:, 0]).tolist())


def _full_mask(mask: Any, q: torch.Tensor) -> torch.Tensor:
    """An additive causal mask `[B, 1, T, T]` from a padding mask `[B, T]`, None, or a 4D one."""
    if mask is not None and mask.dim() == 4 and mask.dtype != torch.bool:
        return mask  # type: ignore[no-any-return]
    length = q.shape[2]
    allowed = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        allowed = allowed & (mask if mask.dim() == 4 else (mask > 0)[:, None, None, -length:])
    return torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, torch.finfo(q.dtype).min)
