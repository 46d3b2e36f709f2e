"""The swapped attention layer: lightning attention, the softmax window beside it, and how they are mixed.

A file of the checkpoint runtime: it imports torch and its neighbours only.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import nn
from torch.nn import functional as F

from .cache import LightningCacheLayer
from .call import AttentionCall
from .feature_map import FEATURE_MAPS
from .gates import DecayGate, OutputGate
from .inputs import LayerInputs, Rotate, unrotated
from .norms import OUTPUT_NORM_DIMS, HeadNorm, rms_normalized
from .outside import Leaving, leaving, leaving_cache
from .rollback import MOST_TOKENS

try:
    from lightning_attention import (
        lightning_attention,
        lightning_attention_step,
        local_attention,
        local_attention_cached,
        merged_local_attention,
    )
except ImportError:  # inside a saved checkpoint, where the plain PyTorch forms lie beside this file
    from .local import (  # type: ignore[no-redef, import-untyped]
        local_attention,
        local_attention_cached,
        merged_local_attention,
    )
    from .op import lightning_attention, lightning_attention_step  # type: ignore[no-redef, import-untyped]

KERNEL_FOLDER = Path(inspect.getfile(lightning_attention)).parent  # this folder, inside a saved checkpoint

Observer = Callable[["LightningSwap", AttentionCall, torch.Tensor], None]


class _WindowSizes(TypedDict):
    """What the forms of the softmax window take alike."""

    window: int
    sinks: int
    scale: float | None
    return_lse: Literal[True]


class Found(threading.local):
    """What the pre-hook of an attention module found for the attention that follows.

    Each thread has its own: a server may answer several requests by one model at a time.
    """

    inputs: LayerInputs | None = None
    cache_layer: LightningCacheLayer | None = None

    def __reduce__(self) -> tuple[type[Found], tuple[()]]:
        """A copy has found nothing."""
        return Found, ()


class Parts(NamedTuple):
    """What a swapped layer mixes: both branches `[B, T, Hq, Dv]`, and the share of the local one, which broadcasts."""

    linear: torch.Tensor
    local: torch.Tensor | None
    share: torch.Tensor | None


class LightningSwap(nn.Module):
    """Lightning attention, optionally beside a softmax window, in the place of one softmax layer.

    o_t = (1 − σ(m)) · g ⊙ u_t ⊙ norm(Σ_{s≤t} λ^{t−s} (φ(q_t)·φ(k_s)) v_s) + σ(m) · local_t

    with one decay λ per state, one mix m per head and a per-channel scale g (Lightning Attention-2,
    arXiv 2401.04658; the window as in Liger, arXiv 2503.01496). Where the recipe says so, gates that read the input
    of the attention module give each token its own λ_t and an output factor u_t.

    In a joint layer the linear branch sees what has left the window alone, and both stand under one denominator, as
    all tokens do in softmax (LoLCATs, arXiv 2410.10254): with ℓ_t the log-sum-exp of the window's scores and z_t the
    sum of the linear branch's weights, the share of the window is σ(ℓ_t − m − a ln z_t − w·q_t) in the place of σ(m).
    LoLCATs has a = 1 and w = 0; the features of `hedgehog` do not know how long q is, which w·q makes good.

    With further half-lives a head has several linear branches, each with feature maps and a state of its own, under
    one denominator: o_t = Σ_i e^{c_it} z_it o_it / Σ_i e^{c_it} z_it with z_it the sum of the weights of branch i and
    c_it = m_i + w_i·q_t, 0 for the first. One decay cannot follow both the last few tokens and the far ones. Where they
    are signed, o_t = Σ_i (p_it + d_it − mean_j d_jt) o_it with p_it = e^{c_it} z_it / Σ_j e^{c_jt} z_jt and
    d_it = m'_i + w'_i·q_t: one may be subtracted from another, as the two attentions of a head in Differential
    Transformer (arXiv 2410.05258), which sharpens what weights that are never negative can only blur.

    Parameters, all fp32:
        log_slope `[Hs]`: ln of the slope s, λ = exp(−s); −inf means no decay.
        out_scale `[Hq, Dv]`: g.
        mix `[Hq]`: m, only with a local branch.
        mix_query `[Hq, D]`, mix_sum `[Hq]`: w and a, only of a joint layer.
        merge `[n − 1, Hq]`, merge_query `[n − 1, Hq, D]`: m_i and w_i, only with n > 1 linear branches. Their heads and
            states are those of all branches, one branch after another: n·Hq, n·Hkv and n·Hs.
        shift `[n, Hq]`, shift_query `[n, Hq, D]`: m'_i and w'_i, only of signed branches.
        q_map, k_map: feature maps.
        q_norm, k_norm: RMS norms before the feature maps, or None.
        decay_gate, output_gate: see `gates`, or None.

    Attributes:
        branch: "both", or one branch at full weight ("linear", "local") for baselines and ablations.
        found: what the pre-hook found for the attention that follows: the cache, and inputs where the layer needs them.
        rotate: the model's own rotation, where the linear branch goes without.
        observer: when set, the layer computes the teacher's softmax and shows each call to the observer.
    """

    def __init__(self, shape: Mapping[str, int], spec: Mapping[str, Any], slopes: torch.Tensor | None = None) -> None:
        """Build from the shape {layer_idx, heads, kv_heads, head_dim, value_dim, hidden_size, rotary} and a recipe.

        Older checkpoints lack hidden_size and rotary, and the options that came with them.
        """
        super().__init__()
        self.layer_idx = shape["layer_idx"]
        heads, kv_heads = shape["heads"], shape["kv_heads"]
        further = len(spec["decay"].get("half_lives", ()))
        self.linear_branches = 1 + further
        states = self.linear_branches * (kv_heads if spec["decay"]["per"] == "kv_head" else heads)
        self.normalizer: str = spec["normalizer"]
        normed = spec.get("qk_norm", "none") == "rms"
        self.q_norm = HeadNorm(heads) if normed else None
        self.k_norm = HeadNorm(kv_heads) if normed else None
        feature_map = FEATURE_MAPS[spec["feature_map"]]
        self.q_map = feature_map(heads, shape["head_dim"], self.linear_branches)
        self.k_map = feature_map(kv_heads, shape["head_dim"], self.linear_branches)
        slopes = torch.ones(states) if slopes is None else slopes
        self.learnable_decay = bool(spec["decay"]["learnable"])
        self.log_slope = nn.Parameter(slopes.log(), requires_grad=self.learnable_decay)
        self.out_scale = nn.Parameter(torch.ones(heads, shape["value_dim"]))
        local = spec["local"]
        self.window: int = local["window"] if local else 0
        self.sinks: int = local["sinks"] if local else 0
        share = torch.tensor(float(local["share"] if local else 0.5))
        self.joint = bool(local) and local.get("mix", "constant") == "joint"
        self.mix = nn.Parameter(torch.logit(share).repeat(heads)) if local else None
        self.mix_query = nn.Parameter(torch.zeros(heads, shape["head_dim"])) if self.joint else None
        self.mix_sum = nn.Parameter(torch.ones(heads)) if self.joint else None
        self.merge = nn.Parameter(torch.zeros(further, heads)) if further else None
        self.merge_query = nn.Parameter(torch.zeros(further, heads, shape["head_dim"])) if further else None
        signed = spec["decay"].get("signed", False)
        self.shift = nn.Parameter(torch.zeros(1 + further, heads)) if signed else None
        self.shift_query = nn.Parameter(torch.zeros(1 + further, heads, shape["head_dim"])) if signed else None
        self.decay_gate = DecayGate(shape["hidden_size"], states) if spec["decay"].get("gate") else None
        gate = spec.get("output_gate", "none")
        channels = shape["value_dim"] if gate == "channel" else 1
        self.output_gate = OutputGate(shape["hidden_size"], heads, channels) if gate != "none" else None
        self.found = Found()
        dropped = spec.get("rope", {}).get("linear") == "drop"
        self.rotary_dims: int = shape["rotary"] if dropped else 0
        self.rotate: Rotate | None = None
        self.branch: Literal["both", "linear", "local"] = "both"
        self.observer: Observer | None = None

    @property
    def log_decay(self) -> torch.Tensor:
        """ln λ = −slope, fp32 `[Hs]`; with a decay gate that of Δ = 1."""
        return -self.log_slope.float().exp()

    @property
    def reads_inputs(self) -> bool:
        """Whether the layer needs what its attention module is called with."""
        return self.decay_gate is not None or self.output_gate is not None or self.rotary_dims > 0

    def call(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        seen: int | torch.Tensor,
        given: Mapping[str, Any],
        count: torch.Tensor | None = None,
    ) -> AttentionCall:
        """One call of the attention function, q `[B, Hq, T, D]`, k and v, with the inputs that the pre-hook found.

        Of the other arguments `given` it takes `scaling`, `softcap`, `sliding_window`, `alibi` (a slope for each query
        head) and `cu_seq_lens_q` where the caller packed sequences. `count` `[B]` are the real tokens of each row that
        came before.
        """
        inputs, self.found.inputs = self.found.inputs, None
        hidden = inputs.hidden if inputs is not None else None
        linear = None
        if self.rotary_dims:
            assert self.rotate is not None
            assert inputs is not None
            assert inputs.rotary is not None
            linear = unrotated(self.rotate, self.rotary_dims, q, k, inputs.rotary)
        scaling, cu_seqlens = given.get("scaling"), given.get("cu_seq_lens_q")
        alibi = (given["alibi"], count) if given.get("alibi") is not None else None
        call = AttentionCall(
            q, k, v, scaling, mask, seen, hidden=hidden, linear=linear, cu_seqlens=cu_seqlens, alibi=alibi
        )
        call.softcap, call.sliding_window = given.get("softcap"), given.get("sliding_window")
        return call

    def linear(
        self, call: AttentionCall, cache: LightningCacheLayer | None = None, seen: Leaving | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The linear branch before its scale, `[B, T, Hq, Dv]`; reads and advances the cache's state.

        `seen` are the keys and values of a joint layer; then also ln of the sum of the weights, fp32 `[B, T, Hq]`.
        """
        root = call.scaling**0.5  # the softmax scale goes into the features, half to each side
        q, k, v, tokens = call.linear_q, call.linear_k, call.v, call.tokens
        if seen is not None:
            k, v, tokens = seen.k[..., : k.shape[-1]], seen.v, seen.tokens  # without the channels of an ALiBi bias
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        asked = q
        q, k = self.q_map(q, root), self.k_map(k, root)
        if self.linear_branches > 1:
            v = v.repeat(1, 1, self.linear_branches, 1)
        if seen is not None and seen.tokens is None:
            k = k * seen.some[..., None, None]
        log_decay = self.log_decay
        if self.decay_gate is not None:
            log_decay = log_decay * self.decay_gate(call.hidden)
        options: dict[str, Any] = {"scale": 1.0, "mask": tokens, "normalize": self.normalizer == "sum"}
        options["return_log_sum"] = wants_sum = seen is not None or self.linear_branches > 1
        past = cache.past() if cache is not None else None
        if past is not None and q.shape[1] == 1 and not torch.is_grad_enabled():
            found = lightning_attention_step(q, k, v, log_decay, past, **options)
            o, log_sum = found if wants_sum else (found, None)
        else:
            options |= {"initial_state": past, "output_final_state": cache is not None, "cu_seqlens": call.cu_seqlens}
            o, final, *rest = lightning_attention(q, k, v, log_decay, **options)
            log_sum = rest[0] if rest else None
            if cache is not None:
                cache.keep(call.last_states(final))
        if self.linear_branches > 1:
            o, log_sum = self.merged(o, log_sum, asked)
        dims = OUTPUT_NORM_DIMS.get(self.normalizer)
        o = rms_normalized(o, dims) if dims else o
        return (o * self.output_gate(call.hidden) if self.output_gate is not None else o), log_sum

    def merged(
        self, o: torch.Tensor, log_sum: torch.Tensor | None, q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All linear branches `[B, T, n·Hq, Dv]`, and ln of their sums, as one; q `[B, T, Hq, D]`."""
        assert self.merge is not None
        assert self.merge_query is not None
        assert log_sum is not None
        of_query = of_queries(q, self.merge_query) + self.merge
        batch, length, heads = q.shape[:3]
        sums = log_sum.view(batch, length, -1, heads)
        sums = torch.cat((sums[:, :, :1], sums[:, :, 1:] + of_query), 2)
        weights = sums.softmax(2)
        if self.shift is not None and self.shift_query is not None:
            shift = of_queries(q, self.shift_query) + self.shift
            weights = weights + (shift - shift.mean(2, keepdim=True))
        o = o.view(batch, length, -1, heads, o.shape[-1]) * weights[..., None]
        return o.sum(2), sums.logsumexp(2)

    def local(
        self, call: AttentionCall, cache: LightningCacheLayer | None = None, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax over the window and the sinks, `[B, T, Hq, Dv]`, and ln of its denominator, fp32 `[B, T, Hq]`.

        Reads the cache's ring, and puts the new tokens into it at their `positions`.
        """
        q, k, v = call.q, call.k, call.v
        sizes: _WindowSizes = {"window": self.window, "sinks": self.sinks, "scale": call.scaling, "return_lse": True}
        if cache is None or positions is None:
            return local_attention(q, k, v, cu_seqlens=call.cu_seqlens, mask=call.tokens, **sizes)
        if cache.ring_k is None or cache.ring_v is None or cache.ring_position is None:
            found = local_attention(q, k, v, cu_seqlens=call.cu_seqlens, mask=call.tokens, **sizes)
        elif call.length <= self.window:
            keys, values = torch.cat((cache.ring_k, k), 1), torch.cat((cache.ring_v, v), 1)
            key_positions = torch.cat((cache.ring_position, positions), 1)
            found = local_attention_cached(q, keys, values, k_positions=key_positions, q_positions=positions, **sizes)
        else:  # a long continuation: the ring in the order of positions goes before the new tokens, O(T·window)
            past_k, past_v, position = cache.in_order(cache.ring_k)
            keys, values = torch.cat((past_k, k), 1), torch.cat((past_v, v), 1)
            past = position.shape[1]
            q = torch.cat((q.new_zeros(q.shape[0], past, *q.shape[2:]), q), 1)
            mask = torch.cat((position >= 0, positions >= 0), 1)
            o, lse = local_attention(q, keys, values, mask=mask, **sizes)
            found = o[:, past:], lse[:, past:]
        self.remember(call, cache, positions)
        return found

    def remember(self, call: AttentionCall, cache: LightningCacheLayer, positions: torch.Tensor) -> None:
        """Put the new tokens into the cache's ring."""
        linear = call.in_rows(call.linear_k) if self.joint and self.rotary_dims else None
        cache.remember(call.in_rows(call.k), call.in_rows(call.v), positions, self.window, self.sinks, linear)

    def outside(
        self, call: AttentionCall, cache: LightningCacheLayer | None = None, positions: torch.Tensor | None = None
    ) -> Leaving:
        """What the linear branch of a joint layer sees: what leaves the window. Before the ring takes new tokens."""
        k = call.linear_k if self.rotary_dims else call.k
        if cache is None or positions is None or cache.ring_k is None:
            return leaving(k, call.v, self.window, self.sinks, tokens=call.tokens, cu_seqlens=call.cu_seqlens)
        return leaving_cache(cache, k, call.v, positions, self.window, self.sinks)

    def forward(
        self, call: AttentionCall, cache: LightningCacheLayer | None = None, *, record: bool = True
    ) -> torch.Tensor:
        """Both branches mixed, `[B, T, Hq, Dv]` in the dtype of v; recorded where the cache has to roll back."""
        if cache is None:
            return self.both(call)
        cache.match(call.k, call.v)
        if not record:
            return self.both(call, cache)
        if not cache.record_past or call.cu_seqlens is not None:
            cache.rollback.forget()
            return self.both(call, cache)
        start = max(call.length - MOST_TOKENS, 0)
        if start == 0:
            cache.rollback.append(call, self, cache)
            return self.both(call, cache)
        cache.rollback.forget()  # only the end of a long prompt can be taken back
        head, tail = self.both(call.narrow(0, start), cache), call.narrow(start, call.length)
        cache.rollback.append(tail, self, cache)
        return torch.cat((head, self.both(tail, cache)), 1)

    def both(self, call: AttentionCall, cache: LightningCacheLayer | None = None) -> torch.Tensor:
        """`forward` without the record."""
        if self.branch == "local" and self.mix is not None and cache is None:
            return self.local(call)[0].to(call.v.dtype)
        if self.branch == "both" and self.joint and (cache is None or cache.ring_k is None):
            return self.joined(call, cache)
        parts = self.parts(call, cache)
        if self.branch == "local" and parts.local is not None:
            return parts.local
        if parts.local is None or parts.share is None or self.branch == "linear":
            o = parts.linear * self.out_scale
        else:
            o = parts.linear * ((1 - parts.share) * self.out_scale) + parts.local * parts.share
        return o.to(call.v.dtype)

    def joined(self, call: AttentionCall, cache: LightningCacheLayer | None = None) -> torch.Tensor:
        """`both` of a joint layer that sees whole sequences: what `parts` hands out is never made."""
        place = call.last, call.rows, call.length, call.q.device
        positions = cache.positions(*place) if cache is not None else None
        seen = self.outside(call)
        linear, log_sum = self.linear(call, cache, seen)
        o = merged_local_attention(
            call.q,
            call.k,
            call.v,
            linear,
            self.log_weight(call, log_sum, seen.some),
            self.out_scale,
            window=self.window,
            sinks=self.sinks,
            scale=call.scaling,
            cu_seqlens=call.cu_seqlens,
            mask=call.tokens,
        )
        if cache is not None and positions is not None:
            self.remember(call, cache, positions)
        return o

    def parts(self, call: AttentionCall, cache: LightningCacheLayer | None = None) -> Parts:
        """Both branches and the share of the local one; reads and advances the cache."""
        if self.mix is None:
            return Parts(self.linear(call, cache)[0], None, None)
        positions = None
        if cache is not None:
            positions = cache.positions(call.last, call.rows, call.length, call.q.device)
        if self.mix_query is None:
            linear, (local, _) = self.linear(call, cache)[0], self.local(call, cache, positions)
            return Parts(linear, local, torch.sigmoid(self.mix)[:, None])
        seen = self.outside(call, cache, positions)
        linear, log_sum = self.linear(call, cache, seen)
        local, lse = self.local(call, cache, positions)
        return Parts(linear, local, torch.sigmoid(lse - self.log_weight(call, log_sum, seen.some))[..., None])

    def log_weight(self, call: AttentionCall, log_sum: torch.Tensor | None, some: torch.Tensor) -> torch.Tensor:
        """ln of the linear branch's weight in the denominator of a joint layer, beside the window's, fp32 `[B, T, Hq]`.

        -inf where nothing is outside the window.
        """
        assert self.mix is not None
        assert self.mix_query is not None
        assert self.mix_sum is not None
        assert log_sum is not None
        of_query = of_queries(call.linear_q, self.mix_query[None])[:, :, 0]
        weight = self.mix + self.mix_sum * log_sum + of_query
        return torch.where(some[..., None], weight if call.lift is None else weight + call.lift, -torch.inf)


def of_queries(q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """w_i·q of each head: q `[B, T, H, D]` and w `[n, H, D]` to `[B, T, n, H]` in fp32 (fp64)."""
    return _OfQueries.apply(q, weights)  # type: ignore[no-untyped-call, no-any-return]


class _OfQueries(torch.autograd.Function):
    """As products of matrices, one a head, these would have n columns, which is slow: they are sums.

    The gradient of w is one product of the rows of all heads with the queries of all, of which the blocks on the
    diagonal are wanted: a sum over the tokens, fused with all that its terms are made of, takes many times as long.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, weights)
        return (q[:, :, None] * weights.to(q.dtype)).sum(-1, dtype=torch.promote_types(q.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        q, weights = ctx.saved_tensors
        number, heads, dim = weights.shape
        grad = grad.to(q.dtype)
        of_q = (grad[..., None] * weights.to(q.dtype)).sum(2) if ctx.needs_input_grad[0] else None
        rows = F.pad(grad.flatten(2).flatten(0, 1), (0, -number * heads % 8))  # of 16 bytes, or the product is slow
        every = rows.T @ q.flatten(2).flatten(0, 1)
        blocks = every[: number * heads].view(number, heads, heads, dim).diagonal(dim1=1, dim2=2)
        return of_q, blocks.movedim(-1, 1).to(weights.dtype)
