"""Decide which layers of a model are swapped, check everything, then change it.

`plan` runs a model of the right shapes on the meta device with a probe in the place of the attention function:
whoever calls it is an attention layer, whatever its module is called. Nothing depends on names of modules.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .adapters import adapt_, adaptable, needs_adapter, release_
from .attention import PADDING_ONLY, find_cache, swaps
from .audit import quadratic_sites, run_without_values
from .cache import CACHE, adopt
from .decay import decay_slopes
from .errors import RecipeError, UnsupportedModelError
from .feature_map import FEATURE_MAPS
from .inputs import NoRotary, drop_rotary, layer_inputs
from .modeling import SCHEMA_VERSION, GeneratesMixin, attach, code_reference, generating
from .recipe import ConvertSpec, KeepSpec
from .rotary_check import rotary_dims

PROBE = "swapattn_probe"
INDEXER_FIELDS = ("index_topk", "index_topk_blocks", "indexer_n_heads")  # of configs with a sparse-attention indexer
_OUTSIDE = "computes softmax attention outside transformers' AttentionInterface{where}: it cannot be swapped"
_INDEXED = "picks the tokens it attends to with a sparse-attention indexer, which a swapped layer has no use for"
_OWN_MASK = "adds numbers of each head's own to the scores of attention, of which a swapped layer knows nothing"
_OWN_KEYS = "attends to keys other than those of its tokens (compressed or kept by the model), which no swap can cache"


@dataclass(frozen=True)
class AttentionSite:
    """One module that calls the attention interface, with the shapes it calls it with."""

    path: str
    layer_idx: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scaling: float | None
    sliding_window: int | None
    softcap: float | None
    sinks: bool
    hidden_size: int = 0
    rotary: int = 0

    def shape(self) -> dict[str, int]:
        """What `LightningSwap` needs to know.

        hidden_size is 0 where the module's input is not known, rotary where no rotary embedding is to be undone.
        """
        names = ("layer_idx", "heads", "kv_heads", "head_dim", "value_dim", "hidden_size", "rotary")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class SwapPlan:
    """The layers to swap and to keep; made by `plan`, carried out by `apply_`."""

    base_model_type: str
    swap: tuple[AttentionSite, ...]
    keep: tuple[AttentionSite, ...]
    spec: ConvertSpec
    layers: int

    def config_block(self) -> dict[str, Any]:
        """The `swapattn` block of a checkpoint's config.json."""
        return {
            "version": SCHEMA_VERSION,
            "base_model_type": self.base_model_type,
            "code": code_reference(self.base_model_type),
            "spec": self.spec.model_dump(mode="json"),
            "layers": {site.path: site.shape() for site in self.swap},
            "nope": self.nope(),
        }

    def nope(self) -> list[str]:
        """Paths of the kept layers that go without rotary embedding."""
        return [site.path for site in self.keep] if self.spec.rope.kept == "drop" else []

    def slopes(self) -> dict[str, torch.Tensor]:
        """Start slopes of every swapped layer, fp32, one for each state: by the schedule, then by each half-life."""
        decay, found = self.spec.decay, {}
        for site in self.swap:
            states = site.kv_heads if decay.per == "kv_head" else site.heads
            own = decay_slopes(decay.schedule, states, site.layer_idx, self.layers)
            further = [own.new_full((states,), math.log(2) / half_life) for half_life in decay.half_lives]
            found[site.path] = torch.cat((own, *further))
        return found

    def state_bytes(self) -> int:
        """Bytes of state and window that one sequence needs in the swapped layers (fp32 state, bf16 window)."""
        total, slopes = 0, self.slopes()
        for site in self.swap:
            states = slopes[site.path].numel()
            features = site.head_dim * FEATURE_MAPS[self.spec.feature_map].expansion
            total += 4 * states * features * (site.value_dim + (self.spec.normalizer == "sum"))
            if self.spec.local:
                slots = self.spec.local.window + self.spec.local.sinks + 1
                keys = 2 if self.spec.local.mix == "joint" and site.rotary else 1  # as they are and not rotated
                total += 2 * slots * site.kv_heads * (keys * site.head_dim + site.value_dim)
        return total

    def kv_bytes_per_token(self) -> int:
        """Bytes of bf16 KV cache per token in the layers that the plan swaps."""
        return sum(2 * site.kv_heads * (site.head_dim + site.value_dim) for site in self.swap)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "base_model_type": self.base_model_type,
            "swap": [asdict(site) for site in self.swap],
            "keep": [asdict(site) for site in self.keep],
            "state_bytes": self.state_bytes(),
            "kv_bytes_per_token": self.kv_bytes_per_token(),
        }


