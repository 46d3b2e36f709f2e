"""The typed recipe: everything that changes a model, in one strict, frozen, saveable value.

A recipe has three sections: `convert` (the swapped layer), `distill` (stages and their text) and `eval`.
Unknown keys, wrong types and contradictory values are `RecipeError`s that name the path of the key.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError, field_validator, model_validator

from .errors import RecipeError
from .section import Section
from .stages import CalibrateStage, DistillStage, Stage, text_of, written_logits
from .text import TAGS, Text, TextSpec

SCHEMA_VERSION = 1

FeatureMapName = Literal["identity", "silu", "elu1", "relu", "exp", "softmax", "hedgehog", "hedgehog_mlp", "t2r"]
NormalizerName = Literal["none", "sum", "rms", "rms_all"]
ScheduleName = Literal["alibi", "transnormer", "minimax", "retnet", "none"]
POSITIVE_MAPS: frozenset[str] = frozenset({"elu1", "relu", "exp", "softmax", "hedgehog", "hedgehog_mlp", "t2r"})


class DecaySpec(Section):
    """The exponential decay of each head; `calibrate` may replace the schedule's numbers by measured ones.

    `learnable` trains the slopes, as Mamba-2 its A (arXiv 2405.21060); `gate` gives each token a decay of its own that
    starts as that of the slopes (`gates.DecayGate`). Each of the `half_lives`, in tokens, adds a linear branch with
    states and feature maps of its own to every head, under one denominator with the first; `signed` branches may be
    subtracted from one another.
    """

    schedule: ScheduleName = "alibi"
    per: Literal["kv_head", "query_head"] = "kv_head"
    learnable: bool = False
    gate: bool = False
    half_lives: tuple[Annotated[float, Field(gt=0)], ...] = ()
    signed: bool = False

    @model_validator(mode="after")
    def _something_to_change(self) -> Self:
        if self.signed and not self.half_lives:
            raise ValueError("signed: true is about several linear branches: say half_lives")
        for name, wanted in (("learnable", self.learnable), ("gate", self.gate)):
            if wanted and self.schedule == "none":
                raise ValueError(
                    f"{name}: true cannot change a decay of schedule 'none'; start from another, as 'alibi'"
                )
        return self


class RopeSpec(Section):
    """Which layers keep the model's rotary embedding: the linear branch of swapped ones, and the kept softmax ones.

    The softmax window of a swapped layer always keeps it. Dropped on the linear branch: Liger (arXiv 2503.01496); HALO
    (arXiv 2601.22156) and RADLADS (arXiv 2505.03005) compare it. Dropped on kept layers: NoPE, as in HALO.

    linear: `auto` becomes `drop` where the model's rotation can be undone, and `keep` where it cannot or there is none.
    """

    linear: Literal["keep", "drop", "auto"] = "keep"
    kept: Literal["keep", "drop"] = "keep"


class LocalSpec(Section):
    """The softmax branch beside the linear one: the last `window` and the first `sinks` tokens.

    mix: `joint`: the linear branch sees what has left the window alone, and both stand under one denominator, as in
        LoLCATs, arXiv 2410.10254. `constant`: it sees all tokens, and each head mixes by one number, as in Liger,
        arXiv 2503.01496.
    share: where to start from: of a constant mix the share of the local branch in each head's output; of a joint one
        its share where both sums are equal. Calibration replaces it.
    Sinks as in StreamingLLM, arXiv 2309.17453.
    """

    window: int = Field(64, ge=1)
    sinks: int = Field(4, ge=0)
    mix: Literal["joint", "constant"] = "constant"
    share: float = Field(0.5, gt=0, lt=1)


class KeepSpec(Section):
    """Attention layers that stay softmax, by number: `count` of them or a `share` of all.

    The `first` and the `last` ones are protected; what is left of the number is spread evenly between them.
    """

    count: int | None = Field(None, ge=1)
    share: float | None = Field(None, gt=0, lt=1)
    first: int = Field(0, ge=0)
    last: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_number(self) -> Self:
        if (self.count is None) == (self.share is None):
            raise ValueError("say exactly one of: count, share")
        return self

    def positions(self, layers: int) -> tuple[int, ...]:
        """The kept positions among so many attention layers, ascending; a share keeps at least one.

        Raises:
            RecipeError: fewer are to be kept than are protected, or more than there are.
        """
        count = self.count if self.count is not None else max(1, round((self.share or 0) * layers))
        middle, between = count - self.first - self.last, layers - self.first - self.last
        if middle < 0:
            raise RecipeError(
                f"convert.keep_softmax: {count} of {layers} layers are kept, fewer than the {self.first} first and "
                f"{self.last} last ones"
            )
        if middle > between:
            raise RecipeError(f"convert.keep_softmax: {count} layers are to be kept, the model has {layers}")
        spread = (self.first + (2 * i + 1) * between // (2 * middle) for i in range(middle))
        return (*range(self.first), *spread, *range(layers - self.last, layers))


Keep = Annotated[
    Annotated[tuple[int, ...], Tag("list")] | Annotated[KeepSpec, Tag("number")],
    Discriminator(lambda value: "number" if isinstance(value, Mapping | KeepSpec) else "list"),
]


class ConvertSpec(Section):
    """What a swapped layer is made of, and which layers stay softmax (negative indices count from the end).

    Every option is stored in the checkpoint; sources and formulas are where it is computed:
        keep_softmax: positions among the attention layers, or how many of them (`KeepSpec`).
        decay: `decay.decay_slopes`; with `gate` also `gates.DecayGate` (Mamba-2, arXiv 2405.21060).
        qk_norm: `norms.HeadNorm` before the feature map (HALO, arXiv 2601.22156).
        feature_map: `feature_map.FEATURE_MAPS`.
        normalizer: `none`; `sum` of the weights (Katharopoulos et al., arXiv 2006.16236); `rms` of each head (RetNet,
            arXiv 2307.08621); `rms_all` of all heads together (TransNormer, arXiv 2405.17381).
        output_gate: `gates.OutputGate`, one number per head or per channel (Gated Attention, arXiv 2505.06708).
        rope: whether linear branch and kept layers have the rotary embedding.
        local: the softmax window beside the linear branch.
    """

    keep_softmax: Keep = ()
    decay: DecaySpec = DecaySpec()
    qk_norm: Literal["none", "rms"] = "none"
    feature_map: FeatureMapName = "hedgehog"
    normalizer: NormalizerName = "sum"
    output_gate: Literal["none", "head", "channel"] = "none"
    rope: RopeSpec = RopeSpec()
    local: LocalSpec | None = LocalSpec()

    @model_validator(mode="after")
    def _normalizer_needs_positive_weights(self) -> Self:
        if self.normalizer == "sum" and self.feature_map not in POSITIVE_MAPS:
            raise ValueError(
                f"normalizer 'sum' divides by the sum of the weights, which the feature map {self.feature_map!r} "
                f"may make negative; use one of {', '.join(sorted(POSITIVE_MAPS))} or normalizer 'rms'"
            )
        return self

    @model_validator(mode="after")
    def _branches_need_one_denominator(self) -> Self:
        if self.decay.half_lives and self.normalizer != "sum":
            raise ValueError(f"decay.half_lives needs the sum of weights, normalizer 'sum', not {self.normalizer!r}")
        return self

    @model_validator(mode="after")
    def _joint_needs_one_denominator(self) -> Self:
        if self.local is not None and self.local.mix == "joint" and self.normalizer != "sum":
            raise ValueError(f"local.mix: joint needs the sum of weights, normalizer 'sum', not {self.normalizer!r}")
        return self

    @model_validator(mode="after")
    def _nope_needs_kept_layers(self) -> Self:
        if self.rope.kept == "drop" and not self.keep_softmax:
            raise ValueError("rope.kept: drop is about the layers that stay softmax, and keep_softmax names none")
        return self

    def linear_branch(self) -> str:
        """One line on the linear branch, for tables."""
        extras = [f"{self.qk_norm} q/k norm"] if self.qk_norm != "none" else []
        extras += [f"output gate per {self.output_gate}"] if self.output_gate != "none" else []
        extras += ["no RoPE"] if self.rope.linear == "drop" else []
        extras += ["signed"] if self.decay.signed else []
        decay = f"decay {self.decay.schedule} per {self.decay.per}" + (", gated" if self.decay.gate else "")
        decay += "".join(f" and half-life {half_life:g}" for half_life in self.decay.half_lives)
        return ", ".join([self.feature_map, f"normalizer {self.normalizer}", decay, *extras])


class DistillSpec(Section):
    """The stages in their order, and the text they share unless a stage names its own.

    A trained stage is saved every five minutes, to go on after an interruption, and besides every `save_steps` steps.
    """

    text: Text = TextSpec(embedded=True)
    seed: int = Field(0, ge=0, lt=2**31)
    save_steps: int | None = Field(None, gt=0)
    stages: tuple[Stage, ...] = ()

    @model_validator(mode="after")
    def _logits_of_their_own(self) -> Self:
        folders = [Path(written.logits) for stage in self.stages if (written := written_logits(stage)) is not None]
        for folder in folders:
            if folders.count(folder) > 1:
                raise ValueError(f"two stages have teacher.logits {folder}, but see other windows: name a folder each")
        return self

    def describe_text(self) -> str:
        """One line that names what the stages read, for tables and provenance."""
        return "; ".join(dict.fromkeys(text_of(stage, self.text).describe() for stage in self.stages))

    @property
    def calibration(self) -> CalibrateStage:
        """The first calibrate stage, with all defaults where there is none."""
        return next((s for s in self.stages if isinstance(s, CalibrateStage)), CalibrateStage(stage="calibrate"))


class EvalSpec(Section):
    """What `swapattn eval` runs when the command line names nothing."""

    tasks: tuple[str, ...] = ("hellaswag", "piqa")
    limit: int | None = Field(None, gt=0)
    num_fewshot: int = Field(0, ge=0)
    batch_size: int = Field(16, gt=0)


class Recipe(Section):
    """convert + distill + eval, named for what it is."""

    name: str  # folders are called after it
    summary: str = ""
    convert: ConvertSpec = ConvertSpec()
    distill: DistillSpec = DistillSpec()
    eval: EvalSpec = EvalSpec()

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not name.strip() or name.startswith(".") or any(x in name for x in "/\\\0"):
            raise ValueError(f"{name!r}: folders are called after it: say a name without / and without . in front")
        return name

    @model_validator(mode="after")
    def _window_to_train(self) -> Self:
        alone = [s for s in self.distill.stages if isinstance(s, DistillStage) and s.branch == "local"]
        if alone and self.convert.local is None:
            raise ValueError("distill.stages: branch: local needs a softmax window, and convert.local is null")
        return self

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain JSON-able values, every default spelled out."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `load_recipe` reads back to the same value."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def recipe_folder() -> Path:
    """The folder of the named recipes: inside an installed wheel, or `recipes/` of a checkout."""
    packaged = Path(str(files("swapattn"))) / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of all recipes that come with swapattn, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def recipe_text(name: str) -> str:
    """Source text of a named recipe or of a recipe file.

    Raises:
        RecipeError: nothing of that name (the message offers near matches), or a file that cannot be read.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else recipe_folder() / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(recipe_names())}"
        raise RecipeError(f"no recipe {name!r}: {hint}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {name} cannot be read as UTF-8 text: {error}") from error


