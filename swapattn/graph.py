"""Read a model's attention out of its graph of operators, without knowing its architecture.

torch.export traces the model on the meta device, where nothing is computed; what it cannot trace is recorded operator
by operator. Attention is `scaled_dot_product_attention`, or a softmax over scores of all pairs of tokens whose result
multiplies values.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

LENGTH = 13  # of the traced sequence: a prime that no width of a model equals
Tracer = Literal["torch.export", "dispatch"]
# What stands between scores and softmax, softmax and values, or keys and their projection, and moves no head.
_SHAPING = {"view", "reshape", "_unsafe_view", "transpose", "permute", "t", "unsqueeze", "squeeze", "alias", "detach"}
_SHAPING |= {"to", "_to_copy", "type_as", "clone", "contiguous", "slice", "dropout", "native_dropout", "flatten"}
_REPEATING = {"expand", "broadcast_to", "repeat", "repeat_interleave"}
_COMBINING = {"add", "sub", "rsub", "where", "masked_fill", "cat", "clamp", "max", "maximum", "nan_to_num", "add_"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
_SOFTMAXES = {"softmax", "_softmax", "_safe_softmax", "special_softmax"}


@dataclass(frozen=True)
class GraphSite:
    """One softmax attention in a graph.

    Attributes:
        path: module that computes it.
        form: "sdpa", or "softmax" where scores and softmax are operators of their own.
        heads, kv_heads, head_dim, value_dim: as the operator sees them, before KV heads are repeated.
        mask: "causal", "sliding window", "chunked" or "none"; `window` is the width of the middle two.
        bias: scores have something added that is no mask, such as ALiBi.
        scale: factor of the scores; None where it is no constant.
        softcap: c of c·tanh(scores / c).
        sinks: the softmax has a further column.
    """

    path: str
    form: Literal["sdpa", "softmax"]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    mask: str
    window: int | None
    bias: bool
    scale: float | None
    softcap: float | None
    sinks: bool


def trace(model: nn.Module, inputs: dict[str, Any]) -> tuple[fx.Graph, Tracer, str]:
    """The graph of a forward pass, how it was had, and why not by torch.export if not.

    Args:
        model: on the meta device, in eval mode.
        inputs: keyword arguments, tensors on the meta device.
    """
    try:
        exported = torch.export.export(model, (), inputs, strict=False)
    except Exception as error:  # a family's code may do anything that tracing does not allow
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return _record(model, inputs), "dispatch", reason
    for node in exported.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        node.meta["owner"] = list(stack.values())[-1][0] if stack else ""
    return exported.graph, "torch.export", ""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes every operator into a graph, with the module that calls it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self.where = fx.Graph(), [""]
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Any] = []  # a freed tensor's id would come again

    def node(self, tensor: torch.Tensor) -> fx.Node:
        if id(tensor) not in self.nodes:
            node = self.graph.placeholder(f"input_{len(self.nodes)}")
            node.meta.update(val=tensor, owner="")
            self.keep(tensor, node)
        return self.nodes[id(tensor)]

    def keep(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return bool(1) if args[0].dtype == torch.bool else 1  # as in `audit`: there are no values
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        symbols = tree_map_only(torch.Tensor, self.node, (args, kwargs))
        made = self.graph.call_function(func, symbols[0], symbols[1])
        made.meta.update(val=result, owner=self.where[-1])
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in self.nodes:
                self.keep(tensor, made)
        return result


class _InOnePiece(TorchFunctionMode):
    """Writes `scaled_dot_product_attention` down as one node: the recorder would see what it is made of only.

    There KV heads are repeated, and half of the scale is on either side.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, _, value = args[:3]
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        symbols = tree_map_only(torch.Tensor, self.recorder.node, (args, kwargs))
        made = self.recorder.graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, *symbols)
        made.meta.update(val=result, owner=self.recorder.where[-1])
        self.recorder.keep(result, made)
        return result


def _record(model: nn.Module, inputs: dict[str, Any]) -> fx.Graph:
    recorder = _Recorder()
    handles = []
    for name, module in model.named_modules():
        enter = lambda _m, _a, name=name: recorder.where.append(name)  # noqa: E731 - binds the loop's name
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(lambda *_: recorder.where.pop() and None, always_call=True))
    try:
        with torch.no_grad(), recorder, _InOnePiece(recorder):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.graph


def attention_in(graph: fx.Graph, length: int = LENGTH) -> list[GraphSite]:
    """Every softmax attention in a graph of `trace`, in its order."""
    found = []
    for node in graph.nodes:
        name = _name(node)
        if name == "scaled_dot_product_attention":
            found.append(_sdpa_site(node))
        elif name in _SOFTMAXES:
            shape = _shape(node)
            if len(shape) > 1 and shape[-2] == length and shape[-1] >= length and (site := _softmax_site(node)):
                found.append(site)
    return found


def _name(node: fx.Node) -> str:
    return getattr(node.target, "_opname", "") if node.op == "call_function" else ""


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else ()


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [x for x in tree_flatten((node.args, node.kwargs))[0] if isinstance(x, fx.Node)]


def _heads(node: fx.Node) -> int:
    return math.prod(_shape(node)[:-2])  # one row: what is not tokens or width is heads


def _kv_heads(node: fx.Node, head_dim: int) -> int:
    """Heads of keys or values before they are repeated for the query heads."""
    length = max(_shape(node)[-2:], key=lambda n: n != head_dim)
    while (_name(node) in _SHAPING or _name(node) in _REPEATING) and node.args:
        before = node.args[0]
        assert isinstance(before, fx.Node)
        if _name(node) in _REPEATING and math.prod(_shape(before)) < math.prod(_shape(node)):
            return math.prod(_shape(before)) // (head_dim * length)
        node = before
    return math.prod(_shape(node)) // (head_dim * length)


