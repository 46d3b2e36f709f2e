"""Recipes are strict: what they say is checked, and what is wrong is named by its path."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from swapattn.errors import RecipeError
from swapattn.recipe import (
    KeepSpec,
    LocalSpec,
    Recipe,
    load_recipe,
    parse_recipe,
    recipe_folder,
    recipe_names,
    restated,
)
from swapattn.stages import AlignStage, DistillStage, LossSpec
from swapattn.text import TextMixture, TextSpec

ALIGN = {"stage": "align", "tokens": 4096, "length": 64, "batch": 4, "learning_rate": 1e-3}
LOGITS = {"stage": "distill", "tokens": 256, "length": 32, "batch": 2, "learning_rate": 1e-2}


def recipe(**sections):
    return parse_recipe({"name": "mine", **sections})


def with_stage(**changes):
    return recipe(distill={"stages": [{**ALIGN, **changes}]})


def test_every_shipped_recipe_is_valid_and_named_after_its_file():
    names = recipe_names()
    assert {"short", "smoke"} <= set(names)
    assert sorted(path.stem for path in recipe_folder().glob("*.yaml")) == names
    for name in names:
        loaded = load_recipe(name)
        assert loaded.name == name
        assert loaded.summary


def test_the_folder_of_a_checkout_is_the_top_level_one():
    assert recipe_folder() == Path(__file__).resolve().parent.parent / "recipes"


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_reads_back_to_the_same_value(name, tmp_path):
    file = tmp_path / "resolved.yaml"
    original = load_recipe(name)
    file.write_text(original.to_yaml(), encoding="utf-8")
    assert load_recipe(str(file)) == original
    assert parse_recipe(original.to_dict()) == original


@pytest.mark.parametrize(
    ("sections", "path"),
    [
        ({"convrt": {}}, "unknown key convrt: did you mean convert?"),
        ({"convert": {"feature_mpa": "silu"}}, "unknown key convert.feature_mpa: did you mean convert.feature_map?"),
        ({"convert": {"local": {"window": 8, "sink": 1}}}, "unknown key convert.local.sink"),
        ({"convert": {"decay": {"speed": 1}}}, "unknown key convert.decay.speed"),
        ({"convert": {"rope": "drop"}}, "convert.rope: expected one or more of the keys linear, kept"),
        (
            {"distill": {"text": {"embedded": True, "colum": "x"}}},
            "distill.text.colum: did you mean distill.text.column?",
        ),
        ({"distill": {"stages": [{**ALIGN, "lr": 1}]}}, "unknown key distill.stages.0.lr"),
        ({"eval": {"task": ["piqa"]}}, "unknown key eval.task: did you mean eval.tasks?"),
        ({"keep_softmax": [0]}, "unknown key keep_softmax: did you mean convert.keep_softmax?"),
        (
            {"distill": {"stages": [{**ALIGN, "lenght": 8}]}},
            "did you mean distill.stages.0.length?",
        ),
        (
            {"distill": {"stages": [{**ALIGN, "losses": {}}]}},
            "unknown key distill.stages.0.losses: a key of other stages",
        ),
        ({"distill": {"stages": [{"align": {}}]}}, "distill.stages.0: say stage: calibrate, align, distill or extend"),
        ({"distill": {"stages": [{**ALIGN, "stage": "a"}]}}, "distill.stages.0: say stage: calibrate, align"),
    ],
)
def test_an_unknown_key_is_named_with_its_path(sections, path):
    with pytest.raises(RecipeError, match=re.escape(path)):
        recipe(**sections)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"convert": {"normalizer": "sum", "feature_map": "identity"}}, "normalizer 'sum'"),
        ({"convert": {"normalizer": "sum", "feature_map": "silu"}}, "normalizer 'rms'"),
        ({"convert": {"feature_map": "cosine"}}, "convert.feature_map"),
        ({"convert": {"qk_norm": "layer"}}, "convert.qk_norm"),
        ({"convert": {"rope": {"kept": "drop"}}}, "rope.kept: drop is about the layers that stay softmax"),
        ({"convert": {"rope": {"linear": "no"}}}, "convert.rope.linear"),
        ({"convert": {"keep_softmax": {"count": 2, "share": 0.5}}}, "convert.keep_softmax: say exactly one of"),
        ({"convert": {"keep_softmax": {"first": 1}}}, "convert.keep_softmax: say exactly one of"),
        ({"convert": {"keep_softmax": {"cuont": 1}}}, "unknown key convert.keep_softmax.cuont"),
        ({"convert": {"keep_softmax": ["one"]}}, "convert.keep_softmax.0"),
        ({"convert": {"keep_softmax": "all"}}, "convert.keep_softmax"),
        ({"name": "a/b"}, "name: 'a/b': folders are called after it"),
        ({"name": "../up"}, "name: '../up': folders are called after it"),
        ({"name": " "}, "name: ' ': folders are called after it"),
        ({"eval": {"tasks": "piqa"}}, 'eval.tasks: expected a list, such as ["piqa"]'),
        ({"eval": {"tasks": None}}, "eval.tasks: expected a list"),
        ({"convert": {"keep_softmax": 7}}, "convert.keep_softmax: expected a list, such as [7], or {count: 7}"),
        ({"convert": {"output_gate": "silu"}}, "convert.output_gate"),
        ({"convert": {"decay": {"schedule": "none", "gate": True}}}, "convert.decay: gate: true cannot change"),
        ({"convert": {"decay": {"schedule": "none", "learnable": True}}}, "convert.decay: learnable: true cannot"),
        ({"convert": {"decay": {"half_lives": [0]}}}, "convert.decay.half_lives.0"),
        ({"convert": {"decay": {"signed": True}}}, "signed: true is about several linear branches"),
        (
            {"convert": {"normalizer": "rms", "local": None, "decay": {"half_lives": [3]}}},
            "decay.half_lives needs the sum of weights",
        ),
        ({"convert": {"local": {"window": 0}}}, "convert.local.window"),
        ({"convert": {"local": {"share": 1.0}}}, "convert.local.share"),
        ({"distill": {"text": {"embedded": True, "hub": "a/b"}}}, "exactly one"),
        ({"distill": {"text": {}}}, "exactly one"),
        ({"distill": {"stages": [{"stage": "wander"}]}}, "distill.stages.0"),
        ({"distill": {"stages": [{"stage": "align"}]}}, "distill.stages.0.tokens"),
        (
            {"distill": {"stages": [{**LOGITS, "teacher": {"logits": name}} for name in ("kept", "./kept/")]}},
            "two stages",
        ),
        ({"eval": {"limit": 0}}, "eval.limit"),
        ({"distill": {"seed": -1}}, "distill.seed"),
        ({"distill": {"text": [{"files": ["a.txt"], "weight": float("inf")}]}}, "distill.text.0.weight"),
    ],
)
def test_a_bad_or_contradictory_value_is_named(sections, words):
    with pytest.raises(RecipeError) as caught:
        recipe(**sections)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batch": 3}, "micro_batch 3 does not divide batch 4"),
        ({"train": "all"}, "backbone_learning_rate"),
        ({"tokens": 100}, "less than one step"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"warmup": 1.0}, "warmup"),
    ],
)
def test_stages_that_cannot_run_are_refused(changes, words):
    with pytest.raises(RecipeError) as caught:
        with_stage(**changes)
    assert words in str(caught.value)


def test_steps_are_what_the_tokens_pay_for():
    stage = with_stage(tokens=4096 + 255).distill.stages[0]
    assert isinstance(stage, AlignStage)
    assert stage.steps == 16


def test_a_recipe_cannot_be_changed():
    loaded = load_recipe("short")
    with pytest.raises(ValidationError, match="frozen"):
        loaded.name = "other"


@pytest.mark.parametrize(
    ("written", "spec"),
    [
        ("embedded", TextSpec(embedded=True)),
        ("notes/*.txt", TextSpec(files=("notes/*.txt",))),
        ({"hub": "a/b", "config": "c"}, TextSpec(hub="a/b", config="c")),
    ],
)
def test_text_can_be_written_short(written, spec):
    assert recipe(distill={"text": written}).distill.text == spec


def test_text_describes_itself():
    assert TextSpec(embedded=True).describe() == "embedded"
    assert TextSpec(hub="a/b", config="c").describe() == "hub:a/b/c"
    assert TextSpec(files=("x.txt", "y.jsonl")).describe() == "x.txt y.jsonl"


def test_a_recipe_that_is_read_already_takes_overrides_too():
    loaded = recipe(distill={"stages": [ALIGN]})
    assert load_recipe(loaded) == loaded
    assert load_recipe(loaded, ["distill.stages.align.tokens=512"]) == with_stage(tokens=512)
    with pytest.raises(RecipeError, match=r"recipe mine: unknown key convert\.fast"):
        load_recipe(loaded, ["convert.fast=true"])


def override(*settings: str) -> Recipe:
    return load_recipe("smoke", settings)


def test_overrides_reach_every_level():
    changed = override(
        "convert.feature_map=softmax",
        "convert.local={window: 7, sinks: 0}",
        "convert.keep_softmax=[0, -1]",
        "distill.stages.align.learning_rate=0.5",
        "distill.stages.2.temperature=2",
        "distill.text=my.txt",
        "convert.decay.schedule=retnet",
    )
    assert changed.convert.feature_map == "softmax"
    assert changed.convert.local == LocalSpec(window=7, sinks=0)
    assert changed.convert.keep_softmax == (0, -1)
    assert changed.distill.stages[1].learning_rate == 0.5
    assert changed.distill.stages[2].temperature == 2
    assert changed.distill.text == TextSpec(files=("my.txt",))
    assert changed.convert.decay.schedule == "retnet"


@pytest.mark.parametrize("written", ["1e6", "1E+06", "1.0e6", "10e5", "1_000_000"])
def test_a_whole_number_may_have_an_exponent(written, tmp_path):
    assert override(f"distill.stages.align.tokens={written}").distill.stages[1].tokens == 10**6
    stage = f"{{stage: align, tokens: {written}, learning_rate: 1e-3}}"
    (tmp_path / "a.yaml").write_text(f"distill: {{text: 1e6.txt, stages: [{stage}]}}")
    found = load_recipe(str(tmp_path / "a.yaml")).distill
    assert (found.stages[0].tokens, found.stages[0].learning_rate) == (10**6, 1e-3)
    assert found.text == TextSpec(files=("1e6.txt",))
    with pytest.raises(RecipeError, match="fractional part"):
        override("distill.stages.align.tokens=1.5e-1")


def test_a_text_may_be_several_with_weights():
    changed = override(
        "distill.text=[embedded, {hub: some/set, weight: 3}]",
        "distill.text.0=my.txt",
        "distill.stages.1.text=[a.jsonl]",
    )
    assert changed.distill.text == TextMixture.model_validate(["my.txt", {"hub": "some/set", "weight": 3}])
    assert [(spec.describe(), share) for spec, share in changed.distill.text.parts] == [
        ("my.txt", 0.25),
        ("hub:some/set", 0.75),
    ]
    assert changed.distill.stages[1].text == TextMixture.model_validate(["a.jsonl"])
    assert Recipe.model_validate(yaml.safe_load(changed.to_yaml())) == changed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[embedded, {files: [a], weight: 0}]", r"distill\.text\.1\.weight: Input should be greater than 0"),
        ("[{hubb: a}]", r"unknown key distill\.text\.0\.hubb"),
        ("[{embedded: true, hub: a}]", r"distill\.text\.0: say exactly one of"),
        ("[{files: [a], split: test}]", r"distill\.text\.0: config and split go with hub"),
        ("{embedded: true, column: body}", r"distill\.text: column goes with hub or files"),
        ("{files: [a], weight: 2}", r"unknown key distill\.text\.weight"),
        ("[]", r"distill\.text: name at least one text"),
        ("3", r"distill\.text: "),
    ],
)
def test_a_wrong_mixture_is_named_by_its_key(text, words):
    with pytest.raises(RecipeError, match=words):
        override(f"distill.text={text}")


def test_a_kind_of_stage_that_comes_twice_is_overridden_by_number():
    stages = [{**ALIGN, "tokens": 64, "length": 32, "batch": 2}] * 2
    twice = f"distill.stages={json.dumps([*stages, {'stage': 'extend', 'tokens': 32768}])}"
    with pytest.raises(RecipeError, match=r"--set distill\.stages\.align\.tokens: .* say 0 or 1 instead of 'align'"):
        override(twice, "distill.stages.align.tokens=128")
    changed = override(twice, "distill.stages.1.tokens=128", "distill.stages.extend.tokens=65536")
    assert [stage.tokens for stage in changed.distill.stages] == [64, 128, 65536]


def test_extend_has_defaults_of_its_own():
    found = override("distill.stages=[{stage: extend, tokens: 32768}]").distill.stages[0]
    assert isinstance(found, DistillStage)
    assert (found.document_mask, found.train, found.length, found.steps) == (True, "all", 4096, 1)
    assert found.losses == LossSpec(cross_entropy=0.9, forward_kl=0.1)


def test_kept_layers_may_be_a_number_and_survive_yaml():
    changed = override("convert.keep_softmax={share: 0.25, first: 1}")
    assert changed.convert.keep_softmax == KeepSpec(share=0.25, first=1)
    assert Recipe.model_validate(yaml.safe_load(changed.to_yaml())) == changed


def test_an_older_recipe_is_restated_with_the_keys_that_came_since():
    now = load_recipe("short").to_dict()
    old = json.loads(json.dumps(now))
    del old["convert"]["decay"]["signed"]
    assert restated(old) == now
    assert restated({**old, "gone": 1}) == {**old, "gone": 1}


def test_an_override_may_switch_the_local_branch_off():
    assert override("convert.local=null").convert.local is None


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("convert.feature_mpa=silu", "unknown key convert.feature_mpa"),
        ("nothing=1", "unknown key nothing"),
        ("convert.feature_map", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
        ("distill.stages.extend.tokens=1", "no element 'extend' in a list of 3: there are calibrate, align, distill"),
        ("distill.stages.9.tokens=1", "no element '9'"),
        ("distill.text=[*.jsonl]", "write a pattern that begins with * in quotes"),
        ("distill.text.column=body", "--set distill.text.column: text is 'embedded' here, which has no keys"),
        ("distill.seed=often", "distill.seed"),
        (
            "convert.decay.half_lives.0=3",
            "convert.decay.half_lives.0: the recipe leaves half_lives out: set the whole list",
        ),
    ],
)
def test_a_bad_override_is_named(setting, words):
    with pytest.raises(RecipeError) as caught:
        override(setting)
    assert words in str(caught.value)


def test_a_recipe_that_does_not_exist_offers_near_matches():
    with pytest.raises(RecipeError, match="did you mean short"):
        load_recipe("shrt")
    with pytest.raises(RecipeError, match="there are: "):
        load_recipe("qqqqqqqq")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1", "not valid YAML"),
        (b"distill:\n  text: embedded\n  text: a.txt", "key text comes twice"),
        (b"- 1", "keys and values"),
        (b"", "keys"),
        (b"\xff", r"broken\.yaml cannot be read as UTF-8"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(content, words, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(str(file))
    assert "\n" not in str(caught.value)


def test_a_file_without_a_name_is_named_after_itself(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"convert": {"feature_map": "elu1"}}), encoding="utf-8")
    assert load_recipe(str(file)).name == "mine"


def test_a_pattern_is_a_value_and_broken_yaml_an_error_of_the_recipe():
    assert load_recipe("smoke", ["distill.text=*.jsonl"]).distill.text.files == ("*.jsonl",)
    with pytest.raises(RecipeError, match=r"--set convert\.keep_softmax: not valid YAML"):
        load_recipe("smoke", ["convert.keep_softmax=[0"])


def test_losses_are_weights_and_old_recipes_mean_forward_kl():
    stage = {"stage": "distill", "tokens": 10**6, "learning_rate": 1e-3}
    weights = lambda losses: {k: v for k, v in losses.model_dump().items() if v and k != "beta"}  # noqa: E731
    (plain,) = parse_recipe({"name": "x", "distill": {"stages": [stage]}}).distill.stages
    assert weights(plain.losses) == {"forward_kl": 1.0}
    mixed = parse_recipe(
        {"name": "x", "distill": {"stages": [{**stage, "losses": {"jsd": 0.9, "cross_entropy": 0.1}}]}}
    )
    assert weights(mixed.distill.stages[0].losses) == {"jsd": 0.9, "cross_entropy": 0.1}
    assert parse_recipe(mixed.to_dict()) == mixed
    for wrong, message in (({"beta": 0.3}, "give a weight"), ({"kl": 1}, "unknown key"), ({"jsd": -1}, "greater than")):
        with pytest.raises(RecipeError, match=message):
            parse_recipe({"name": "x", "distill": {"stages": [{**stage, "losses": wrong}]}})