def load_recipe(recipe: str | Recipe, overrides: Iterable[str] = (), *, convert: ConvertSpec | None = None) -> Recipe:
    """Read a named recipe or a YAML file, apply `KEY=VALUE` overrides, check everything.

    Args:
        recipe: a name from `recipe_names()`, a path ending in .yaml, or one that is read already.
        overrides: dotted keys with YAML values, e.g. `distill.stages.align.tokens=100000`; a list is indexed by
            number (from 0), a stage also by its kind where there is one of that kind.
        convert: the convert section of a recipe that has none.

    Raises:
        RecipeError: unknown recipe, unknown key, wrong type, contradiction; each names its path.
    """
    overrides = list(overrides)
    if isinstance(recipe, Recipe) and not overrides and (convert is None or "convert" in recipe.model_fields_set):
        return recipe
    if isinstance(recipe, Recipe):
        data, label = recipe.model_dump(mode="json", exclude_unset=True), recipe.name
    else:
        data, label = _read(recipe), recipe
    if convert is not None:
        data.setdefault("convert", convert.model_dump(mode="json"))
    for override in overrides:
        _override(data, override)
    return parse_recipe(data, label=label)


class _Loader(yaml.SafeLoader):
    """Also reads 1e6 as a number, as YAML 1.2 does; in YAML 1.1 it is text. A key may not come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value} comes twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(name: str) -> dict[str, Any]:
    try:
        data = yaml.load(recipe_text(name), Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {name}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {name}: expected keys and values at the top level")
    return {"name": Path(name).stem, **data}


def parse_recipe(data: Mapping[str, Any], label: str = "recipe") -> Recipe:
    """Check plain values (as YAML or JSON give them) and return the typed recipe; RecipeError names bad keys."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"recipe {label}: " + "; ".join(_explain(e) for e in error.errors())) from None