def _sdpa_site(node: fx.Node) -> GraphSite:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    q, k, v = given["query"], given["key"], given["value"]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    assert isinstance(v, fx.Node)
    mask = given.get("attn_mask")
    kind, window, bias = _mask([mask] if isinstance(mask, fx.Node) else [])
    if given.get("is_causal"):
        kind = "causal"
    width = _shape(q)[-1]
    scale = given.get("scale")
    return GraphSite(
        path=node.meta["owner"],
        form="sdpa",
        heads=_heads(q),
        kv_heads=min(_heads(k), _repeated(k), _repeated(v)),  # keys may be rotated after they are repeated
        head_dim=width,
        value_dim=_shape(v)[-1],
        mask=kind,
        window=window,
        bias=bias,
        scale=float(scale) if isinstance(scale, int | float) else width**-0.5,
        softcap=None,
        sinks=False,
    )


def _repeated(node: fx.Node) -> int:
    return _kv_heads(node, _shape(node)[-1]) or _heads(node)


class _Scores:
    """The way from a softmax back to the product of queries and keys."""

    def __init__(self) -> None:
        self.product: fx.Node | None = None
        self.masks: list[fx.Node] = []
        self.factor: float | None = 1.0
        self.softcap: float | None = None

    def follow(self, node: fx.Node) -> bool:
        name = _name(node)
        if name in _PRODUCTS:
            self.product = node
            if name == "baddbmm":
                self.masks += [x for x in _inputs(node)[:1]]
                self._times(node.kwargs.get("alpha", 1.0))
            return True
        if name in ("mul", "div", "mul_", "div_"):
            way, by = node.args[0], node.args[1]
            if not isinstance(way, fx.Node) or not self.follow(way):
                return False
            number = isinstance(by, int | float)
            self._times((by if name.startswith("mul") else 1 / by) if number else None)  # type: ignore[operator]
            return True
        if name == "tanh":
            if not self.follow(_inputs(node)[0]):
                return False
            self.inside, self.factor, self.softcap = self.factor, 1.0, math.nan
            return True
        if name not in _SHAPING | _COMBINING:
            return False
        others = _inputs(node)
        for way in others:
            if self.follow(way):
                self.masks += [x for x in others if x is not way] if name in _COMBINING - {"cat", "sub"} else []
                return True
        return False

    inside: float | None = None

    def _times(self, by: Any) -> None:
        number = isinstance(by, int | float)
        self.factor = self.factor * float(by) if self.factor is not None and number else None

    def result(self) -> tuple[float | None, float | None]:
        """(scale, softcap): with a cap, scores are c·tanh(scale·qk / c)."""
        if self.softcap is None or self.factor is None or self.inside is None:
            return (self.factor, None) if self.softcap is None else (None, self.factor)
        return self.inside * self.factor, self.factor


def _softmax_site(node: fx.Node) -> GraphSite | None:
    scores = _Scores()
    first = node.args[0]
    if not isinstance(first, fx.Node) or not scores.follow(first) or scores.product is None:
        return None
    values = _values(node)
    if values is None:
        return None
    q, k = _inputs(scores.product)[-2:]
    scale, softcap = scores.result()
    kind, window, bias = _mask(scores.masks)
    width, length = _shape(q)[-1], _shape(q)[-2]
    return GraphSite(
        path=node.meta["owner"],
        form="softmax",
        heads=_heads(q),
        kv_heads=_kv_heads(k, width),
        head_dim=width,
        value_dim=_shape(values)[-1],
        mask=kind,
        window=window,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=_shape(node)[-1] > length,
    )


def _values(softmax: fx.Node) -> fx.Node | None:
    """What the weights multiply; None for a softmax that weighs no values."""
    waiting = list(softmax.users)
    while waiting:
        node = waiting.pop(0)
        if _name(node) in _PRODUCTS:
            return _inputs(node)[-1]
        if _name(node) in _SHAPING | {"mul", "expand"} or node.target is operator.getitem:
            waiting += list(node.users)
    return None


def _mask(nodes: list[fx.Node]) -> tuple[str, int | None, bool]:
    """(kind, width, whether something is added that is no mask) of what is added to scores or hides them."""
    if not nodes:
        return "none", None, False
    kinds: dict[str, int | None] = {}
    bias = False
    for node in nodes:
        found = dict(_hints(node))
        value = node.meta.get("val")  # one number is what hidden scores are set to
        adds = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0
        bias = bias or (adds and not found)
        kinds |= found
    for kind in ("sliding window", "chunked", "causal"):
        if kind in kinds:
            return kind, kinds[kind], bias
    return "none", None, bias


def _hints(node: fx.Node) -> Iterator[tuple[str, int | None]]:
    """What the operators that a mask is made with say about it."""
    waiting, seen = [node], {node}
    while waiting:
        here = waiting.pop()
        name = _name(here)
        if (name in ("le", "ge", "gt", "lt") and len(_inputs(here)) == 2) or name in ("tril", "triu"):
            yield "causal", None
        number = here.args[1] if len(here.args) > 1 else None
        if isinstance(number, int) and number > 1:
            if name == "sub" and any(_name(user) in ("gt", "ge", "lt", "le") for user in here.users):
                yield "sliding window", number
            if name in ("floor_divide", "div") and any(_name(user) == "eq" for user in here.users):
                yield "chunked", number
        new = [x for x in _inputs(here) if x not in seen]
        seen.update(new)
        waiting += new
