"""Checkpoints that load as what they are, in swapattn and in plain transformers, or not at all."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from every_type import tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer

from swapattn.attention import only_branch, swaps
from swapattn.checkpoint import find, read
from swapattn.conversion import convert
from swapattn.errors import CheckpointError, UsageError
from swapattn.families import tiny_config
from swapattn.loading import load, load_teacher
from swapattn.modeling import KERNEL_RUNTIME, RUNTIME, SCHEMA_VERSION
from swapattn.recipe import ConvertSpec
from swapattn.shards import INDEX, NEW_SHARD
from swapattn.surgery import apply_, plan

SPEC = ["convert.local={window: 5, sinks: 2}"]
PROMPT = [[17, 40, 33, 250, 81, 9, 77, 120, 64]]


@pytest.fixture(scope="module")
def checkpoint(tiny_teacher, tmp_path_factory):
    return convert(tiny_teacher, tmp_path_factory.mktemp("out") / "c", recipe="smoke", overrides=SPEC).path


@pytest.fixture
def copied(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@torch.no_grad()
def logits_of(model):
    return model(input_ids=torch.tensor(PROMPT)).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "qwen3", "phi3", "gpt_neox", "opt", "mistral"])
def test_save_and_reload_changes_no_logit(tiny_family, tmp_path, name):
    tiny_family(name).save_pretrained(tmp_path / "t")
    overrides = [*SPEC, "convert.keep_softmax=[1]"]
    model, _ = load(convert(tmp_path / "t", tmp_path / "c", recipe="smoke", overrides=overrides).path)
    for swap in swaps(model).values():
        for parameter in swap.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "again")
    again, _ = load(tmp_path / "again")
    assert torch.equal(logits_of(again), expected)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(auto) is type(model)
    assert torch.equal(logits_of(auto), expected)


def test_what_a_model_saves_itself_is_told_from_a_checkpoint(checkpoint, tmp_path):
    load(checkpoint)[0].save_pretrained(tmp_path / "again")
    with pytest.raises(UsageError, match=r"again was written by a converted model's save_pretrained, without swapattn"):
        read(tmp_path / "again")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_swaps_of_a_model_made_anew_are_not_rounded(checkpoint, dtype):
    made = AutoModelForCausalLM.from_config(load(checkpoint)[0].config, dtype=dtype)
    assert made.get_input_embeddings().weight.dtype == dtype
    found = {parameter.dtype for swap in swaps(made).values() for parameter in swap.parameters()}
    assert found == {torch.promote_types(dtype, torch.float32)}


def test_the_tokenizer_comes_along(checkpoint, tiny_tokenizer, copied):
    _, tokenizer = load(checkpoint)
    assert tokenizer("Call me Ishmael")["input_ids"] == tiny_tokenizer("Call me Ishmael")["input_ids"]
    for path in copied.glob("tokenizer*"):
        path.unlink()
    assert load(copied)[1] is None


@pytest.mark.parametrize(
    ("kind", "settings", "found"),
    [
        ("phi3", {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<eos>"}, "TokenizersBackend"),  # as on the hub
        ("gpt2", {"model_max_length": 1024}, "GPT2Tokenizer"),
        ("gpt2", None, "GPT2Tokenizer"),
    ],
    ids=["of-another-class", "of-no-class", "without-settings"],
)
def test_the_tokenizer_is_of_the_class_that_the_teachers_type_gives_it(tiny_family, tmp_path, kind, settings, found):
    tiny_family(kind).save_pretrained(tmp_path / "t")
    words = Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1, "call": 2, "me": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.save(str(tmp_path / "t" / "tokenizer.json"))
    if settings is not None:
        (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(settings))
    teacher = AutoTokenizer.from_pretrained(tmp_path / "t")
    _, tokenizer = load(convert(tmp_path / "t", tmp_path / "c", recipe="smoke").path)
    assert type(tokenizer) is type(teacher)
    assert type(tokenizer).__name__ == found
    assert tokenizer("call me").input_ids == teacher("call me").input_ids
    assert tokenizer.eos_token == teacher.eos_token is not None


def test_all_chat_templates_come_along(tiny_family, tiny_tokenizer, tmp_path):
    tiny_family("llama").save_pretrained(tmp_path / "t")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "t")
    found = load(convert(tmp_path / "t", tmp_path / "c", recipe="smoke").path)[1]
    assert found.chat_template == tokenizer.chat_template


def test_a_shard_that_is_none_is_a_checkpoint_error(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "c")
    (tmp_path / "c" / "teacher.safetensors").unlink()
    (tmp_path / "c" / "teacher.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError):
        load(tmp_path / "c")


def test_the_teacher_is_found_or_missed_by_name(checkpoint, tiny_teacher, tmp_path):
    teacher, tokenizer = load_teacher(find(model=checkpoint))
    assert type(teacher).__name__ == "LlamaForCausalLM"
    assert tokenizer is not None
    assert not swaps(teacher)
    with pytest.raises(CheckpointError, match=r"no teacher at .*put it back"):
        load_teacher(tmp_path / "gone")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_keep_the_swaps_in_fp32(checkpoint, dtype):
    model, _ = load(checkpoint, dtype=dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".swap." in name else dtype), name
    assert torch.isfinite(logits_of(model)).all()
    assert model.generate(torch.tensor(PROMPT), max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 13)
    with only_branch(model, "linear"):
        assert torch.isfinite(logits_of(model)).all()


def test_a_bf16_teacher_gives_a_bf16_model_with_fp32_swaps(tiny_family, tmp_path):
    tiny_family("llama").to(torch.bfloat16).save_pretrained(tmp_path / "t")
    model, _ = load(convert(tmp_path / "t", tmp_path / "c", recipe="smoke").path)
    assert {p.dtype for n, p in model.named_parameters() if ".swap." in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if ".swap." not in n} == {torch.bfloat16}


def test_a_teacher_whose_config_names_no_dtype_gives_a_model_in_its_own(tiny_family, tmp_path):
    tiny_family("llama").to(torch.bfloat16).save_pretrained(tmp_path / "t")
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "t" / "config.json").write_text(json.dumps(config))
    folder = convert(tmp_path / "t", tmp_path / "c", recipe="smoke").path
    for model in (load(folder)[0], AutoModelForCausalLM.from_pretrained(folder, dtype="auto")):
        assert {p.dtype for n, p in model.named_parameters() if ".swap." not in n} == {torch.bfloat16}


def test_slopes_are_learnable_only_where_the_recipe_says_so(tiny_teacher, checkpoint, tmp_path):
    learnable = convert(tiny_teacher, tmp_path / "c", recipe="smoke", overrides=["convert.decay.learnable=true"]).path
    for folder, expected in ((checkpoint, False), (learnable, True)):
        for model in (load(folder)[0], AutoModelForCausalLM.from_pretrained(folder)):
            assert {swap.log_slope.requires_grad for swap in swaps(model).values()} == {expected}
            assert all(swap.out_scale.requires_grad for swap in swaps(model).values())


def test_choosing_another_base_implementation_keeps_the_swaps(checkpoint):
    model, _ = load(checkpoint)
    expected = logits_of(model)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "swapattn_eager"
    assert torch.allclose(logits_of(model), expected, atol=1e-5)
    with pytest.raises(ValueError, match="sdpa or eager, not flash"):
        model.set_attn_implementation("flash_attention_2")
    eager = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    assert torch.allclose(logits_of(eager), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_a_model_is_made_from_the_config_of_another(tmp_path, kind):
    tiny_model(kind).float().save_pretrained(tmp_path / "t")
    model, _ = load(convert(tmp_path / "t", tmp_path / "c", recipe="smoke", overrides=SPEC).path)
    expected, held = logits_of(model), model.config._attn_implementation
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "c", config=model.config)), expected)
    assert type(model)(model.config).config._attn_implementation == held


def broken(copied, change):
    tensors = load_file(copied / NEW_SHARD)
    weight_map = json.loads((copied / INDEX).read_text())
    change(tensors, weight_map["weight_map"])
    save_file(tensors, copied / NEW_SHARD, metadata={"format": "pt"})
    (copied / INDEX).write_text(json.dumps(weight_map))
    return refusal(copied)


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message or folder.name in message
    return message


def test_masks_that_older_versions_stored_are_no_extra_tensors(tmp_path):
    folder = tmp_path / "t"
    tiny_model("gpt_neo").float().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    names = [f"transformer.h.{i}.attn.attention.{name}" for i in range(4) for name in ("bias", "masked_bias")]
    save_file(
        tensors | {name: torch.zeros(1) for name in names}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    load_teacher(folder)
    model, _ = load(convert(folder, tmp_path / "c", recipe="smoke").path)
    assert torch.isfinite(logits_of(model)).all()


def test_a_missing_tensor_is_an_error(copied):
    def drop(tensors, weight_map):
        for name in list(tensors)[:1]:
            del tensors[name], weight_map[name]

    assert "missing" in broken(copied, drop)


def test_a_missing_tensor_of_the_teacher_is_an_error(copied):
    tensors = load_file(copied / "teacher.safetensors")
    (copied / "teacher.safetensors").unlink()  # a hard link of the teacher's own file
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, copied / "teacher.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.self_attn.k_proj.weight" in refusal(copied)


def test_an_extra_tensor_is_an_error(copied):
    def add(tensors, weight_map):
        tensors["model.layers.0.self_attn.swap.extra"] = torch.zeros(3)
        weight_map["model.layers.0.self_attn.swap.extra"] = NEW_SHARD

    assert "swap.extra" in broken(copied, add)


def test_a_tensor_of_another_shape_is_an_error(copied):
    def reshape(tensors, _):
        tensors["model.layers.0.self_attn.swap.mix"] = torch.zeros(7)

    assert "swap.mix" in broken(copied, reshape)


@pytest.mark.parametrize("name", [NEW_SHARD, "teacher.safetensors"])
def test_a_shard_that_is_cut_short_is_an_error(copied, name):
    data = (copied / name).read_bytes()
    (copied / name).unlink()
    (copied / name).write_bytes(data[:-40])
    refusal(copied)


@pytest.mark.parametrize("name", [NEW_SHARD, "teacher.safetensors"])
def test_a_missing_shard_is_an_error(copied, name):
    (copied / name).unlink()
    refusal(copied)


def test_a_newer_schema_is_an_error(copied):
    data = json.loads((copied / "config.json").read_text())
    data["swapattn"]["version"] = SCHEMA_VERSION + 1
    (copied / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="update swapattn"):
        load(copied)


def test_a_base_type_that_transformers_does_not_know_is_an_error(copied):
    data = json.loads((copied / "config.json").read_text())
    data["swapattn"]["base_model_type"] = "llama9"
    (copied / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="'llama9': update transformers"):
        load(copied)


def test_what_is_no_checkpoint_is_an_error(tiny_teacher, tmp_path):
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="convert it first"):
        load(tiny_teacher)


_BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM
folder = {folder!r}
"""
_LOAD = """
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.tensor({prompt})
with torch.no_grad():
    logits = model(input_ids=ids).logits
tokens = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
torch.save({{"logits": logits, "tokens": tokens, "module": type(model).__module__}}, {out!r})
assert ("swapattn" in sys.modules) is {importable}
"""
_SAVE = """
model.save_pretrained("again")
model.config.save_pretrained("config")
import pickle
assert torch.equal(pickle.loads(pickle.dumps(model))(input_ids=ids).logits, logits)
"""
_UNPICKLE = """
import torch
for model, ids, logits in torch.load({file!r}, weights_only=False):
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits), type(model)
    assert model.generate(ids, max_new_tokens=2, eos_token_id=None).shape[1] == ids.shape[1] + 2
"""
_REFUSED = """
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("it loaded without trust_remote_code")
"""


