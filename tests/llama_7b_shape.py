"""Write a random checkpoint of Llama-7B's shape: 6.7 billion bf16 numbers, 13.5 GB, in shards as on the hub.

    python tests/llama_7b_shape.py FOLDER [--layers 32]

Needs the disk space and about 200 MB of memory. A stretch of random numbers is repeated, its length coprime to every
matrix, so that no two layers are equal.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

HIDDEN, INNER, HEADS, VOCABULARY = 4096, 11008, 32, 32000
SHARD_BYTES = 4_900_000_000
PATTERN = 16_777_213  # numbers


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order in which they are stored."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{i}.self_attn.{name}.weight", (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            yield f"model.layers.{i}.mlp.{name}.weight", (INNER, HIDDEN)
        yield f"model.layers.{i}.mlp.down_proj.weight", (HIDDEN, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{name}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def write_llama_7b(folder: Path, layers: int = 32) -> None:
    """Write config, index and shards into a new folder."""
    folder.mkdir(parents=True)
    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes(layers):
        size = 2 * torch.Size(shape).numel()
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((name, shape, size))
        room -= size
    numbers = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    pattern = memoryview(numbers.view(torch.uint8).numpy())
    one = memoryview(torch.ones(HIDDEN, dtype=torch.bfloat16).view(torch.uint8).numpy())
    weight_map, start = {}, 0
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape, size in shard:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = file_name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, shape, size in shard:
                _repeat(file, one if len(shape) == 1 else pattern, start, size)
                start += size
    total = 2 * sum(torch.Size(shape).numel() for _, shape in shapes(layers))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(layers), indent=2))


def _repeat(file: BinaryIO, source: memoryview, start: int, size: int) -> None:
    """Write `size` bytes of an endlessly repeated source, from `start` on."""
    while size:
        start %= len(source)
        size -= file.write(source[start : start + size])


def _config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    write_llama_7b(arguments.folder, arguments.layers)