def causal_config(config: Any) -> Any:
    """The config that the causal LM is made from, as the Auto classes do it.

    Of some types that also see (qwen3_5) it is that of their text model; of others (gemma3) the one with all parts.
    """
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    text = config.sub_configs.get("text_config")
    taken = text is not None and getattr(model, "config_class", None) is text
    return config.get_text_config() if taken else config


_KNOWN: dict[tuple[type, str], list[AttentionSite]] = {}  # converting, loading and training ask again, for seconds each


def attention_sites(config: Any) -> list[AttentionSite]:
    """Every module that calls the attention interface, found on the meta device from a config alone.

    Raises:
        UnsupportedModelError: the type is no causal LM, has no softmax attention, computes it out of reach of the
            interface, or uses it in a way that one swap per layer cannot stand for.
    """
    config = causal_config(config)
    key = type(config), config.to_json_string(use_diff=False)
    if key not in _KNOWN:
        _KNOWN[key] = _probed(config)
    return list(_KNOWN[key])


def _probed(config: Any) -> list[AttentionSite]:
    """`attention_sites` of a model that has not been asked for before."""
    _check_config(config)
    kind = config.model_type
    calls: list[tuple[nn.Module, AttentionSite]] = []
    unfit: list[str] = []
    widths: dict[nn.Module, int] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = layer_inputs(args, kwargs).hidden
        widths[module] = hidden.shape[-1] if hidden is not None else 0

    def probe(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Any:
        unfit.extend(_unfit(query, key, attention_mask))
        calls.append((module, _site(module, query, key, value, kwargs)))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    def probe_adapted(module: nn.Module, q: Any, k: Any, v: Any, _mask: Any, options: dict[str, Any]) -> Any:
        return probe(module, q, k, v, None, **options)[0]  # adapters know what is in the mask

    AttentionInterface.register(PROBE, probe)
    AttentionMaskInterface.register(PROBE, lambda *args, **kwargs: None)
    config = type(config).from_dict(config.to_dict())
    try:
        with torch.device("meta"):  # in bf16, the only dtype that fused experts multiply in there
            implementation = "eager" if needs_adapter(kind) else PROBE
            model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.bfloat16)
        for module in adaptable(model):
            adapt_(module)
            vars(module)["attend"] = functools.partial(probe_adapted, module)
        for module in model.modules():
            module.register_forward_pre_hook(enter, with_kwargs=True)
        outside = quadratic_sites(model, device="meta")
    except Exception as error:  # whatever the code of a family raises without weights
        if error.args == (PROBE,):  # it looks its attention up in a table of its own
            raise _refusal(kind, _OUTSIDE.format(where="")) from error
        raise _refusal(kind, f"does not run on the meta device ({' '.join(str(error).split())[:120]})") from error
    if any(getattr(module, "is_causal", True) is False for module, _ in calls):
        raise _refusal(kind, "attends in both directions; swapattn converts causal models")
    names = {id(module): name for name, module in model.named_modules()}
    sites = [replace(site, path=names[id(module)], hidden_size=widths.get(module, 0)) for module, site in calls]
    _check_sites(kind, sites, outside)
    if unfit:
        raise _refusal(kind, unfit[0])
    _check_cache(kind, model, {module: site.layer_idx for module, site in calls})
    if unfit:
        raise _refusal(kind, unfit[0])
    return sites


def _unfit(query: torch.Tensor, key: torch.Tensor, mask: Any) -> Iterator[str]:
    """Why a call of the attention interface is none that a swap could stand for."""
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[1] > 1:
        yield _OWN_MASK
    if key.shape[2] != query.shape[2]:
        yield _OWN_KEYS


def _refusal(kind: str, reason: str) -> UnsupportedModelError:
    """One line: the type, the reason, and what could be done."""
    message = f"model type {kind!r} {reason}; `swapattn models --types` lists what can be converted"
    return UnsupportedModelError(message, reason)


