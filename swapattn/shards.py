"""Model folders tensor by tensor: read and check the teacher's, write ours, without loading a model.

The teacher's shards are hard-linked (or copied) as they are and new parameters go into a shard of their own, so that
what was taken over is equal bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from . import surgery
from .checkpoint import RECORD, write_json
from .environment import umask
from .errors import CheckpointError, SourceError, UnsupportedModelError
from .integrity import check_shards, samples
from .loading import TOKENIZER, tokenizer_in
from .model_card import CARD, model_card
from .modeling import MODEL_TYPE_PREFIX, write_runtime
from .remote_code import use_own_code
from .stored import PLAIN, trained_tensors
from .swap import LightningSwap

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NEW_SHARD = "swap.safetensors"
COPIES = 4  # at a time
# Files of a model folder that go along: tokenizer, generation settings, licence. Never weights or code.
CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a teacher's folder, or the part of it that its causal LM is made from.

    Args:
        folder: with a config.json.
        trust_remote_code: allow the code that comes with the model, where it has any (`remote_code`).

    Raises:
        UnsupportedModelError: transformers does not know the model type, it is one of ours, or it comes with code
            that is not trusted.
    """
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder}: no readable config.json ({error})") from error
    model_type = str(data.get("model_type"))
    if model_type.startswith(MODEL_TYPE_PREFIX):
        raise UnsupportedModelError(f"{folder} is already converted (model type {model_type}): name what it is from")
    use_own_code(folder, trust=trust_remote_code)
    try:
        return surgery.causal_config(AutoConfig.from_pretrained(folder))
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"{folder}: transformers does not know the model type {model_type!r}") from error


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> safetensors file of a model folder.

    Raises:
        CheckpointError: the index cannot be read, or a shard is missing or damaged.
    """
    # transformers prefers the single file too: an index beside it is of an earlier saving.
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return dict.fromkeys(_open_shard(folder / SINGLE), SINGLE)
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged ({type(error).__name__})") from error
    check_shards(folder, weight_map)
    return weight_map


def _open_shard(path: Path) -> list[str]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as shard:
            return list(shard.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error


def new_parameters(plan: surgery.SwapPlan) -> dict[str, torch.Tensor]:
    """Start values of every parameter that the plan adds, by its name in the checkpoint."""
    slopes = plan.slopes()
    spec = plan.spec.model_dump(mode="json")
    return {
        f"{site.path}.swap.{name}": tensor.contiguous()
        for site in plan.swap
        for name, tensor in LightningSwap(site.shape(), spec, slopes[site.path]).state_dict().items()
    }


def write_checkpoint(
    folder: Path,
    teacher: Path,
    plan: surgery.SwapPlan,
    tensors: dict[str, torch.Tensor],
    weight_map: dict[str, str],
    record: dict[str, Any],
) -> None:
    """Write a checkpoint: linked shards, the new shard, index, tokenizer, runtime files, record, config.

    The config comes last, because nothing loads a folder without one: what a killed process leaves is whole or dead.
    """
    # transformers prefers a file called model.safetensors to an index, so the teacher's gets another name here.
    names = {name: "teacher.safetensors" if name == SINGLE else name for name in set(weight_map.values())}
    with ThreadPoolExecutor(COPIES) as pool:  # where they must be copied, one thread does not keep a disk busy
        waiting = [pool.submit(link_or_copy, teacher / old, folder / new) for old, new in sorted(names.items())]
        try:
            for copy in waiting:
                copy.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    write_new_parameters(folder, tensors)
    merged = {key: names[name] for key, name in weight_map.items()} | dict.fromkeys(tensors, NEW_SHARD)
    size = sum((folder / name).stat().st_size for name in set(merged.values()))
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": merged})
    copy_companions(teacher, folder)
    name_tokenizer(teacher, folder)
    data, config = json.loads((teacher / "config.json").read_text(encoding="utf-8")), read_config(teacher)
    if data["model_type"] != config.model_type:  # the text model of a teacher that has other parts too
        data = {"dtype": data.get("dtype", data.get("torch_dtype")), **json.loads(config.to_json_string())}
    if data.get("dtype", data.get("torch_dtype")) is None:  # else transformers takes that of the first file, our own
        data["dtype"] = stored_dtype(teacher, weight_map)
    auto_map = write_runtime(folder, plan.base_model_type)
    data.update(
        model_type=MODEL_TYPE_PREFIX + plan.base_model_type,
        architectures=[auto_map["AutoModelForCausalLM"].split(".")[-1]],
        auto_map=auto_map,
        swapattn=plan.config_block(),
    )
    kept = [site.layer_idx for site in plan.keep]
    (folder / CARD).write_text(model_card(record, data["swapattn"], kept), encoding="utf-8")
    write_json(folder / RECORD, {**record, "weights": samples(folder, NEW_SHARD)})
    write_json(folder / "config.json", data)


def write_new_parameters(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the shard that holds the parameters of the swaps."""
    write_shard({name: t.contiguous() for name, t in tensors.items()}, folder / NEW_SHARD)


