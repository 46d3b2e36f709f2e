"""Documents of one window, kept apart: every token's loss is that of its document alone, in teacher and student."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from swapattn import data, objectives
from swapattn.attention import observing, swaps
from swapattn.compilation import compiled_layers
from swapattn.errors import UnsupportedModelError
from swapattn.losses import OutputEmbedding
from swapattn.objectives import align_loss, check_document_mask, distill_loss, hidden_states, output_embedding
from swapattn.recipe import ConvertSpec
from swapattn.stages import AlignStage, DistillStage
from swapattn.surgery import apply_, plan
from swapattn.swap import LightningSwap
from swapattn.training import run_stage

FAMILIES = ["llama", "gpt_neox", "qwen3", "gemma2"]  # the last with sliding layers
CUTS = [[11, 8, 21], [40], [9, 31]]  # lengths of the documents of three windows


@pytest.fixture(autouse=True)
def _short_documents(monkeypatch):
    monkeypatch.setattr(data, "SHORTEST", 8)


def build(model, **values):
    apply_(
        model,
        plan(model.config, ConvertSpec.model_validate({"local": {"window": 6, "sinks": 2, "mix": "joint"}, **values})),
    )
    return model.double()


def stage(kind=DistillStage, name="distill", **values):
    settings = {"stage": name, "tokens": 360, "length": 40, "batch": 3, "learning_rate": 1e-2}
    return kind.model_validate({**settings, "train": "new", **values})


def ids_of(rows, seed=3):
    return torch.randint(2, 320, (rows, 40), generator=torch.Generator().manual_seed(seed))


def positions_of(cuts):
    return torch.stack([torch.cat([torch.arange(size) for size in cut]) for cut in cuts])


def alone(ids, cuts):
    """The documents of each window as windows of their own."""
    return [piece for row, cut in zip(ids, cuts, strict=True) for piece in row[None].split(cut, 1)]


def token_losses(model, ids, positions=None):
    """KL to the model's own softmax, −ln q of the next token of the document, and entropy of the softmax."""
    head: OutputEmbedding = output_embedding(model)
    given = {} if positions is None else apart(positions)
    with torch.no_grad():
        q = head(hidden_states(model, ids, **given)).log_softmax(-1)
        with observing(model, lambda *_: None):
            p = head(hidden_states(model, ids, **given)).log_softmax(-1)
    picked = -q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    if positions is not None:
        picked = picked * (positions[:, 1:] != 0)
    picked = torch.nn.functional.pad(picked, (0, 1))
    return (p.exp() * (p - q)).sum(-1), picked, -(p.exp() * p).sum(-1)


def apart(positions):
    found = data.boundaries(positions)
    return {"position_ids": positions, "cu_seq_lens_q": found, "cu_seq_lens_k": found}


@pytest.mark.parametrize("keep", [(), (1,)], ids=["all swapped", "one kept"])
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_of_every_token_are_those_of_the_documents_alone(tiny_family, name, keep):
    model, ids, positions = build(tiny_family(name), keep_softmax=keep), ids_of(3), positions_of(CUTS)
    packed = token_losses(model, ids, positions)
    separate = [token_losses(model, piece) for piece in alone(ids, CUTS)]
    for found, *expected in zip(packed, *separate, strict=True):
        assert torch.allclose(found.flatten(), torch.cat([x.flatten() for x in expected]), rtol=0, atol=1e-5)
    run_on = token_losses(model, ids)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(packed, run_on, strict=True)), "nothing to keep apart"

    kl, picked, _ = packed
    what = stage(losses={"forward_kl": 0.4, "cross_entropy": 0.6}, chunk=17)
    loss = float(distill_loss(model, ids, position_ids=positions, stage=what, teacher=None).detach())
    expected = 0.4 * kl.mean() + 0.6 * picked.sum() / (3 * 39)
    assert loss == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_align_compares_every_document_with_the_teacher_on_it_alone(tiny_family, name):
    model, ids, positions = build(tiny_family(name)), ids_of(3), positions_of(CUTS)

    def errors(ids, **given):
        """Squared error and squared norm by layer and token."""
        found = []

        def note(swap, call, target):
            output = call.in_rows(swap(call))
            target = target.view(output.shape)
            found.append(torch.stack(((output - target).pow(2).sum((2, 3)), target.pow(2).sum((2, 3)))))

        with torch.no_grad(), observing(model, note):
            model(input_ids=ids, use_cache=False, **given)
        return torch.stack(found)  # [layers, 2, B, T]

    separate = torch.cat([errors(piece).flatten(2) for piece in alone(ids, CUTS)], 2).view(3, 2, 3, 40)
    assert torch.allclose(errors(ids, **apart(positions)), separate, rtol=0, atol=1e-5)
    error, norm = separate.sum(3).unbind(1)
    assert float(align_loss(model, ids, positions).detach()) == pytest.approx(float((error / norm).mean()), rel=1e-6)


