"""LoRA: where the adapters go, who the teacher is, what the merged checkpoint holds."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import swapattn.distillation
import swapattn.progress
from swapattn.cache import CACHE
from swapattn.checkpoint import read
from swapattn.conversion import convert
from swapattn.distillation import distill
from swapattn.errors import RecipeError
from swapattn.lora import adapters_off, inject_, merge_, target_paths
from swapattn.objectives import distill_loss
from swapattn.optimizer import trainable_parameters
from swapattn.recipe import ConvertSpec, parse_recipe
from swapattn.stages import DistillStage
from swapattn.surgery import apply_, plan
from swapattn.verification import verify

MATRICES = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"c_attn", "c_proj"},
    "gpt_neox": {"query_key_value", "dense"},
    "phi3": {"qkv_proj", "o_proj"},
    "bloom": {"query_key_value", "dense"},
}
STAGE = {"stage": "distill", "tokens": 320, "length": 32, "batch": 2, "learning_rate": 1e-2, "chunk": 20}
LORA = {**STAGE, "train": "lora", "backbone_learning_rate": 5e-2, "lora": {"rank": 3, "alpha": 6}}


def stage(**values):
    return DistillStage.model_validate({**LORA, **values})


def swapped(model, **values):
    apply_(model, plan(model.config, ConvertSpec.model_validate({"local": {"window": 6, "sinks": 2}, **values})))
    return model


def ids_of(rows, length):
    return torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(3))


def perturbed(model):
    """Adapters that do something, as after training."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", MATRICES)
def test_by_default_every_matrix_of_the_swapped_layers_gets_an_adapter(tiny_family, name):
    overrides = {"n_layer": 3, "n_head": 4} if name == "bloom" else {}
    model = swapped(tiny_family(name, **overrides), keep_softmax=(1,))
    found = target_paths(model, stage())
    owners = {path.rpartition(".")[0] for path in found}
    assert len(owners) == 2
    assert not any(".1." in owner for owner in owners), "the kept layer"
    assert {path.rpartition(".")[2] for path in found} == MATRICES[name]


@pytest.mark.parametrize("name", MATRICES)
def test_merged_the_model_computes_what_it_did_with_adapters(tiny_family, name):
    overrides = {"n_layer": 3, "n_head": 4} if name == "bloom" else {}
    model = swapped(tiny_family(name, **overrides))
    plain = {n: p.detach().clone() for n, p in model.named_parameters()}
    paths = target_paths(model, stage())
    ids = ids_of(2, 15)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        inject_(model, stage())
        assert torch.equal(model(input_ids=ids).logits, before), "B starts at 0"
        with_adapters = perturbed(model)(input_ids=ids).logits
        assert not torch.allclose(with_adapters, before, atol=1e-2)
        with adapters_off(model):
            assert torch.equal(model(input_ids=ids).logits, before)
        pairs = {p: [model.get_submodule(f"{p}.lora_{x}.default").weight.clone() for x in "AB"] for p in paths}
        assert sorted(merge_(model)) == sorted(f"{path}.weight" for path in paths)
        assert torch.allclose(model(input_ids=ids).logits, with_adapters, atol=1e-4)
    assert dict(model.named_parameters()).keys() == plain.keys()
    for path, (a, b) in pairs.items():
        delta = 2.0 * (b @ a)
        expected = plain[f"{path}.weight"] + (delta.T if name == "gpt2" else delta)
        assert torch.equal(model.get_submodule(path).weight, expected)
    assert merge_(model) == []


def test_what_is_merged_is_gone_for_the_next_adapters(tiny_family, recwarn):
    model = swapped(tiny_family("llama"))
    before = set(vars(model))
    for _ in range(2):
        inject_(model, stage())
        merge_(model)
    assert set(vars(model)) == before
    assert not any("peft_config" in str(warning.message) for warning in recwarn)