def write_shard(tensors: dict[str, torch.Tensor], target: Path) -> None:
    """Write a file of weights that whoever may read the folder can read: safetensors gives it to its owner alone."""
    save_file(tensors, target, metadata={"format": "pt"})
    target.chmod(0o666 & ~umask())


def decays(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """Slopes by the path of their attention module, for the record."""
    ending = ".swap.log_slope"
    return {
        k.removesuffix(ending): t.detach().double().exp().tolist() for k, t in tensors.items() if k.endswith(ending)
    }


def stored_dtype(folder: Path, weight_map: Mapping[str, str]) -> str | None:
    """The dtype in which transformers loads a model whose config names none: of the first floats in the first file."""
    with safe_open(folder / min(weight_map.values()), framework="pt") as shard:
        kinds = (PLAIN.get(shard.get_slice(key).get_dtype()) for key in shard.keys())  # noqa: SIM118 - no mapping
        return next(filter(None, kinds), None)


def count(tensors: dict[str, torch.Tensor]) -> int:
    """Numbers in a set of tensors."""
    return sum(tensor.numel() for tensor in tensors.values())


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation settings and licence files."""
    for pattern in CARRIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.suffix != ".py":
                target = folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def name_tokenizer(teacher: Path, folder: Path) -> None:
    """Write down the class of the teacher's tokenizer, where transformers chose it by the model type, which changes."""
    try:
        tokenizer = tokenizer_in(teacher)
    except Exception:  # whatever a tokenizer lacks here; it goes along as it is
        return
    path = folder / TOKENIZER
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if tokenizer is None or "auto_map" in settings:
        return
    kind = type(tokenizer).__name__
    if str(settings.get("tokenizer_class")).removesuffix("Fast") != kind.removesuffix("Fast"):
        write_json(path, {**settings, "tokenizer_class": kind})


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, following symbolic links; copy it where the file system cannot link, as across devices."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        try:
            _clone(source, target)
        except (OSError, AttributeError):  # not every pair of file systems, nor every system, can do that
            shutil.copyfile(source, target)


def _clone(source: Path, target: Path) -> None:
    """Copy inside the kernel; where the file system can (btrfs, XFS), the copy shares its blocks with the source.

    Raises:
        OSError: the kernel cannot, or stopped early.
    """
    with source.open("rb") as old, target.open("wb") as new:
        while os.copy_file_range(old.fileno(), new.fileno(), 1 << 30):
            pass
    if target.stat().st_size != source.stat().st_size:
        raise OSError(f"{target} is shorter than {source}")


def count_parameters(folder: Path, files: Iterable[str]) -> int:
    """Numbers stored in these files of a model folder, each counted once, from their headers alone."""
    total = 0
    for name in set(files):
        with safe_open(folder / name, framework="pt") as shard:
            total += sum(math.prod(shard.get_slice(key).get_shape()) for key in shard.keys())  # noqa: SIM118 - no mapping
    return total


def write_trained(folder: Path, parent: Path, model: nn.Module, trained: set[str]) -> None:
    """Write a checkpoint whose trained tensors come from the model and all others, as they are, from its parent.

    Shards without a trained tensor are linked; the others are written anew, one at a time, in their stored dtypes.
    """
    weight_map = read_weight_map(parent)
    changed = trained_tensors(parent, weight_map, model, trained)
    for shard in sorted(set(weight_map.values())):
        here = {name: source for name, source in changed.items() if weight_map[name] == shard}
        if not here:
            link_or_copy(parent / shard, folder / shard)
            continue
        with safe_open(parent / shard, framework="pt") as old:
            tensors = {key: old.get_tensor(key) for key in old.keys()}  # noqa: SIM118 - no mapping
        for source in {id(source): source for source in here.values()}.values():
            for key, tensor in source.stored().items():
                if key in here:
                    tensors[key] = tensor.detach().to("cpu", tensors[key].dtype).clone().reshape(tensors[key].shape)
        write_shard(tensors, folder / shard)
    for name in ("config.json", INDEX):
        shutil.copyfile(parent / name, folder / name)
    copy_companions(parent, folder)
    config = json.loads((parent / "config.json").read_text(encoding="utf-8"))
    write_runtime(folder, config["swapattn"]["base_model_type"])
