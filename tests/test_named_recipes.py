"""Every named recipe runs from conversion to a distilled model that loads, on a tiny model and a few tokens."""

from __future__ import annotations

import json
import re

import pytest
import torch

from swapattn.attention import swaps
from swapattn.conversion import convert
from swapattn.distillation import distill
from swapattn.loading import load
from swapattn.recipe import load_recipe, parse_recipe, recipe_folder, recipe_names, recipe_text
from swapattn.stages import CalibrateStage

LENGTH, BATCH = 160, 2  # longer than the windows
BUDGETS = {"short": 40e6, "standard": 100e6, "long": 701e6}  # tokens of all stages


def tiny(name):
    """The recipe with two steps a stage on the embedded text, and nothing compiled."""
    values = load_recipe(name).to_dict()
    values["distill"]["text"] = "embedded"
    for stage in values["distill"]["stages"]:
        stage |= {"length": LENGTH, "tokens": 2 * BATCH * LENGTH}
        if stage["stage"] != "calibrate":
            stage |= {"batch": BATCH, "compile": False, "text": None}
            stage["micro_batch"] = stage["micro_batch"] and 1
    return parse_recipe(values)


# `standard`, its forms and those of `long` differ from `short`, its forms and `long` in tokens only, and `radlads` and
# `halo` are made of the parts of others.
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name.startswith(("standard", "long-", "radlads", "halo")) else name
    for name in recipe_names()
]


@pytest.mark.parametrize("name", NAMES)
def test_every_named_recipe_runs(name, tiny_teacher, tmp_path):
    recipe = tiny(name)
    made = convert(tiny_teacher, tmp_path / "c", recipe=recipe)
    settled = {"keep_softmax": made.plan.spec.keep_softmax, "rope": made.plan.spec.rope}
    assert made.plan.spec == load_recipe(name).convert.model_copy(update=settled)
    assert (made.plan.spec.rope.linear == "drop") == (load_recipe(name).convert.rope.linear != "keep")
    assert (made.plan.spec.local is None) == (name.endswith("-pure") or name in ("radlads", "halo"))
    assert bool(made.plan.keep) == (name.endswith("-hybrid") or name == "halo")
    found = distill(made.path, recipe=recipe, output=tmp_path / "d", device="cpu")
    assert [stage["stage"] for stage in found.stages] == [stage.stage for stage in recipe.distill.stages]
    model, _ = load(found.path)
    assert len(swaps(model)) == 2 - len(made.plan.keep)
    ids = torch.arange(2, 2 + LENGTH)[None]
    with torch.no_grad():
        before, after = (load(path)[0](input_ids=ids).logits for path in (made.path, found.path))
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
    record = json.loads((found.path / "swapattn.json").read_text())
    assert record["recipe"]["name"] == name


@pytest.mark.parametrize("name", recipe_names())
def test_a_named_recipe_opens_with_its_command_and_keeps_to_its_budget(name):
    first = (recipe_folder() / f"{name}.yaml").read_text().splitlines()[0]
    assert first == recipe_text(name).splitlines()[0]
    assert first.startswith("# swapattn convert ")
    assert " && swapattn eval" in first
    if re.match("short|smoke", name) is None or "-" in name:
        assert f"convert {first.split()[3]} --recipe {name} " in first, "the conversion is that of the recipe"
    tokens = sum(stage.tokens for stage in load_recipe(name).distill.stages if not isinstance(stage, CalibrateStage))
    budget = BUDGETS.get(name.partition("-")[0])
    assert budget is None or tokens <= budget
