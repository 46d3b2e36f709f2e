"""`convert`: the teacher's tensors bit for bit, and nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MambaConfig,
    Qwen3_5ForConditionalGeneration,
)

import swapattn.shards
from swapattn.attention import swaps
from swapattn.checkpoint import read
from swapattn.conversion import convert
from swapattn.errors import CheckpointError, RecipeError, SourceError, SwapattnError, UnsupportedModelError, UsageError
from swapattn.families import tiny_config
from swapattn.loading import load, load_teacher
from swapattn.modeling import swap_classes
from swapattn.recipe import load_recipe
from swapattn.shards import INDEX, SINGLE
from swapattn.sources import _dequantise
from swapattn.surgery import plan
from swapattn.unpickling import as_safetensors

SPEC = ["convert.local={window: 5, sinks: 2, mix: joint}"]


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            found |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    return found


def assert_taken_over(teacher, folder):
    before, after = tensors(teacher), tensors(folder)
    assert before.keys() <= after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key
    new = after.keys() - before.keys()
    assert new
    assert all(".swap." in key and after[key].dtype == torch.float32 for key in new)
    model, _ = load(folder)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in after.items())


@pytest.fixture(scope="module")
def converted(tiny_teacher, tmp_path_factory):
    return convert(tiny_teacher, tmp_path_factory.mktemp("out") / "c", recipe="smoke", overrides=SPEC)


def test_every_tensor_of_the_teacher_is_bit_equal(tiny_teacher, converted):
    assert_taken_over(tiny_teacher, converted.path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3", "opt"])
def test_sharded_and_tied_teachers_are_bit_equal(tiny_family, tmp_path, name, dtype):
    teacher = tmp_path / "teacher"
    tiny_family(name, tie_word_embeddings=True).to(dtype).save_pretrained(teacher, max_shard_size="20KB")
    assert len(list(teacher.glob("*.safetensors"))) > 3
    result = convert(teacher, tmp_path / "c", recipe="smoke", overrides=SPEC)
    assert_taken_over(teacher, result.path)
    model, _ = load(result.path)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert result.kept_parameters == sum(tensor.numel() for tensor in tensors(teacher).values())


def test_symlinked_shards_are_followed(tiny_family, tmp_path):
    blobs, teacher = tmp_path / "blobs", tmp_path / "teacher"
    tiny_family("llama").save_pretrained(blobs, max_shard_size="20KB")
    teacher.mkdir()
    for path in blobs.iterdir():
        (teacher / path.name).symlink_to(path)
    result = convert(teacher, tmp_path / "c", recipe="smoke", overrides=SPEC)
    assert not any(path.is_symlink() for path in result.path.iterdir())
    shutil.rmtree(blobs)
    shutil.rmtree(teacher)
    load(result.path)


def test_shards_are_copied_where_the_file_system_cannot_link(tiny_teacher, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr("os.link", refuse)
    assert_taken_over(tiny_teacher, convert(tiny_teacher, tmp_path / "c", recipe="smoke").path)
    monkeypatch.setattr("os.copy_file_range", refuse)
    assert_taken_over(tiny_teacher, convert(tiny_teacher, tmp_path / "d", recipe="smoke").path)
    monkeypatch.setattr("os.copy_file_range", lambda *_: 0)  # as some file systems do, without an error
    assert_taken_over(tiny_teacher, convert(tiny_teacher, tmp_path / "e", recipe="smoke").path)


def test_a_single_file_gets_an_index_and_another_name(tiny_teacher, converted):
    assert (converted.path / "teacher.safetensors").samefile(tiny_teacher / "model.safetensors")
    assert not (converted.path / "model.safetensors").exists()
    weight_map = json.loads((converted.path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == {"teacher.safetensors", "swap.safetensors"}
    assert weight_map.keys() == tensors(converted.path).keys()


def test_the_record_names_teacher_recipe_and_kind(tiny_teacher, converted):
    found = read(converted.path)
    assert (found.kind, found.name) == ("converted", "tiny-llama")
    assert found.teacher_path == tiny_teacher.resolve()
    assert found.recipe == load_recipe("smoke", SPEC)
    assert found.record["trained"] == []


def test_new_parameters_are_counted(tiny_teacher, converted):
    new = tensors(converted.path).keys() - tensors(tiny_teacher).keys()
    stored = tensors(converted.path)
    assert converted.new_parameters == sum(stored[key].numel() for key in new)
    # slopes 2, scales 4 x 8, mixes 4 x (1 + 1 + 8), feature maps (4 + 2) x (8 x 8 + 2 x 8 x 16), in each of 2 layers
    assert converted.new_parameters == 2 * (2 + 32 + 40 + 1920)


def test_the_model_type_is_never_the_teachers(converted):
    data = json.loads((converted.path / "config.json").read_text())
    assert data["model_type"] == "swapattn_llama"
    assert data["architectures"] == ["SwapAttnLlamaForCausalLM"]
    assert data["swapattn"]["base_model_type"] == "llama"


def test_tokenizer_and_licence_go_along_but_no_code(tiny_teacher, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, teacher)
    for name in ("LICENSE.txt", "vocabulary.tiktoken", "spiece.model"):
        (teacher / name).write_text("licence")
    (teacher / "tokenizer_code.py").write_text("raise SystemExit")
    (teacher / "pytorch_model.bin").write_bytes(b"pickle")
    folder = convert(teacher, tmp_path / "c", recipe="smoke").path
    for name in ("LICENSE.txt", "vocabulary.tiktoken", "spiece.model"):
        assert (folder / name).read_text() == "licence"
    assert (folder / "tokenizer.json").is_file()
    assert not (folder / "tokenizer_code.py").exists()
    assert not list(folder.glob("*.bin"))


def test_a_tokenizer_of_its_vocabulary_alone_is_found_again(tiny_family, tiny_tokenizer, tmp_path):
    tiny_family("gpt2").save_pretrained(tmp_path / "t")
    tiny_tokenizer.backend_tokenizer.model.save(str(tmp_path / "t"))  # vocab.json and merges.txt
    wanted = AutoTokenizer.from_pretrained(tmp_path / "t")("Some years").input_ids
    folder = convert(tmp_path / "t", tmp_path / "c", recipe="smoke").path
    assert load(folder)[1]("Some years").input_ids == wanted


def test_dry_run_writes_nothing(tiny_teacher, tmp_path):
    result = convert(tiny_teacher, tmp_path / "c", recipe="smoke", dry_run=True)
    assert not list(tmp_path.iterdir())
    assert result.dry_run
    assert "would write" in result.to_table()
    json.dumps(result.to_dict())


def test_calibrate_sets_the_numbers_and_leaves_the_other_new_parameters(tiny_teacher, tmp_path):
    overrides = [*SPEC, "distill.stages.calibrate.tokens=512", "distill.stages.calibrate.length=128"]
    static = tensors(convert(tiny_teacher, tmp_path / "static", recipe="smoke", overrides=overrides).path)
    result = convert(tiny_teacher, tmp_path / "c", recipe="smoke", overrides=overrides, calibrate=True)
    found = tensors(result.path)
    trained = read(result.path).record["trained"]
    assert {name.rsplit(".", 1)[1] for name in trained} == {"log_slope", "out_scale", "mix", "mix_query", "mix_sum"}
    for key, tensor in found.items():
        assert torch.equal(tensor, static[key]) == (key not in trained), key
    assert_taken_over(tiny_teacher, result.path)


def refusals(tmp_path, tiny_teacher):
    empty = tmp_path / "empty"
    empty.mkdir()
    yield empty, SwapattnError, "config.json"
    for name, config in {
        "mamba": MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
        "xglm": AutoConfig.for_model("xglm", vocab_size=64, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64),
    }.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    yield tmp_path / "mamba", UnsupportedModelError, "no softmax attention"
    yield tmp_path / "xglm", UnsupportedModelError, "outside transformers' AttentionInterface"
    for name, data in {"t5": {"model_type": "t5"}, "new": {"model_type": "brand_new"}}.items():
        shutil.copytree(tiny_teacher, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(data))
    yield tmp_path / "t5", UnsupportedModelError, "encoder-decoder"
    yield tmp_path / "new", UnsupportedModelError, "does not know the model type 'brand_new'"
    shutil.copytree(tiny_teacher, tmp_path / "cut")
    weights = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    yield tmp_path / "cut", CheckpointError, "cut short"


def test_what_cannot_be_converted_is_refused_before_anything_is_written(tiny_teacher, tmp_path):
    (tmp_path / "in").mkdir()
    for model, error, message in refusals(tmp_path / "in", tiny_teacher):
        with pytest.raises(error) as caught:
            convert(model, tmp_path / "deep" / "out", recipe="smoke")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "deep").exists()


def test_a_missing_shard_is_named(tiny_family, tmp_path):
    tiny_family("llama").save_pretrained(tmp_path / "t", max_shard_size="20KB")
    shard = sorted((tmp_path / "t").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SwapattnError, match=shard.name):
        convert(tmp_path / "t", tmp_path / "out", recipe="smoke")
    assert not (tmp_path / "out").exists()


def test_a_converted_model_is_not_converted_again(converted, tmp_path):
    with pytest.raises(UnsupportedModelError, match="already converted"):
        convert(converted.path, tmp_path / "out", recipe="smoke")
    assert not list(tmp_path.iterdir())


def test_keeping_all_or_missing_layers_is_a_recipe_error(tiny_teacher, tmp_path):
    for keep in ("[0, 1]", "[2]", "[-3]"):
        with pytest.raises(RecipeError, match="keep_softmax"):
            convert(tiny_teacher, tmp_path / "out", recipe="smoke", overrides=[f"convert.keep_softmax={keep}"])
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_needs_overwrite(tiny_teacher, tmp_path):
    convert(tiny_teacher, tmp_path / "c", recipe="smoke")
    with pytest.raises(UsageError, match="exists"):
        convert(tiny_teacher, tmp_path / "c", recipe="smoke")
    convert(tiny_teacher, tmp_path / "c", recipe="smoke", overrides=["convert.local=null"], overwrite=True)
    assert read(tmp_path / "c").recipe.convert.local is None


def test_the_model_itself_is_never_overwritten(tiny_teacher, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, teacher)
    with pytest.raises(UsageError, match="is the model itself"):
        convert(teacher, teacher, recipe="smoke", overwrite=True)
    AutoModelForCausalLM.from_pretrained(teacher)


def test_a_folder_that_holds_the_model_is_never_overwritten(tiny_teacher, tmp_path):
    folder = convert(tiny_teacher, tmp_path / "c", recipe="smoke").path
    teacher = Path(shutil.copytree(tiny_teacher, folder / "original" / "teacher"))
    for dry_run in (False, True):
        with pytest.raises(UsageError, match="holds the model itself"):
            convert(teacher, folder, recipe="smoke", overwrite=True, dry_run=dry_run)
    AutoModelForCausalLM.from_pretrained(teacher)


@pytest.mark.parametrize("where", ["save_file", "copyfile", "write_json"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_ctrl_c_leaves_nothing_half_written(tiny_teacher, tmp_path, monkeypatch, where, error):
    convert(tiny_teacher, tmp_path / "old", recipe="smoke")
    before = tensors(tmp_path / "old")

    def fail(*_, **__):
        raise error

    target = shutil if where == "copyfile" else swapattn.shards
    monkeypatch.setattr(target, where, fail)
    for name in ("old", "new"):
        with pytest.raises(type(error)):
            convert(tiny_teacher, tmp_path / name, recipe="smoke", overwrite=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors(tmp_path / "old").items())
    load(tmp_path / "old")


def test_fused_experts_are_taken_over(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes))
    teacher.save_pretrained(tmp_path / "t")
    model, _ = load(convert(tmp_path / "t", tmp_path / "c", recipe="smoke").path)
    own = teacher.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in model.state_dict().items() if ".swap." not in key)


def test_the_text_model_of_a_teacher_that_also_sees_is_converted(tmp_path):
    """As it is published: weights of all parts, a config with sections, and no dtype in that of the text model."""
    config = tiny_config("qwen3_5")
    Qwen3_5ForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path / "t")
    assert "dtype" not in json.loads((tmp_path / "t" / "config.json").read_text())["text_config"]
    found = convert(tmp_path / "t", tmp_path / "c", recipe="smoke", overrides=[*SPEC, "convert.keep_softmax=[1]"])
    assert found.plan.base_model_type == plan(config, found.plan.spec).base_model_type == "qwen3_5_text"
    model, _ = load(found.path)
    assert list(swaps(model)) == ["model.layers.1.self_attn"]
    own = load_teacher(tmp_path / "t")[0].state_dict()
    mine = {key: tensor for key, tensor in model.state_dict().items() if ".swap." not in key}
    assert mine.keys() == own.keys()
    assert all(torch.equal(tensor, own[key]) and tensor.dtype == own[key].dtype for key, tensor in mine.items())
    model.save_pretrained(tmp_path / "again")
    ids = torch.arange(3, 24)[None]
    for folder in (found.path, tmp_path / "again"):
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert model.generate(ids, max_new_tokens=3, eos_token_id=None).shape == (1, 24)


def test_a_text_model_that_is_refused_is_refused_with_the_parts_around_it(tmp_path):
    (tmp_path / "config.json").write_text(tiny_config("llama4").to_json_string())
    with pytest.raises(UnsupportedModelError, match="within chunks"):
        convert(tmp_path, tmp_path / "c", recipe="smoke", dry_run=True)


def test_classes_are_made_once():
    assert swap_classes("llama") is swap_classes("llama")
    with pytest.raises(CheckpointError, match="does not know the model type 'llama9'"):
        swap_classes("llama9")


def test_every_damaged_shard_of_a_teacher_is_named_in_one_line(tiny_family, tmp_path):
    tiny_family("llama").save_pretrained(tmp_path / "t", max_shard_size="20KB")
    first, second, third = sorted((tmp_path / "t").glob("*.safetensors"))[:3]
    first.write_bytes(first.read_bytes()[:-7])
    flipped = bytearray(second.read_bytes())
    flipped[10] ^= 1
    second.write_bytes(flipped)
    header = third.read_bytes()
    third.write_bytes(header[:1] + bytes([header[1] ^ 64]) + header[2:])
    with pytest.raises(SwapattnError) as caught:
        convert(tmp_path / "t", tmp_path / "c", recipe="smoke")
    text = str(caught.value)
    assert "\n" not in text
    assert f"{first.name} is cut short" in text
    assert f"{second.name} is damaged" in text
    assert f"{third.name} is " in text
    assert not (tmp_path / "c").exists()


def test_a_folder_saved_from_a_swapped_model_is_no_teacher(tiny_teacher, converted, tmp_path):
    shutil.copytree(converted.path, tmp_path / "t")
    shutil.copyfile(tiny_teacher / "config.json", tmp_path / "t" / "config.json")
    with pytest.raises(CheckpointError, match="saved from a swapped model already"):
        convert(tmp_path / "t", tmp_path / "c", recipe="smoke")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("where", ["absolute", "../"])
def test_a_shard_outside_the_folder_is_refused_and_stays_as_it_is(tiny_family, tmp_path, where):
    teacher = tmp_path / "t"
    tiny_family("llama").save_pretrained(teacher, max_shard_size="20KB")
    shard = min(teacher.glob("*.safetensors"))
    moved = shard.rename(tmp_path / shard.name)
    before = moved.read_bytes()
    name = str(moved) if where == "absolute" else where + shard.name
    index = teacher / INDEX
    index.write_text(index.read_text().replace(shard.name, name))
    with pytest.raises(SwapattnError, match="lies outside the folder"):
        convert(teacher, tmp_path / "c", recipe="smoke")
    assert moved.read_bytes() == before
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("shards_left", [True, False])
def test_an_index_beside_a_single_file_is_passed_over_as_in_transformers(tiny_family, tmp_path, shards_left):
    tiny_family("llama").save_pretrained(tmp_path / "t", max_shard_size="20KB")
    stale = list((tmp_path / "t").glob("*.safetensors"))
    other = tiny_family("llama")
    for parameter in other.parameters():
        parameter.data.mul_(2)
    other.save_pretrained(tmp_path / "new")
    shutil.copyfile(tmp_path / "new" / SINGLE, tmp_path / "t" / SINGLE)
    for shard in stale if not shards_left else ():
        shard.unlink()
    convert(tmp_path / "t", tmp_path / "c", recipe="smoke")
    found, wanted = tensors(tmp_path / "c"), load_teacher(tmp_path / "t")[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_damaged_index_is_named(tiny_family, tmp_path):
    tiny_family("llama").save_pretrained(tmp_path / "t", max_shard_size="20KB")
    for text in ("{", "{}"):
        (tmp_path / "t" / INDEX).write_text(text)
        with pytest.raises(SwapattnError, match=f"{INDEX} is damaged"):
            convert(tmp_path / "t", tmp_path / "c", recipe="smoke")


def pickled(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_pickled_weights_are_read_only_when_allowed(tiny_family, tmp_path, monkeypatch):
    monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path / "cache"))
    model = tiny_family("llama")
    folder = pickled(model, tmp_path / "t")
    with pytest.raises(SwapattnError, match=r"pickled weights only \(pytorch_model.bin\).*--allow-pickle"):
        convert(folder, tmp_path / "c", recipe="smoke", overrides=SPEC)
    convert(folder, tmp_path / "c", recipe="smoke", overrides=SPEC, allow_pickle=True)
    found = tensors(tmp_path / "c")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert read(tmp_path / "c").name == "t"
    load(tmp_path / "c")


def test_a_missing_pickle_is_named_before_any_is_read(tiny_family, tmp_path, monkeypatch):
    monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path / "cache"))
    folder = pickled(tiny_family("llama"), tmp_path / "t")
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    (folder / "pytorch_model.bin").rename(folder / names[0])
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", names, strict=True))})
    )
    with pytest.raises(SwapattnError, match=rf"lacks 1 of its 2 weight files: {names[1]}"):
        convert(folder, tmp_path / "c", recipe="smoke", overrides=SPEC, allow_pickle=True)
    assert not (tmp_path / "cache").exists()
    (folder / names[0]).rename(folder / "pytorch_model.bin")  # which counts, whatever an old index says
    convert(folder, tmp_path / "c", recipe="smoke", overrides=SPEC, allow_pickle=True)


def test_what_lies_beside_a_gguf_is_not_read(tmp_path, monkeypatch):
    seen = []

    def from_pretrained(folder, **_):
        seen.extend(path.name for path in Path(folder).iterdir())
        raise ValueError("enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for name in ("m.gguf", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(SourceError, match="cannot read this GGUF file: enough"):
        _dequantise(tmp_path / "m.gguf", tmp_path / "out")
    assert seen == ["m.gguf"]


def test_a_tokenizer_that_does_not_load_is_told_and_left_out(tiny_family, tmp_path, capsys):
    tiny_family("llama").save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "tokenizer.model").write_text("no vocabulary")
    folder = convert(tmp_path / "t", tmp_path / "c", recipe="smoke").path
    assert load(folder)[1] is None
    assert "its tokenizer does not load: " in capsys.readouterr().err


def test_an_adapter_beside_the_model_is_refused(tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "t")
    (tmp_path / "t" / "adapter_config.json").write_text("{}")
    for attempt in (
        lambda: convert(tmp_path / "t", tmp_path / "c", recipe="smoke"),
        lambda: load_teacher(tmp_path / "t"),
    ):
        with pytest.raises(SourceError, match="holds an adapter of peft beside the model: merge it"):
            attempt()


def test_another_head_than_that_of_a_language_model_is_refused(tiny_family, tmp_path):
    config = tiny_family("llama").config
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "t")
    with pytest.raises(CheckpointError, match=r"t: 1 missing keys, first lm_head\.weight"):
        convert(tmp_path / "t", tmp_path / "c", recipe="smoke")
    assert not (tmp_path / "c").exists()


def test_code_beside_pickled_weights_goes_along_and_may_change(tiny_family, tmp_path, monkeypatch):
    monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path / "cache"))
    folder = pickled(tiny_family("llama"), tmp_path / "t")
    found = []
    for text in ("A = 1\n", "A = 22\n"):
        (folder / "modeling_own.py").write_text(text)
        found.append((Path(as_safetensors(str(folder))) / "modeling_own.py").read_text())
    assert found == ["A = 1\n", "A = 22\n"]


def test_code_in_a_pickle_does_not_run(tiny_family, tmp_path, monkeypatch):
    monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path / "cache"))
    folder = pickled(tiny_family("llama"), tmp_path / "t")
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (type(ran).touch, (ran,))

    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(SwapattnError, match="cannot be read as plain tensors"):
        convert(folder, tmp_path / "c", recipe="smoke", allow_pickle=True)
    assert not ran.exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
