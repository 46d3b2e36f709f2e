"""Model classes `swapattn_<base>`: a transformers model whose attention modules carry a `swap` submodule.

A file of the checkpoint runtime: it imports torch, transformers and its neighbours only. The classes are made
by `type()` from the base type's own, so there is no modelling code per family.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .adapters import adapt_, adaptable
from .attention import BASES, PADDING_ONLY, PREFIX, find_cache, register, swaps
from .cache import CACHE, LightningCacheLayer, adopt
from .errors import CheckpointError
from .inputs import NoRotary, drop_rotary, rotation_of
from .made import Made
from .swap import KERNEL_FOLDER, LightningSwap

MODEL_TYPE_PREFIX = "swapattn_"
SCHEMA_VERSION = 2
ENTRY = "modeling_swapattn"
RUNTIME = (
    "modeling.py",
    "adapters.py",
    "attention.py",
    "swap.py",
    "call.py",
    "cache.py",
    "rollback.py",
    "feature_map.py",
    "norms.py",
    "gates.py",
    "inputs.py",
    "masks.py",
    "outside.py",
    "made.py",
    "errors.py",
)
KERNEL_RUNTIME = (
    *("op.py", "reference.py", "switch.py", "local.py", "local_op.py", "local_kernels.py", "local_cached.py"),
    *("linear_op.py", "forward.py", "backward.py", "states.py", "sweep.py", "shape.py", "bulk.py", "launch.py"),
    *("hopper.py", "hopper_parts.py", "hopper_kernels.py", "decay.py", "decode.py", "group.py"),
    *("features.py", "features_op.py", "feature_kernels.py"),
)

_ENTRY_TEXT = '''"""Loads this checkpoint in plain transformers: `from_pretrained(FOLDER, trust_remote_code=True)`.

With swapattn installed its classes (and kernels) are used; otherwise the copies of its files beside this one.
"""

try:
    from swapattn.modeling import register_base, swap_classes
except ImportError:
    from .modeling import register_base, swap_classes
{code}
{config}, {model} = swap_classes("{base}")
'''


def attach(
    model: nn.Module,
    layers: Mapping[str, Mapping[str, int]],
    spec: Mapping[str, Any],
    slopes: Mapping[str, torch.Tensor] | None = None,
    nope: Sequence[str] = (),
) -> None:
    """Give the named attention modules a `swap` and route the model's attention through the dispatcher, in place.

    Args:
        model: a transformers model whose attention goes through `AttentionInterface`.
        layers: path of each attention module to swap -> its shape (see `LightningSwap`).
        spec: the convert section of a recipe as plain values.
        slopes: path -> fp32 `[Hs]` start slopes, each 1 where left out.
        nope: paths of kept attention modules that go without rotary embedding.
    """
    register()
    for path, shape in layers.items():
        module = model.get_submodule(path)
        adapt_(module)
        with _in_fp32():
            module.swap = LightningSwap(shape, spec, slopes[path] if slopes else None)
        module.swap.rotate = rotation_of(module)
        module.register_forward_pre_hook(find_cache, with_kwargs=True)
    for path in nope:
        module = model.get_submodule(path)
        module.nope = NoRotary()
        module.register_forward_pre_hook(drop_rotary, with_kwargs=True)
    adapted = adaptable(model)
    if adapted and not all(hasattr(module, "swap") for module in adapted):
        return  # the kept layers are stock modules, which know the stock implementations only
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and adapted:
            base = str(config._attn_implementation).removeprefix(PADDING_ONLY)  # modules share their config
            config._attn_implementation_internal = PADDING_ONLY + base
        elif config is not None and hasattr(config, "_attn_implementation"):
            base = str(config._attn_implementation).removeprefix(PREFIX)
            config._attn_implementation_internal = PREFIX + (base if base in BASES else BASES[0])


@contextlib.contextmanager
def _in_fp32() -> Iterator[None]:
    """transformers makes models under the default dtype of their weights, such as bf16, which rounds start values."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(dtype, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


