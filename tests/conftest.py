"""Models and tokenizers small enough to build in a test: no download, milliseconds on a CPU."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TINY_VOCABULARY = 320
_TRAINING_TEXT = [
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse,",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want.",
    "Fellow-Citizens of the Senate and House of Representatives: I embrace with great satisfaction the opportunity",
]


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported."""
    marks = config.getoption("markexpr")
    if marks and "gpu" not in marks.replace("not gpu", ""):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if "PYTEST_XDIST_WORKER" in os.environ:  # two processes with two threads each fight for two cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_unconfigure() -> None:
    """What `what_is_loaded_stays` froze may go, or nanobind reports all of it as leaked."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: the other process runs all the others beside it."""
    items.sort(key=lambda item: item.path.name != "test_real_model.py")


@pytest.fixture(autouse=True, scope="module")
def what_is_loaded_stays() -> None:
    """Trainer collects garbage after every stage, which takes half a second while it looks at all of torch."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def gpu_memory_is_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Many processes test on one GPU, and what one of them keeps for its next test the others lack."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 320 tokens that can encode any text; `<eos>` is 0, `<pad>` is 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def opening_tokenizer(tiny_tokenizer: Any) -> Any:
    """The same, but it puts a token (1) in front of every text, as those of Llama, Mistral and Gemma do."""
    import copy

    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = "<pad>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
    return tokenizer


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """A factory of random Llamas (2 layers, 4 query heads on 2 KV heads of 8); keywords override the config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(*, seed: int = 0, **overrides: Any) -> Any:
        settings: dict[str, Any] = {
            "vocab_size": TINY_VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 4096,
            "initializer_range": 0.2,  # far enough from zero that attention is not uniform
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 1,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()

    return build


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A folder with a saved tiny Llama and its tokenizer, as a user's own model would be; do not write into it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 6},
    "phi3": {},
    "gpt_neox": {"rotary_pct": 0.5, "attention_bias": True},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 2048, "tie_word_embeddings": False},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 0.25},
}


@pytest.fixture(scope="session")
def tiny_family() -> Callable[..., Any]:
    """A factory of random models of several model types (3 layers, 4 query heads of 8, on 2 KV heads where it can)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(model_type: str, *, seed: int = 0, **overrides: Any) -> Any:
        settings: dict[str, Any] = {
            "vocab_size": TINY_VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 4096,
            "initializer_range": 0.25,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 1,
        }
        config = AutoConfig.for_model(model_type, **{**settings, **_FAMILIES.get(model_type, {}), **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config).eval()

    return build


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """Six documents of PIQA and of ARC-Easy (one with three choices, five with four) in the layout of a mirror."""
    piqa = [{"goal": f"goal {i}", "sol1": f"first {i}", "sol2": "second", "label": i % 2} for i in range(6)]
    choices = [{"text": list("abcd")[: 3 + (i > 0)], "label": list("ABCD")[: 3 + (i > 0)]} for i in range(6)]
    arc = [{"id": str(i), "question": f"q {i}", "choices": c, "answerKey": "B"} for i, c in enumerate(choices)]
    for name, rows in (("baber/piqa", piqa), ("allenai/ai2_arc/ARC-Easy", arc)):
        folder = tmp_path / "mirror" / name
        folder.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: f"ARC-Easy/{split}.jsonl" for split in ("train", "validation", "test")}
    lines = ["---", "configs:", "- config_name: ARC-Easy", "  data_files:"]
    lines += [f"  - split: {split}\n    path: {path}" for split, path in files.items()]
    (tmp_path / "mirror" / "allenai/ai2_arc/README.md").write_text("\n".join([*lines, "---", ""]))
    return tmp_path / "mirror"


@pytest.fixture
def compiled_on_cpu() -> Iterator[Any]:
    """A `compile_config` by which `generate` compiles its step on a CPU as it does on a GPU; counts begin at nought."""
    import torch
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    torch._dynamo.reset()
    counters.clear()
    config = CompileConfig(backend="aot_eager", mode=None)
    config._compile_all_devices = True
    yield config
    torch._dynamo.reset()