def restated(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe as an earlier version stored it, with the keys that came since; as it is where it makes no sense now."""
    with contextlib.suppress(RecipeError):
        return parse_recipe(values).to_dict()
    return values


def parse_text(value: Any, label: str) -> Text:
    """What `distill.text` takes, plain or as YAML of the command line; RecipeError begins with `label`."""
    try:
        return TypeAdapter(Text).validate_python(_value(label, value) if isinstance(value, str) else value)
    except ValidationError as error:
        raise RecipeError(f"{label}: " + "; ".join(_explain(e) for e in error.errors())) from None


_NOT_KEYS = ("list", "number", "[key]")  # tags of `Keep`, pydantic's word for a key of a mapping


def _explain(error: Any) -> str:
    loc = error["loc"]
    kinds = {i for i in range(2, len(loc)) if loc[i - 2] == "stages" and isinstance(loc[i - 1], int)}  # no keys either
    where = ".".join(str(x) for i, x in enumerate(loc) if i not in kinds and x not in (*_NOT_KEYS, *TAGS))
    if error["type"] == "extra_forbidden":
        return f"unknown key {where}{_near(where)}"
    if error["type"] in ("union_tag_not_found", "union_tag_invalid") and error["ctx"]["discriminator"] == "'stage'":
        return f"{where}: say stage: calibrate, align, distill or extend"
    if error["type"] in ("tuple_type", "list_type"):
        given = error["input"]
        example = f", such as [{json.dumps(given)}]" if isinstance(given, str | int | float) else ""
        count = f", or {{count: {given}}}" if where == "convert.keep_softmax" and isinstance(given, int) else ""
        return f"{where}: expected a list{example}{count}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}".removeprefix(": ")


def _near(unknown: str) -> str:
    """Which key was meant: one that is written like it in the same section, or of its name in another."""
    section, _, name = unknown.rpartition(".")
    kind = re.sub(r"\.\d+", "", section)  # without the number of a stage
    known = [key.rpartition(".") for key in dict.fromkeys(_keys(Recipe))]
    if (kind, ".", name) in known:
        return ": a key of other stages"
    beside = difflib.get_close_matches(name, [key for place, _, key in known if place == kind], n=1)
    elsewhere = [place for place, _, key in known if key == name]
    meant = [f"{section}.{key}" for key in beside] or [f"{place}.{name}" for place in elsewhere[:1]]
    return f": did you mean {meant[0].removeprefix('.')}?" if meant else ""


def _keys(section: type[Section], before: str = "") -> Iterator[str]:
    """Every key of a section and of those in it, from the top: `convert.rope.linear`."""
    for name, field in section.model_fields.items():
        yield f"{before}{name}"
        for part in _parts(field.annotation):
            yield from _keys(part, f"{before}{name}.")


def _parts(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r}: expected KEY=VALUE")
    *parents, last = key.split(".")
    node: Any = data
    for part, below in pairwise([*parents, last]):
        if below.isdecimal() and isinstance(node, dict) and part not in node:
            raise RecipeError(f"--set {key}: the recipe leaves {part} out: set the whole list")
        node = _child(node, part, key)
    if isinstance(node, list):
        node[_position(node, last, key)] = _value(f"--set {key}", text)
    elif isinstance(node, dict):
        node[last] = _value(f"--set {key}", text)
    else:
        raise RecipeError(f"--set {key}: there is nothing below {'.'.join(parents)}")


def _value(label: str, text: str) -> Any:
    if text.startswith("*"):
        return text  # a glob pattern; in YAML it would be a reference
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        hint = "; write a pattern that begins with * in quotes" if "alias" in str(error) else ""
        raise RecipeError(f"{label}: not valid YAML: {' '.join(str(error).split())}{hint}") from error


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, key)]
    if isinstance(node, dict):
        if isinstance(node.get(part), str):
            raise RecipeError(f"--set {key}: {part} is {node[part]!r} here, which has no keys: set it as a whole")
        if not isinstance(node.get(part), dict | list):
            node[part] = {}  # a default section that the file leaves out; the check that follows knows its keys
        return node[part]
    raise RecipeError(f"--set {key}: there is nothing below the key before {part!r}")


def _position(items: list[Any], part: str, key: str) -> int:
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    named = [index for index, item in enumerate(items) if isinstance(item, dict) and item.get("stage") == part]
    if len(named) > 1:
        numbers = " or ".join(map(str, named))
        raise RecipeError(f"--set {key}: there are {len(named)} stages {part!r}: say {numbers} instead of {part!r}")
    if not named:
        kinds = dict.fromkeys(str(item["stage"]) for item in items if isinstance(item, dict) and "stage" in item)
        there = f": there are {', '.join(kinds)}" if kinds else ""
        raise RecipeError(f"--set {key}: no element {part!r} in a list of {len(items)}{there}")
    return named[0]