def run_python(code, tmp_path):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("importable", [False, True], ids=["without-swapattn", "with-swapattn"])
def test_plain_transformers_gives_the_same_logits_and_text_and_saves_such_a_folder(checkpoint, tmp_path, importable):
    blocked = () if importable else ("swapattn", "lightning_attention")
    out = tmp_path / "out.pt"
    code = _BLOCKER.format(blocked=blocked, folder=str(checkpoint))
    code += "" if importable else _REFUSED  # first: a type that was trusted once stays known in the process
    code += _LOAD.format(prompt=PROMPT, out=str(out), importable=importable)
    run_python(code + _SAVE, tmp_path)
    found = torch.load(out, weights_only=True)
    model, _ = load(checkpoint)
    assert torch.equal(logits_of(load(tmp_path / "again")[0]), found["logits"])
    named = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    for folder in (tmp_path / "again", tmp_path / "config"):
        assert json.loads((folder / "config.json").read_text())["auto_map"] == named
        assert {path.name for path in folder.glob("*.py")} == {path.name for path in checkpoint.glob("*.py")}
    ids = torch.tensor(PROMPT)
    assert torch.equal(found["logits"], logits_of(model))
    assert torch.equal(found["tokens"], model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None))
    assert len(set(found["tokens"][0, 9:].tolist())) > 3
    assert found["module"].startswith("swapattn." if importable else "transformers_modules.")