def _check_cache(kind: str, model: nn.Module, layers: dict[nn.Module, int]) -> None:
    """A prefill and a step, with the recurrent layers in the cache that the model itself makes."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
        if cache is not None:
            adopt(cache, layers[module])

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in layers]
    try:
        first = run_without_values(model, input_ids=torch.zeros(1, 5, dtype=torch.long, device="meta"), use_cache=True)
        name = next((name for name in (CACHE, "cache_params") if first.get(name) is not None), None)
        if name is None:
            raise _refusal(kind, "returns no cache that a swapped layer could keep its state in")
        step = torch.zeros(1, 1, dtype=torch.long, device="meta")
        run_without_values(model, input_ids=step, use_cache=True, **{name: first[name]})
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever the code of a family raises when its cache has no keys
        reason = " ".join(str(error).split())[:120]
        raise _refusal(kind, f"does not work with a cache of constant size ({reason})") from error
    finally:
        for handle in handles:
            handle.remove()


def _check_config(config: Any) -> None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(kind, "is an encoder-decoder; swapattn converts decoder-only models")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refusal(kind, "is no causal language model of this transformers")
    for part in (config, config.get_text_config(decoder=True)):  # the same but for composites
        if getattr(part, "num_kv_shared_layers", 0):
            raise _refusal(kind, "shares keys and values between layers, which no swap can cache")
        layer_types = getattr(part, "layer_types", None) or ()
        if "chunked_attention" in layer_types:
            raise _refusal(kind, "attends within chunks, whose borders cannot be told from those of packed sequences")
        if "indexed_attention" in layer_types or any(getattr(part, name, None) for name in INDEXER_FIELDS):
            raise _refusal(kind, _INDEXED)


def _site(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kw: dict[str, Any]) -> AttentionSite:
    return AttentionSite(
        path="",
        layer_idx=int(getattr(module, "layer_idx", -1)),
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        scaling=kw.get("scaling"),
        sliding_window=kw.get("sliding_window"),
        softcap=kw.get("softcap"),
        sinks=kw.get("s_aux") is not None,
    )


def _check_sites(kind: str, sites: list[AttentionSite], outside: dict[str, str]) -> None:
    if not sites and outside:
        raise _refusal(kind, _OUTSIDE.format(where=f" (in {next(iter(outside))})"))
    if not sites:
        raise _refusal(kind, "has no softmax attention: there is nothing to swap")
    paths = [site.path for site in sites]
    if len(set(paths)) < len(paths):
        raise _refusal(kind, "calls attention more than once in a layer: nothing fits it")
    if any(site.layer_idx < 0 for site in sites):
        raise _refusal(kind, "has an attention module that does not know its layer index")
    if any(site.heads % site.kv_heads for site in sites):
        raise _refusal(kind, "has query heads that are no multiple of its KV heads")


def _check_options(kind: str, spec: ConvertSpec, swapped: tuple[AttentionSite, ...]) -> None:
    """Refuse what the swapped layers of this model cannot do; UnsupportedModelError names the key of the recipe."""
    gated = {"convert.decay.gate": spec.decay.gate, "convert.output_gate": spec.output_gate != "none"}
    wanted = [key for key, value in gated.items() if value]
    if wanted and not all(site.hidden_size for site in swapped):
        raise UnsupportedModelError(
            f"model type {kind!r} does not show the input of its attention modules, which {' and '.join(wanted)} reads"
        )


def _without_auto(
    config: Any, spec: ConvertSpec, swapped: tuple[AttentionSite, ...], keep: tuple[AttentionSite, ...]
) -> tuple[ConvertSpec, tuple[AttentionSite, ...]]:
    """The spec, `rope.linear: auto` replaced by what becomes of it on this model, and the swapped sites for it."""
    if spec.rope.linear != "auto":
        return spec, _with_rotary(config, spec, swapped, keep)
    drop, leave = (
        spec.model_copy(update={"rope": spec.rope.model_copy(update={"linear": how})}) for how in ("drop", "keep")
    )
    with contextlib.suppress(UnsupportedModelError):
        sites = _with_rotary(config, drop, swapped, keep)
        if any(site.rotary for site in sites):
            return drop, sites
    return leave, _with_rotary(config, leave, swapped, keep)


def _with_rotary(
    config: Any, spec: ConvertSpec, swapped: tuple[AttentionSite, ...], keep: tuple[AttentionSite, ...]
) -> tuple[AttentionSite, ...]:
    """The swapped sites with what is needed to drop the rotary embedding, where the recipe says so."""
    undone = [site.path for site in swapped] if spec.rope.linear == "drop" else []
    silenced = [site.path for site in keep] if spec.rope.kept == "drop" else []
    if (undone or silenced) and needs_adapter(config.model_type):
        raise UnsupportedModelError(f"model type {config.model_type!r}: convert.rope cannot drop its rotary embedding")
    dims = rotary_dims(config, undone, silenced) if undone or silenced else {}
    return tuple(replace(site, rotary=dims.get(site.path, 0)) for site in swapped)


def plan(config: Any, spec: ConvertSpec) -> SwapPlan:
    """Which layers of a model with this config are swapped under a recipe's convert section.

    Args:
        config: a transformers config of a causal LM.
        spec: the recipe's convert section; `keep_softmax` holds positions in the order of the attention layers,
            negative ones from the end, or says how many there are; the plan's own spec holds the positions, from 0
            and each once, and has no `auto`.

    Raises:
        UnsupportedModelError: see `attention_sites`.
        RecipeError: a kept layer does not exist, or none is left to swap.
    """
    config = causal_config(config)
    sites = sorted(attention_sites(config), key=lambda site: site.layer_idx)
    count = len(sites)
    if isinstance(spec.keep_softmax, KeepSpec):
        spec = spec.model_copy(update={"keep_softmax": spec.keep_softmax.positions(count)})
    assert isinstance(spec.keep_softmax, tuple)
    kept = set()
    for index in spec.keep_softmax:
        if not -count <= index < count:
            raise RecipeError(f"convert.keep_softmax: {index} is out of range, the model has {count} attention layers")
        kept.add(index % count)
    spec = spec.model_copy(update={"keep_softmax": tuple(sorted(kept))})
    if len(kept) == count:
        raise RecipeError(f"convert.keep_softmax names all {count} attention layers: nothing is left to swap")
    swapped = tuple(site for i, site in enumerate(sites) if i not in kept)
    _check_options(config.model_type, spec, swapped)
    keep = tuple(site for i, site in enumerate(sites) if i in kept)
    spec, swapped = _without_auto(config, spec, swapped, keep)
    return SwapPlan(
        base_model_type=config.model_type,
        swap=swapped,
        keep=keep,
        spec=spec,
        layers=max(site.layer_idx for site in sites) + 1,
    )


def apply_(model: nn.Module, plan: SwapPlan) -> None:
    """Swap the planned layers of a loaded model in place; its own weights are not touched.

    For trials in memory: the model's class (but for what `generate` asks) and config stay those of its base, under
    which it could be saved, but would load again with softmax. So `save_pretrained` refuses until `revert_`;
    `swapattn.convert` makes checkpoints.

    Raises:
        UnsupportedModelError: the model has already been swapped, or is not the one that was planned for.
    """
    if swaps(model):
        raise UnsupportedModelError("the model is already swapped")
    modules = dict(model.named_modules())
    missing = [site.path for site in plan.swap if site.path not in modules]
    if missing:
        raise UnsupportedModelError(f"the plan does not fit the model: no module {missing[0]}")
    block = plan.config_block()
    attach(model, block["layers"], block["spec"], plan.slopes(), block["nope"])
    vars(model)["save_pretrained"] = _not_saved
    if not isinstance(model, GeneratesMixin):
        kind: Any = type(model)
        model.__class__ = generating(kind)


def _not_saved(*_: Any, **__: Any) -> None:
    raise UnsupportedModelError(
        "a model swapped in memory would be saved as one with softmax: make a checkpoint with `swapattn.convert` and "
        "load that one, or take the swaps out with `revert_`"
    )


def revert_(model: nn.Module) -> None:
    """Take every swap out again: the model computes softmax attention as before."""
    vars(model).pop("save_pretrained", None)
    model.__class__ = vars(type(model)).get("stock", type(model))
    for path in swaps(model):
        module = model.get_submodule(path)
        del module.swap
        release_(module)
        _remove_hook(module, find_cache)
    for module in list(model.modules()):
        config = getattr(module, "config", None)
        chosen = str(getattr(config, "_attn_implementation", ""))
        if config is not None and chosen.startswith(PADDING_ONLY):  # stock modules need the whole mask again
            config._attn_implementation_internal = chosen.removeprefix(PADDING_ONLY)
        if isinstance(getattr(module, "nope", None), NoRotary):
            del module.nope
            _remove_hook(module, drop_rotary)


def _remove_hook(module: nn.Module, wanted: Any) -> None:
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is wanted]:
        del module._forward_pre_hooks[key]
        del module._forward_pre_hooks_with_kwargs[key]
