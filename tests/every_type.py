"""Convert a tiny random model of every causal-LM type that transformers knows, run it, and write the table.

    python tests/every_type.py [FILE.md]

Some minutes on two cores. For each type: whether `convert` takes it; the largest difference of prefill, a chunk and
single steps from the full forward pass; of a left-padded row from the same tokens alone (fp64, in units of the largest
logit); and for those above 1e-6 what the stock model with its softmax does. Tests of families use the same functions.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from swapattn import families
from swapattn.cache import CACHE
from swapattn.errors import SwapattnError
from swapattn.recipe import ConvertSpec
from swapattn.surgery import apply_, plan

LENGTH = 21


def tiny_model(kind, **overrides):
    """A random model of a type in fp64, its weights large enough that attention is not uniform."""
    config = families.tiny_config(kind, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.15)
    return model.double()


def every_type(*quick):
    """All types as parameters of a test, of which all but some are slow."""
    return [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in sorted(families.types())]


def saved_type(kind, folder):
    """Save a random model of a type in fp32; the test is skipped where the type is refused."""
    try:
        plan(families.tiny_config(kind), ConvertSpec())
    except SwapattnError as refusal:
        pytest.skip(str(refusal))
    tiny_model(kind).float().save_pretrained(folder)
    return folder


def swapped(kind, keep=(), window=5, **overrides):
    model = tiny_model(kind, **overrides)
    spec = ConvertSpec.model_validate(
        {"local": {"window": window, "sinks": 2, "share": 0.4, "mix": "joint"}, "keep_softmax": keep}
    )
    apply_(model, plan(families.tiny_config(kind, **overrides), spec))  # composite types give the model another
    return model.double()


def ids_of(rows=2, length=LENGTH):
    return torch.randint(2, 300, (rows, length), generator=torch.Generator().manual_seed(3))


def positions(model, ids, start=0):
    """Explicit positions where the model takes them, so that a cache's length is never guessed."""
    known = "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": torch.arange(start, start + ids.shape[1])[None].expand(ids.shape[0], -1)} if known else {}


@torch.no_grad()
def cache_error(model):
    """Largest difference of prefill + chunk + single steps from the full forward, in units of the largest logit."""
    ids = ids_of()
    full = model(input_ids=ids, use_cache=False).logits
    past, start, found = {}, 0, []
    for piece in (9, 6, 1, 1, 1, 3):
        output = model(input_ids=ids[:, start : start + piece], use_cache=True, **past)
        name = next(name for name in (CACHE, "cache_params") if output.get(name) is not None)
        past = {name: output[name]}
        found.append(output.logits)
        start += piece
    if not float(full.std()) > 1e-4:
        raise ValueError("the logits do not vary: equal ones would say nothing")
    return float((torch.cat(found, 1) - full).abs().max() / full.abs().max())


@torch.no_grad()
def padding_error(model):
    """Largest difference of a left-padded row from the same tokens alone, in units of the largest logit."""
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    more = {"position_ids": places} if positions(model, ids) else {}
    both = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
    alone = model(input_ids=ids[:1, 8:], use_cache=False).logits
    found = torch.cat((both[0, 8:], both[1]))
    expected = torch.cat((alone[0], model(input_ids=ids[1:], use_cache=False).logits[0]))
    return float((found - expected).abs().max() / expected.abs().max())


NEAR = 1e-6


def row(kind):
    """One line of the table: type, attention layers, cached, padded, remark."""
    support = families.support(kind)
    if not support.supported:
        return kind, "refused", "", "", support.reason
    remarks, cells = [], []
    for name, measure in (("cached", cache_error), ("padded", padding_error)):
        try:
            error = measure(swapped(kind))
        except Exception as problem:
            error = float("nan")
            remarks.append(f"{name}: {' '.join(str(problem).split())[:80]}")
        if not error <= NEAR:
            remarks.append(f"{name} with softmax: {stock_error(kind, measure)}")
        cells.append(f"{error:.0e}")
    return kind, f"{support.sites} layers", *cells, "; ".join(remarks)


def stock_error(kind, measure):
    """The same of the stock model, or what it raises."""
    try:
        return f"{measure(tiny_model(kind)):.0e}"
    except Exception as problem:
        return " ".join(str(problem).split())[:80]


def main():
    kinds = sorted(families.types())
    rows = [row(kind) for kind in tqdm(kinds, unit="type")]
    taken = [cells for cells in rows if cells[1] != "refused"]
    lines = ["| type | swapped | cached = whole | padded = alone | remark |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    near = [sum(float(cells[i]) <= NEAR for cells in taken) for i in (2, 3)]
    count = f"transformers {transformers.__version__}: {len(taken)} of {len(rows)} types are supported"
    lines += ["", f"{count}; cached equals whole to 1e-6 in {near[0]}, padded equals alone in {near[1]}."]
    text = "\n".join(lines) + "\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")
    print(text if len(sys.argv) == 1 else lines[-1])


if __name__ == "__main__":
    main()
