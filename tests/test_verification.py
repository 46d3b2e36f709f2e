"""Every row of `verify` passes on a good checkpoint, and exactly it fails when its claim is broken."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from every_type import tiny_model
from safetensors.torch import load_file, save_file

from swapattn import verification
from swapattn.audit import beyond_linear
from swapattn.cache import LightningCacheLayer
from swapattn.cli import common, main
from swapattn.conversion import convert
from swapattn.recipe import ConvertSpec
from swapattn.surgery import apply_, plan
from swapattn.swap import LightningSwap
from swapattn.verification import verify
from swapattn.wheels import sha256_of

SPEC = ["convert.local={window: 5, sinks: 2, mix: joint}"]
CONSTANT = ["convert.local.mix=constant"]
ROWS = ["files", "loads", "weights", "linear in length", "decay", "cached = uncached", "padded = alone", "GQA mapping"]
RELOADS = ["reload", "reload, swapattn blocked"]


@pytest.fixture
def checkpoint(tiny_teacher, tmp_path):
    return made(tiny_teacher, tmp_path / "c", *SPEC)


def made(teacher, folder, *overrides, **more):
    convert(teacher, folder, recipe="smoke", overrides=overrides, **more)
    shard = folder / "teacher.safetensors"
    shutil.copyfile(shard, folder / "copy")  # a file of its own, so that the teacher's stays as it is
    shard.unlink()
    (folder / "copy").rename(shard)
    return folder


def failed(folder, **more):
    found = verify(folder, reload=False, **more)
    assert [row.name for row in found.rows] == ROWS
    assert found.passed == all(row.passed for row in found.rows)
    return found.failed


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path, edit):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "overrides",
    [
        ["convert.keep_softmax=[0]", "convert.decay.per=query_head"],
        [*CONSTANT, "convert.normalizer=rms_all", "convert.feature_map=silu", "convert.decay.gate=true"],
        ["convert.local=null", "convert.rope.linear=drop", "convert.output_gate=channel", "convert.qk_norm=rms"],
        ["convert.local=null", "convert.decay.half_lives=[4]"],
    ],
    ids=["kept", "gated", "linear-only", "half-lives"],
)
def test_a_good_checkpoint_passes(tiny_teacher, tmp_path, overrides):
    assert failed(made(tiny_teacher, tmp_path / "c", *SPEC, *overrides)) == []


@pytest.mark.parametrize("kept", [[], [1]])
def test_a_family_with_softcap_and_sliding_windows_passes(tiny_family, tmp_path, kept):
    tiny_family("gemma2").save_pretrained(tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "c", recipe="smoke", overrides=[*SPEC, f"convert.keep_softmax={kept}"])
    assert failed(tmp_path / "c") == []


@pytest.mark.parametrize("kind", ["gemma3", "bert", "minimax", "bamba", "bart"])
def test_a_family_with_oddities_passes(tmp_path, kind):
    """Sizes in a section of the config; few positions; a linear attention of its own, in blocks of 256.

    Mamba layers that do not go on with a chunk, and positions that count padding: as in their teachers.
    """
    tiny_model(kind).float().save_pretrained(tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "c", recipe="smoke", overrides=SPEC)
    assert failed(tmp_path / "c") == []


@pytest.mark.parametrize("kind", ["bloom", "gpt_neo", "mpt"])
def test_a_kept_layer_may_have_a_mask_of_all_pairs(tmp_path, kind):
    tiny_model(kind).float().save_pretrained(tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "c", recipe="smoke", overrides=[*SPEC, "convert.keep_softmax=[0]"])
    assert failed(tmp_path / "c") == []


def test_a_checkpoint_little_beyond_the_tolerance_is_held_to_a_teacher_little_within(checkpoint, monkeypatch):
    """The fp32 layers of qwen3_next, seen by chance from both sides."""
    for theirs, wanted in ((5.8e-6, []), (1e-7, ["cached = uncached"])):
        found = iter((1.04e-5, theirs))
        monkeypatch.setattr(verification, "_difference", lambda *_, found=found: next(found, 0.0))
        assert failed(checkpoint) == wanted


def test_a_calibrated_checkpoint_passes_and_records_its_decay(tiny_teacher, tmp_path):
    folder = made(tiny_teacher, tmp_path / "c", *SPEC, calibrate=True)
    record = json.loads((folder / "swapattn.json").read_text())
    assert set(record["decay"]) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert failed(folder) == []
    edit_json(folder / "swapattn.json", lambda data: data.pop("decay"))  # as older ones are
    assert failed(folder) == []
    change(folder / "swap.safetensors", lambda t: t["model.layers.1.self_attn.swap.log_slope"].fill_(3.0))
    assert failed(folder) == ["decay"]


@pytest.mark.parametrize("bit", [1, 64])
def test_one_flipped_bit_of_a_weight_is_found(checkpoint, bit):
    path = checkpoint / "teacher.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= bit
    path.write_bytes(data)
    assert failed(checkpoint) == ["weights"]
    row = next(row for row in verify(checkpoint, reload=False).rows if row.name == "weights")
    assert "teacher.safetensors: 1, first " in row.detail


def test_a_flipped_bit_of_a_linked_file_is_found_by_its_name_in_the_hubs_cache(tiny_teacher, tmp_path):
    """The checkpoint and the teacher share the file, so that comparing them says nothing."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    shutil.copytree(tiny_teacher, snapshot)
    blob = blobs / sha256_of(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    convert(snapshot, tmp_path / "c", recipe="smoke", overrides=SPEC)
    assert failed(tmp_path / "c") == []
    with blob.open("r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)[0]
        file.seek(-1000, 2)
        file.write(bytes([byte ^ 1]))
    assert failed(tmp_path / "c") == ["files"]
    assert "model.safetensors of the teacher is altered" in verify(tmp_path / "c", reload=False).to_table()


def test_a_teacher_that_was_written_over_is_found(tiny_teacher, tmp_path, capsys):
    """The checkpoint's shard is the same file: comparing says nothing, and the swaps sit on other weights."""
    shutil.copytree(tiny_teacher, tmp_path / "t")
    convert(tmp_path / "t", tmp_path / "c", recipe="smoke", overrides=SPEC)
    assert failed(tmp_path / "c") == []
    tensors = {name: 1.5 * tensor for name, tensor in load_file(tmp_path / "t" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "other.safetensors", metadata={"format": "pt"})
    (tmp_path / "t" / "model.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes())
    capsys.readouterr()
    assert failed(tmp_path / "c") == ["weights"]
    assert "c/teacher.safetensors is not what the checkpoint was made with" in capsys.readouterr().err
    row = next(row for row in verify(tmp_path / "c", reload=False).rows if row.name == "weights")
    assert row.detail == "teacher.safetensors, one file with the teacher's model.safetensors, has been written over"


def test_a_trained_tensor_may_differ_only_if_it_is_listed(checkpoint):
    name = "model.layers.0.mlp.up_proj.weight"
    change(checkpoint / "teacher.safetensors", lambda tensors: tensors[name].mul_(1.5))
    assert failed(checkpoint) == ["weights"]
    edit_json(checkpoint / "swapattn.json", lambda record: record["trained"].append(name))
    assert failed(checkpoint) == []


def test_a_changed_decay_is_found(checkpoint):
    change(checkpoint / "swap.safetensors", lambda t: t["model.layers.1.self_attn.swap.log_slope"].add_(0.01))
    assert failed(checkpoint) == ["decay"]


def test_a_decay_that_is_not_finite_is_found(checkpoint):
    change(checkpoint / "swap.safetensors", lambda t: t["model.layers.0.self_attn.swap.log_slope"].fill_(torch.inf))
    assert "decay" in failed(checkpoint)


def test_a_layer_that_computes_all_pairs_is_found(checkpoint, monkeypatch):
    forward = LightningSwap.forward

    def quadratic(self, call, cache=None):
        q, k = call.q.transpose(1, 2), call.k.repeat_interleave(2, 2).transpose(1, 2)
        return forward(self, call, cache) + 0 * (q @ k.mT).softmax(-1).mean()

    monkeypatch.setattr(LightningSwap, "forward", quadratic)
    assert failed(checkpoint) == ["linear in length"]


def test_a_layer_that_stayed_softmax_without_being_kept_is_found(checkpoint):
    path = "model.layers.1.self_attn"

    def drop(tensors):
        for name in [name for name in tensors if name.startswith(f"{path}.swap.")]:
            del tensors[name]

    change(checkpoint / "swap.safetensors", drop)
    edit_json(checkpoint / "config.json", lambda config: config["swapattn"]["layers"].pop(path))
    edit_json(checkpoint / "model.safetensors.index.json", lambda index: drop(index["weight_map"]))
    assert failed(checkpoint) == ["linear in length"]


def test_a_cache_that_forgets_is_found(checkpoint, monkeypatch):
    monkeypatch.setattr(LightningCacheLayer, "keep", lambda self, final: None)
    assert failed(checkpoint) == ["cached = uncached"]


def test_padding_that_counts_is_found(checkpoint, monkeypatch):
    monkeypatch.setattr("swapattn.call.read_mask", lambda *_, **__: (None, None))
    assert failed(checkpoint) == ["padded = alone"]


def test_heads_on_the_wrong_keys_are_found(checkpoint, monkeypatch):
    linear = LightningSwap.linear

    def swapped(self, call, cache=None, seen=None):
        return linear(self, call, cache, seen._replace(v=seen.v.flip(2)))

    monkeypatch.setattr(LightningSwap, "linear", swapped)
    assert failed(checkpoint) == ["GQA mapping"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "is cut short"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "is cut short"),
        (lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]), "is "),
        (lambda path: path.write_bytes(path.read_bytes()[:9] + b"\x01" + path.read_bytes()[10:]), "no valid one"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["truncated", "header-truncated", "length-flipped", "header-flipped", "missing"],
)
def test_damaged_files_are_named(checkpoint, damage, words):
    damage(checkpoint / "teacher.safetensors")
    damage(checkpoint / "swap.safetensors")
    found = verify(checkpoint, reload=False)
    assert found.failed == ["files"]
    detail = found.rows[0].detail
    assert "swap.safetensors is" in detail
    assert "teacher.safetensors is" in detail
    assert words in detail
    assert "\n" not in detail
    assert {row.passed for row in found.rows[1:]} == {None}


def test_a_pickle_in_the_folder_is_refused(checkpoint):
    torch.save({}, checkpoint / "pytorch_model.bin")
    assert failed(checkpoint) == ["files"]


def test_a_tensor_that_is_missing_or_of_another_shape_does_not_load(checkpoint):
    change(checkpoint / "swap.safetensors", lambda t: t.update({"model.layers.0.self_attn.swap.mix": torch.zeros(3)}))
    assert failed(checkpoint) == ["loads"]


def test_a_teacher_that_moved_is_asked_for(checkpoint, tiny_teacher, tmp_path):
    edit_json(
        checkpoint / "swapattn.json",
        lambda record: record["teacher"].update(path=str(tmp_path / "gone"), relative="gone"),
    )
    found = verify(checkpoint, reload=False)
    assert set(found.failed) == {"weights", "linear in length", "decay"}
    assert "name it with --teacher" in found.rows[2].detail
    assert failed(checkpoint, teacher=tiny_teacher) == []


def test_the_command_reloads_in_two_processes_and_prints_a_table(checkpoint, monkeypatch):
    monkeypatch.setattr(common, "_quiet_libraries", lambda: None)
    result = CliRunner().invoke(main, ["verify", str(checkpoint)])
    assert result.exit_code == 0, result.stdout + result.stderr
    assert [line[8:].split("  ")[0].strip() for line in result.stdout.splitlines()] == ROWS + RELOADS
    assert all(line.startswith("pass ") for line in result.stdout.splitlines())


def test_code_that_was_changed_runs_only_when_asked_and_is_caught(checkpoint, monkeypatch):
    monkeypatch.setattr(common, "_quiet_libraries", lambda: None)
    code = checkpoint / "swap.py"
    code.write_text(code.read_text().replace("self.mix + self.mix_sum", "self.mix - 1 + self.mix_sum"))
    result = CliRunner().invoke(main, ["verify", str(checkpoint), "--json"])
    assert result.exit_code == 3
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert [name for name, row in rows.items() if not row["passed"]] == RELOADS
    assert "swap.py is not what this swapattn writes" in rows["reload"]["detail"]
    found = verify(checkpoint, trust_remote_code=True)
    assert found.failed == ["reload, swapattn blocked"]
    assert "logits differ" in found.rows[-1].detail


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "opt", "mixtral"])
def test_the_audit_finds_softmax_and_only_softmax(tiny_family, kind):
    more = {"num_local_experts": 2} if kind == "mixtral" else {}
    model = tiny_family(kind, **more)
    apply_(model, plan(model.config, ConvertSpec.model_validate({"keep_softmax": [1], "local": {"window": 9}})))
    device = "cpu" if kind == "gemma2" else "meta"  # eager's masks ask for values
    sites = beyond_linear(model.to(device, torch.bfloat16), window=13, device=device)
    assert sites
    assert all("1." in path for path in sites)


def test_the_audit_finds_a_flattened_square():
    class Flat(torch.nn.Module):
        def forward(self, input_ids, use_cache=False):
            x = input_ids.float()[0]
            return self.inner(x)

        def __init__(self):
            super().__init__()
            self.inner = Inner()

    class Inner(torch.nn.Module):
        def forward(self, x):
            return x.repeat(x.shape[0])

    assert list(beyond_linear(Flat(), device="cpu")) == ["inner"]


def test_code_that_the_config_names_elsewhere_does_not_run(checkpoint, tmp_path):
    (tmp_path / "side").mkdir()
    (tmp_path / "side" / "bad.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    (checkpoint / "sub").symlink_to("../side")  # a folder that a search for Python files does not enter
    edit_json(checkpoint / "config.json", lambda c: c.update(auto_map=dict.fromkeys(c["auto_map"], "sub/bad.X")))
    found = verify(checkpoint)
    assert found.failed == RELOADS
    assert "config.json is not what this swapattn writes" in found.rows[-1].detail
    assert not (tmp_path / "ran").exists()
