"""The model card of a checkpoint, README.md, as the hub shows it: what was done to which model, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .recipe import ConvertSpec
from .sources import ALIASES

CARD = "README.md"
# The hub's identifiers of the licences that the aliases name; what is not here is left out, not guessed.
_LICENCES = {
    "Apache-2.0": "apache-2.0",
    "Gemma": "gemma",
    "Llama 2": "llama2",
    "Llama 3": "llama3",
    "Llama 3.1": "llama3.1",
    "Llama 3.2": "llama3.2",
}


def teacher_licence(folder: Path, hub_id: str | None) -> str | None:
    """The hub's identifier of a teacher's licence, from its own card or the table of aliases; None where unknown."""
    card = folder / CARD
    if card.is_file():
        parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
        try:
            front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
        except yaml.YAMLError:
            front = None
        if isinstance(front, dict) and isinstance(front.get("license"), str):
            return str(front["license"])
    known = next((row.licence for row in ALIASES.values() if row.hub_id == hub_id), "")
    return _LICENCES.get(known)


def model_card(record: Mapping[str, Any], block: Mapping[str, Any], kept: list[int] | None = None) -> str:
    """The text of a card: YAML front matter, then what was done.

    Args:
        record: of the checkpoint, see `checkpoint.new_record`.
        block: the `swapattn` block of its config.
        kept: indices of the layers that stay softmax, where they are known.
    """
    teacher = record["teacher"]
    spec = ConvertSpec.model_validate(block["spec"])  # of this model: the recipe's may leave something to be found out
    base = teacher.get("hub_id")
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"base_model": base} if base else {}
    front |= {"license": teacher["licence"]} if teacher.get("licence") else {}
    front["tags"] = ["swapattn", "linear-attention", "lightning-attention", "custom_code", str(record["kind"])]
    name = f"{record['name']}-swapattn"
    local = f"softmax over {spec.local.window} tokens and {spec.local.sinks} sinks" if spec.local else "none"
    swapped = ", ".join(str(shape["layer_idx"]) for shape in block["layers"].values())
    written = [manifest["teacher"] for manifest in record.get("logits", ())]
    taught = dict.fromkeys([(record.get("taught_by") or {}).get("path"), *written])
    rows = [
        ("teacher", f"[{base}](https://huggingface.co/{base})" if base else str(record["name"])),
        ("note on the teacher", str(teacher.get("note") or "")),
        ("taught by", ", ".join(Path(path).name for path in taught if path and path != teacher.get("path"))),
        ("layers swapped", f"{len(block['layers'])}: {swapped}"),
        ("layers kept softmax", ", ".join(map(str, kept)) or "none" if kept is not None else ""),
        ("linear branch", spec.linear_branch()),
        ("local branch", local),
        ("trained", _trained(record)),
        ("made with", ", ".join(f"{key} {value}" for key, value in record["versions"].items())),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows if value)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {name}

{base or record["name"]} with the softmax attention of {len(block["layers"])} layers replaced by Lightning Attention-2
(causal linear attention with one exponential decay per head). All other weights are the teacher's, bit for bit,
unless `swapattn.json` lists them as trained.

| | |
|---|---|
{table}

## Load it

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_REPOSITORY", trust_remote_code=True)
```

or, with swapattn installed, `swapattn.load(FOLDER)`. The whole recipe is in `swapattn.json`.
"""


def _trained(record: Mapping[str, Any]) -> str:
    if record["kind"] == "converted":
        return "nothing: start values, calibrated" if record.get("calibrated") else "nothing: start values"
    stages = [stage for key in ("earlier", "stages") for stage in record.get(key, ()) if isinstance(stage, Mapping)]
    start = ["calibrated while converting"] if record.get("calibrated") else []
    return ", ".join([*start, *(f"{stage.get('stage')} {stage.get('tokens', 0):,} tokens" for stage in stages)])