class Windows(torch.utils.data.IterableDataset):
    def __iter__(self):
        for seed in range(1000):
            for row, cut in zip(ids_of(3, seed), CUTS, strict=True):
                yield {"input_ids": row, "position_ids": positions_of([cut])[0]}


@pytest.mark.parametrize("kind", ["align", "distill"])
def test_micro_batches_change_nothing(tiny_family, tmp_path, kind):
    found = []
    for micro in (3, 1):
        model = build(tiny_family("llama"))
        classes = {"align": AlignStage, "distill": DistillStage}
        what = stage(classes[kind], kind, micro_batch=micro, document_mask=True, gradient_checkpointing=micro == 1)
        loss = align_loss if kind == "align" else functools.partial(distill_loss, stage=what, teacher=None)
        place = {"folder": tmp_path / str(micro), "log": tmp_path / f"{micro}.jsonl"}
        run_stage(model, what, loss, Windows(), title=kind, device="cpu", seed=0, **place)
        found.append({name: p.detach().clone() for name, p in model.named_parameters() if ".swap." in name})
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, rtol=0, atol=1e-6), name


@torch.no_grad()
def test_other_documents_compile_nothing_anew(tiny_family):
    torch._dynamo.reset()
    model, ids = build(tiny_family("llama", num_hidden_layers=2)), ids_of(3)
    packings = [apart(positions_of(cuts)) for cuts in (CUTS, [[40], [20, 20], [8, 8, 8, 8, 8]])]
    expected = [hidden_states(model, ids, **given) for given in packings]
    counter = CompileCounterWithBackend("eager")
    graphs = []
    with compiled_layers(model, backend=counter):
        for given, hidden in zip(packings, expected, strict=True):
            assert torch.allclose(hidden_states(model, ids, **given), hidden, rtol=0, atol=1e-9)
            graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0
    torch._dynamo.reset()


def test_nobody_looks_for_the_boundaries_in_a_mask(tiny_family, monkeypatch):
    model, seen, call = build(tiny_family("llama")), [], LightningSwap.call
    monkeypatch.setattr(LightningSwap, "call", lambda *args: seen.append(args[6].get("cu_seq_lens_q")) or call(*args))
    align_loss(model, ids_of(3), positions_of(CUTS))
    assert len(seen) == len(swaps(model))
    assert all(x.shape == (3 * 5 + 1,) for x in seen)


@pytest.mark.parametrize(("name", "fine"), [("llama", True), ("gpt2", True), ("opt", False)])
def test_a_family_that_cannot_keep_documents_apart_is_refused(tiny_family, name, fine):
    for model in (tiny_family(name), build(tiny_family(name))):
        refused = pytest.raises(UnsupportedModelError, match=f"'{name}' cannot keep .* document_mask: false")
        with contextlib.nullcontext() if fine else refused:
            check_document_mask(model)


def test_layers_of_another_kind_may_lack_what_keeps_documents_apart(tiny_family, monkeypatch):
    def lacking(model, ids, **given):
        if given:
            raise ValueError("install a package")  # as the gated delta rule of qwen3_next in transformers
        return hidden_states(model, ids)

    monkeypatch.setattr(objectives, "hidden_states", lacking)
    with pytest.raises(UnsupportedModelError, match=r"document_mask: false \(install a package\)"):
        check_document_mask(build(tiny_family("llama")))