class GeneratesMixin(Made):
    """What `generate` has to be told about a swapped model."""

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> bool:
        """Whether `generate` compiles the step: not while a layer records it, call by call, on the host."""
        layers = getattr(model_kwargs.get(CACHE), "layers", ())
        if any(isinstance(layer, LightningCacheLayer) and layer.record_past for layer in layers):
            return False
        return bool(super()._valid_auto_compile_criteria(model_kwargs, *args, **kwargs))  # type: ignore[misc]

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """Put the recurrent layers in before `generate` asks the cache anything.

        Raises:
            ValueError: drafts of the model's own first layers, which would share their states.
        """
        if getattr(generation_config, "assistant_early_exit", None) is not None:
            raise ValueError(
                "assistant_early_exit: the drafts would share the states of the swapped layers; use an "
                "assistant_model or prompt_lookup_num_tokens"
            )
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            assert isinstance(self, nn.Module)
            for swap in swaps(self).values():
                layer = adopt(cache, swap.layer_idx)
                if generation_config.is_assistant:  # generate asked before the layer was there
                    layer.activate_past_recording()
        return result

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a cache that outlives it stops recording."""
        try:
            return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]
        finally:
            for layer in getattr(kwargs.get(CACHE), "layers", ()):
                if isinstance(layer, LightningCacheLayer):
                    layer.record_past = False
                    layer.rollback.forget()


@functools.cache
def generating(kind: type) -> type:
    """The same model class with that added, for a model that is swapped after it was loaded."""
    own = {"stock": kind, "made_by": (generating, kind), "__module__": kind.__module__}
    return type(kind.__name__, (GeneratesMixin, kind), own)


class _Known:
    """A class that the Auto classes know from `swap_classes`, whichever way it was loaded."""

    @classmethod
    def register_for_auto_class(cls, *_: Any) -> None:
        """Nothing, where transformers notes down that a class came with `trust_remote_code`.

        By that note every later saving in the process would copy the file of the class in the place of our entry.
        """


class ConfigMixin(_Known, Made):
    """What the config classes of swapattn add to their base class."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and beside it the files that plain transformers needs to load the folder.

        A model saves its config by this, once in all processes, and within what `push_to_hub` uploads.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.auto_map = write_runtime(Path(save_directory), self.swapattn["base_model_type"])  # type: ignore[attr-defined]
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


