"""Whether two models speak of the same tokens: a teacher can only be learnt from by a student with its vocabulary."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from .errors import UsageError
from .loading import know

_PROBE = "It's 1,024 naïve tokens —\n\n  def f(x): return x  # 漢字 🙂"


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary and of what it makes of a line of text."""
    found = [sorted(tokenizer.get_vocab().items()), tokenizer(_PROBE, add_special_tokens=False)["input_ids"]]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model folder, converted or not; it has one."""
    know(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def check_same_vocabulary(teacher: Path, student: Path) -> None:
    """Compare the tokenizers of two model folders and the sizes of their logits.

    Raises:
        UsageError: they differ.
    """
    sizes = [logit_count(folder) for folder in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"the teacher {teacher} has {sizes[0]:,} logits a token, {student} has {sizes[1]:,}")
    if not all((folder / "tokenizer_config.json").is_file() for folder in (teacher, student)):
        return
    one, other = (fingerprint(tokenizer_of(folder)) for folder in (teacher, student))
    if one != other:
        raise UsageError(f"the teacher {teacher} has another tokenizer than {student}: choose one of the same family")


def logit_count(folder: Path) -> int:
    """Logits that a model of a folder gives for each token, which may be more than its tokenizer has."""
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "vocab_size" not in values:  # left to the class, or in a part of the config
        know(folder)
        values = AutoConfig.from_pretrained(folder).get_text_config().to_dict()
    return int(values["vocab_size"])