@pytest.mark.slow
def test_a_pickled_model_runs_in_a_process_that_has_made_none(checkpoint, tiny_family, tmp_path):
    """One of a checkpoint, one swapped in memory, and one whose attention modules have a class of their own."""
    model, _ = load(checkpoint)
    memory, adapted = tiny_family("llama"), AutoModelForCausalLM.from_config(tiny_config("falcon")).eval()
    for other in (memory, adapted):
        apply_(other, plan(other.config, ConvertSpec.model_validate({"local": {"window": 5, "sinks": 2}})))
    for kind in (copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))):
        for thing in (model, model.config, memory, adapted):
            assert type(kind(thing)) is type(thing)
        assert kind(model.config).to_dict() == model.config.to_dict()
    file, ids = str(tmp_path / "models.pt"), torch.tensor(PROMPT)
    torch.save([(each, ids, logits_of(each)) for each in (model, memory, adapted)], file)
    run_python(_UNPICKLE.format(file=file), tmp_path)


def test_plain_transformers_loads_a_checkpoint_with_every_option(tiny_teacher, tmp_path):
    options = ["qk_norm=rms", "decay.gate=true", "output_gate=channel", "feature_map=t2r", "keep_softmax=[1]"]
    options += ["rope={linear: drop, kept: drop}", "local={window: 5, sinks: 2}"]
    convert(tiny_teacher, tmp_path / "first", recipe="smoke", overrides=[f"convert.{option}" for option in options])
    model, _ = load(tmp_path / "first")
    for swap in swaps(model).values():
        for name, parameter in swap.named_parameters():
            if name != "log_slope":
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "c")
    out = tmp_path / "out.pt"
    code = _BLOCKER.format(blocked=("swapattn", "lightning_attention"), folder=str(tmp_path / "c"))
    run_python(code + _LOAD.format(prompt=PROMPT, out=str(out), importable=False), tmp_path)
    found = torch.load(out, weights_only=True)
    assert torch.equal(found["logits"], logits_of(model))
    ids = torch.tensor(PROMPT)
    assert torch.equal(found["tokens"], model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None))


def test_the_runtime_of_a_checkpoint_is_the_projects_own(checkpoint):
    import lightning_attention

    import swapattn

    homes = [Path(swapattn.__file__).parent, Path(lightning_attention.__file__).parent]
    copies = sorted(path for path in checkpoint.glob("*.py") if path.name != "modeling_swapattn.py")
    assert {path.name for path in copies} == {*RUNTIME, *KERNEL_RUNTIME}
    for path in copies:
        assert any(
            (home / path.name).is_file() and (home / path.name).read_text() == path.read_text() for home in homes
        )