class SwapMixin(_Known, GeneratesMixin):
    """What the model classes of swapattn add to their base class."""

    base: type  # of which this is the swapped form

    # Slopes, scales and mixes lose too much in 16 bits; a few thousand numbers cost nothing.
    _keep_in_fp32_modules_strict = ("swap",)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if str(config._attn_implementation).startswith(PADDING_ONLY):  # of another model: the base knows its own only
            config._attn_implementation = config._attn_implementation.removeprefix(PADDING_ONLY)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        block = config.swapattn
        if block["version"] > SCHEMA_VERSION:
            raise CheckpointError(
                f"the checkpoint has schema version {block['version']}, this swapattn reads up to {SCHEMA_VERSION}: "
                "update swapattn"
            )
        assert isinstance(self, nn.Module)
        attach(self, block["layers"], block["spec"], nope=block.get("nope", ()))

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As the base type's own class: transformers reads it off the file of the class, which here is ours."""
        return bool(cls.base._can_set_experts_implementation())  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which makes every parameter trainable; decays that are not learnt stay as they are."""
        found = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        for swap in swaps(found[0] if isinstance(found, tuple) else found).values():
            swap.log_slope.requires_grad_(swap.learnable_decay)
        return found

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Choose what the kept layers use; the swapped ones stay swapped."""
        base = str(attn_implementation).removeprefix(PREFIX)
        if base not in BASES:
            raise ValueError(f"a swapped model computes its kept layers with {' or '.join(BASES)}, not {base}")
        prefix = "" if adaptable(self) else PREFIX  # type: ignore[arg-type]
        super().set_attn_implementation(prefix + base, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def swap_classes(base_model_type: str) -> tuple[type, type]:
    """Config and causal-LM class for a base model type, registered with the Auto classes.

    Raises:
        CheckpointError: this transformers does not know the base type.
    """
    if base_model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"transformers does not know the model type {base_model_type!r}: update transformers")
    base_config = CONFIG_MAPPING[base_model_type]
    base_model = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    model_type = MODEL_TYPE_PREFIX + base_model_type
    config_name, model_name = class_names(base_model_type)
    own: dict[str, Any] = {"model_type": model_type, "made_by": (_config_class, base_model_type)}
    config = type(config_name, (ConfigMixin, base_config), {**own, "__module__": __name__})
    own = {"config_class": config, "base": base_model, "made_by": (_model_class, base_model_type)}
    model = type(model_name, (SwapMixin, base_model), {**own, "__module__": __name__})
    AutoConfig.register(model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    # Mappings such as that of fused experts are keyed by model type, others by class; without them tensors that are
    # stored under another name would load as missing.
    for old, new in ((base_model_type, model_type), (base_model.__name__, model_name)):
        mapping = get_checkpoint_conversion_mapping(old)
        if mapping is not None and get_checkpoint_conversion_mapping(new) is None:
            register_checkpoint_conversion_mapping(new, mapping)
    return config, model


def _config_class(base_model_type: str) -> type:
    return swap_classes(base_model_type)[0]


def _model_class(base_model_type: str) -> type:
    return swap_classes(base_model_type)[1]


def register_base(model_type: str, model_class: Any) -> None:
    """Make a model type that comes with code of its own known to the Auto classes, unless it is."""
    if model_type not in CONFIG_MAPPING:
        AutoConfig.register(model_type, model_class.config_class)
        AutoModelForCausalLM.register(model_class.config_class, model_class)


def own_class(base_model_type: str) -> Any | None:
    """The causal-LM class of a type whose code is not part of transformers; None for any other."""
    config = CONFIG_MAPPING[base_model_type]
    own = config.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
    return MODEL_FOR_CAUSAL_LM_MAPPING[config] if own else None


def code_reference(base_model_type: str) -> str | None:
    """The same as "file.Class", by which a checkpoint names the code of its base."""
    kind = own_class(base_model_type)
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" if kind is not None else None


def class_names(base_model_type: str) -> tuple[str, str]:
    """Names of the config and the model class for a base model type."""
    stem = "SwapAttn" + CONFIG_MAPPING[base_model_type].__name__.removesuffix("Config")
    return stem + "Config", stem + "ForCausalLM"


def write_runtime(folder: Path, base_model_type: str) -> dict[str, str]:
    """Copy the files that plain transformers needs into a checkpoint; returns the `auto_map` for its config.

    Raises:
        CheckpointError: a file of the base type's own code has the name of one of ours.
    """
    files = [Path(__file__).parent / name for name in RUNTIME] + [KERNEL_FOLDER / name for name in KERNEL_RUNTIME]
    code, own = "", own_class(base_model_type)
    if own is not None:
        file = str(sys.modules[own.__module__].__file__)
        theirs = sorted({Path(file), *map(Path, get_relative_import_files(file))})
        twice = {path.name for path in theirs} & {f"{ENTRY}.py", *(path.name for path in files)}
        if twice:
            raise CheckpointError(
                f"the code of model type {base_model_type!r} has a file {min(twice)}, as has swapattn's own"
            )
        files += theirs
        code = f'from .{Path(file).stem} import {own.__name__}\n\nregister_base("{base_model_type}", {own.__name__})\n'
    for path in files:
        if not (folder / path.name).exists() or not (folder / path.name).samefile(path):
            shutil.copyfile(path, folder / path.name)
    config, model = class_names(base_model_type)
    text = _ENTRY_TEXT.format(config=config, model=model, base=base_model_type, code=code)
    (folder / f"{ENTRY}.py").write_text(text, encoding="utf-8")
    return {"AutoConfig": f"{ENTRY}.{config}", "AutoModelForCausalLM": f"{ENTRY}.{model}"}