@torch.no_grad()
def test_peft_trains_and_saves_whole_swaps_beside_its_adapters(tiny_family, tmp_path):
    """As `modules_to_save` asks it to: it wraps each of them."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["swap"], task_type="CAUSAL_LM")
    model, ids = swapped(tiny_family("llama"), keep_softmax=(1,), output_gate="head"), ids_of(2, 15)
    before = model(input_ids=ids).logits
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(adapted(input_ids=ids).logits, before)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "log_slope" not in name:
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    found = adapted(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(found, before, atol=1e-2)
    with adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=ids).logits, before)
    first = adapted(input_ids=ids[:, :9], use_cache=True)
    second = adapted(input_ids=ids[:, 9:], **{CACHE: first[CACHE]}).logits
    assert torch.allclose(torch.cat((first.logits, second), 1), found, atol=1e-4)
    adapted.save_pretrained(tmp_path / "adapter")
    again = swapped(tiny_family("llama"), keep_softmax=(1,), output_gate="head")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").merge_and_unload()
    assert torch.allclose(again(input_ids=ids).logits, found, atol=1e-4)


def test_the_teacher_is_the_model_without_adapters(tiny_family):
    model, teacher = swapped(tiny_family("llama")), tiny_family("llama")
    inject_(model, stage())
    perturbed(model)
    ids = ids_of(2, 17)
    own = distill_loss(model, ids, stage=stage(), teacher=None)
    other = distill_loss(model, ids, stage=stage(), teacher=teacher)
    assert float(own.detach()) == pytest.approx(float(other.detach()), rel=1e-5)
    own.backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in model.named_parameters() if ".lora_" in name} <= gradients


def test_a_lora_stage_trains_new_parameters_and_adapters(tiny_family):
    model = swapped(tiny_family("llama"))
    inject_(model, stage())
    new, own = trainable_parameters(model, stage())
    assert all(".swap." in name for name in new)
    assert len(own) == 3 * 4 * 2
    assert all(".lora_" in name for name in own)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "base_layer" in name)


def test_targets_are_endings_of_module_names(tiny_family):
    model = swapped(tiny_family("llama"))
    found = target_paths(model, stage(lora={"targets": ["q_proj", "mlp.up_proj"]}))
    assert {path.rpartition(".")[2] for path in found} == {"q_proj", "up_proj"}
    with pytest.raises(RecipeError, match=r"distill\.stages\.distill\.lora\.targets: no matrix 'wq'; there are: down"):
        target_paths(model, stage(lora={"targets": ["q_proj", "wq"]}), "distill")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": {"rank": 0}}, r"lora\.rank"),
        ({"lora": {"targets": []}}, r"lora\.targets"),
        ({"lora": {"r": 8}}, r"unknown key .*lora\.r"),
        ({"train": "all", "lora": {"rank": 4}}, "lora goes with train: lora"),
        ({"backbone_learning_rate": 0}, "train: lora needs a backbone_learning_rate"),
        ({"learning_rates": {"lora": 0}}, "trains no adapter: say train: new"),
    ],
)
def test_what_contradicts_itself_is_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"name": "x", "distill": {"stages": [{**LORA, **values}]}})


def recipe(*stages):
    convert_section = {"local": {"window": 8, "sinks": 2}}
    return parse_recipe({"name": "lora", "convert": convert_section, "distill": {"stages": list(stages)}})


@pytest.fixture
def converted(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return convert(tiny_teacher, tmp_path / "c", recipe=recipe()).path


def tensors(folder):
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "train.jsonl").read_text().splitlines()]


def test_a_crash_at_any_step_of_a_lora_stage_and_the_one_after_it(converted, tmp_path, monkeypatch):
    """The adapters go on where they were; the stage behind them needs the teacher, which the weights no longer are."""
    what = recipe(LORA, {**STAGE, "tokens": 128})
    teachers = []
    load_teacher = swapattn.distillation.load_teacher
    monkeypatch.setattr(
        swapattn.distillation, "load_teacher", lambda *args, **kw: teachers.append(args[0]) or load_teacher(*args, **kw)
    )
    whole = distill(converted, recipe=what, output=tmp_path / "whole", device="cpu").path
    assert len(teachers) == 1, "only the second stage has a separate teacher"
    assert losses(whole)[4] < losses(whole)[0]
    trained = set(read(whole).record["trained"])
    matrices = {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in range(2) for x in "qkvo"}
    assert matrices <= trained
    assert not any("lora" in name for name in (*trained, *tensors(whole)))
    changed = {name for name, value in tensors(whole).items() if not torch.equal(value, tensors(converted)[name])}
    assert changed == trained
    monkeypatch.setattr(swapattn.progress, "SAVE_SECONDS", -1)
    original = swapattn.progress.StageProgress.on_pre_optimizer_step

    def crash(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 3 and self.run == "stage-0":
            raise KeyboardInterrupt

    monkeypatch.setattr(swapattn.progress.StageProgress, "on_pre_optimizer_step", crash)
    with pytest.raises(KeyboardInterrupt):
        distill(converted, recipe=what, output=tmp_path / "out", device="cpu")
    monkeypatch.setattr(swapattn.progress.StageProgress, "on_pre_optimizer_step", original)
    found = distill(converted, recipe=what, output=tmp_path / "out", device="cpu").path
    assert losses(found) == pytest.approx(losses(whole), abs=1e-6)
    for key, value in tensors(whole).items():
        assert torch.allclose(tensors(found)[key], value, rtol=0, atol=1e-6), key
    rows = {row.name: row for row in verify(found, reload=False).rows}
    assert rows["weights"].passed, rows["weights"].detail
    assert rows["weights"].detail.endswith("8 listed as trained")
    assert all(row.passed for row in rows.values())


def test_a_dry_run_counts_the_adapters_and_no_second_model(converted, monkeypatch):
    monkeypatch.setattr("swapattn.estimate._free_bytes", lambda device: 1000)
    lora, plain, after = distill(converted, recipe=recipe(LORA, STAGE, STAGE), device="cpu", dry_run=True).stages
    # q and o are 32 x 32, k and v 16 x 32, in two layers
    adapters = 2 * 3 * (2 * 64 + 2 * 48)
    assert lora["trainable_parameters"] - plain["trainable_parameters"] == adapters
    assert after["memory_bytes"] == plain["memory_bytes"], "both have changed weights before them"
    model = 4 * sum(value.numel() for value in tensors(converted).values())
    assert lora["memory_bytes"] == model + 4 * adapters + 12 * lora["trainable_parameters"]


def test_activations_that_are_computed_again_have_the_adapters_on(tiny_family):
    found = []
    for checkpointing in (False, True):
        model = swapped(tiny_family("llama"))
        inject_(model, stage())
        trainable_parameters(perturbed(model), stage())
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        distill_loss(model, ids_of(2, 17), stage=stage(), teacher=None).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-4, atol=1e-7), name
