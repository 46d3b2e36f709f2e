"""One stage on the Trainer: what it trains, how it counts, how it stops."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import traceback

import pytest
import torch

from swapattn.attention import swaps
from swapattn.errors import RecipeError, SourceError, TrainingError, UnsupportedModelError, UsageError
from swapattn.losses import normalized_mse
from swapattn.objectives import align_loss, check_head, distill_loss, hidden_states, output_embedding
from swapattn.optimizer import build_optimizer, build_scheduler, grouping, trainable_parameters
from swapattn.recipe import ConvertSpec, parse_recipe
from swapattn.stages import AlignStage, DistillStage
from swapattn.surgery import apply_, plan
from swapattn.training import of_worker, run_stage, shares

FAMILIES = [
    "llama",
    "gemma2",
    "granite",
    "cohere",
    "gpt2",
    "opt",
    "gpt_neox",
    "phi3",
    "qwen3",
    "mistral",
    "gemma3_text",
]


def build(model, **values):
    apply_(model, plan(model.config, ConvertSpec.model_validate({"local": {"window": 6, "sinks": 2}, **values})))
    return model


def stage(kind="align", steps=3, **values):
    settings = {"stage": kind, "length": 24, "batch": 4, "learning_rate": 1e-2, "backbone_learning_rate": 1e-3}
    settings |= {"tokens": steps * 96, **values}
    return (AlignStage if kind == "align" else DistillStage).model_validate(settings)


class Windows(torch.utils.data.IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            yield {"input_ids": torch.randint(2, 320, (24,), generator=generator)}


def train(model, what, folder, loss=align_loss):
    return run_stage(
        model, what, loss, Windows(), title="align", folder=folder, log=folder / "log.jsonl", device="cpu", seed=0
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before, model):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.fixture
def llama(tiny_family):
    return build(tiny_family("llama"))


def ids_of(rows, length, seed=3):
    return torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_align_changes_the_swaps_only_and_its_loss_goes_down(tiny_family, tmp_path):
    llama = build(tiny_family("llama"), local=None)
    before = weights(llama)
    figures = train(llama, stage(steps=20, learning_rate=3e-2), tmp_path)
    expected = {name for name in before if ".swap." in name and not name.endswith(".log_slope")}
    assert changed(before, llama) == expected == set(figures["trained"])
    assert figures["last_loss"] < 0.95 * figures["first_loss"]
    assert (figures["steps"], figures["tokens"]) == (20, 20 * 96)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("kind", ["new", "attention", "all"])
def test_a_stage_trains_what_it_says(tiny_family, tmp_path, kind, learnable):
    model = build(tiny_family("llama"), keep_softmax=(1,), decay={"learnable": learnable})
    teacher = copy.deepcopy(tiny_family("llama"))
    before = weights(model)
    what = stage("distill", train=kind)
    train(model, what, tmp_path, lambda m, ids: distill_loss(m, ids, stage=what, teacher=teacher))
    new = {name for name in before if ".swap." in name and (learnable or not name.endswith(".log_slope"))}
    swapped = ("model.layers.0.self_attn.", "model.layers.2.self_attn.")
    own = {name for name in before if ".swap." not in name}
    expected = {"new": new, "attention": new | {n for n in own if n.startswith(swapped)}, "all": new | own}[kind]
    found = changed(before, model)
    assert found <= expected
    assert found == expected or kind == "all"  # a token that never occurs has an embedding without gradient
    assert kind != "all" or {name.split(".")[-2] for name in found} > {"down_proj", "lm_head", "norm"}


def test_own_weights_have_their_own_learning_rate(llama):
    what = stage("distill", train="all")
    new, own = trainable_parameters(llama, what)
    optimizer = build_optimizer(llama, what, new, own)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(new), len(own)]


def test_groups_of_parameters_have_their_own_learning_rates(tiny_family):
    gated = {"decay": {"learnable": True, "gate": True}, "output_gate": "head", "qk_norm": "rms"}
    model = build(tiny_family("qwen3", tie_word_embeddings=True), keep_softmax=(1,), **gated)
    names = ("decay", "feature_map", "mix", "scale", "qk_norm", "gates", "attention", "mlp", "norms", "embeddings")
    rates = {name: i / 1000 for i, name in enumerate(names, start=1)}
    what = stage("distill", train="all", learning_rates=rates, betas=(0.8, 0.9))
    optimizer = build_optimizer(model, what, *trainable_parameters(model, what))
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_group = {}
    for name, parameter in model.named_parameters():
        group = next(group for group, rate in rates.items() if rate == found[id(parameter)])
        by_group.setdefault(group, set()).add(name.removeprefix("model.").removeprefix("layers.2."))
    swap = "self_attn.swap"
    assert {f"{swap}.log_slope"} == {name for name in by_group["decay"] if name.startswith(swap)}
    assert f"{swap}.q_map.weight" in by_group["feature_map"]
    assert {f"{swap}.{x}" for x in ("decay_gate.weight", "decay_gate.bias", "output_gate.weight")} <= by_group["gates"]
    assert {f"{swap}.q_norm.gain", f"{swap}.k_norm.gain"} <= by_group["qk_norm"]
    assert {"self_attn.q_norm.weight", "self_attn.o_proj.weight", "layers.1.self_attn.v_proj.weight"} <= (
        by_group["attention"]
    )
    assert {"mlp.up_proj.weight"} <= by_group["mlp"]
    assert {"norm.weight", "input_layernorm.weight"} <= by_group["norms"]
    assert by_group["embeddings"] == {"embed_tokens.weight"}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}


def test_a_norm_beside_the_attention_is_no_part_of_it(tiny_family):
    group = grouping(build(tiny_family("opt")))
    layer = "model.decoder.layers.0"
    assert group(f"{layer}.self_attn_layer_norm.weight") == group(f"{layer}.final_layer_norm.weight") == "norms"
    assert group(f"{layer}.self_attn.q_proj.weight") == "attention"


def test_a_learning_rate_of_zero_leaves_a_group_out(llama):
    what = stage("distill", train="all", learning_rates={"embeddings": 0, "mix": 0})
    new, own = trainable_parameters(llama, what)
    assert not llama.lm_head.weight.requires_grad
    assert not any("embed" in name or name.endswith(".mix") for name in (*new, *own))
    alone = stage("distill", train="all", backbone_learning_rate=0, learning_rates={"mlp": 1e-3})
    assert all(".mlp." in name for name in trainable_parameters(llama, alone)[1])


@pytest.mark.parametrize(
    ("values", "group"), [({}, "mlp"), ({"train": "attention"}, "norms"), ({"train": "all"}, "gates")]
)
def test_a_learning_rate_for_nothing_is_refused(llama, values, group):
    what = stage("distill", **values, learning_rates={"scale": 1e-3, group: 1e-3})
    with pytest.raises(RecipeError, match=rf"^distill\.stages\.distill\.learning_rates\.{group}: .* there are: "):
        trainable_parameters(llama, what, "distill")


def test_a_group_that_does_not_exist_is_refused_with_its_path():
    stages = [{"stage": "align", "tokens": 1024, "length": 32, "learning_rate": 1e-2, "learning_rates": {"q": 1}}]
    with pytest.raises(RecipeError, match=r"distill\.stages\.0\.learning_rates\.q: Input should be 'decay', "):
        parse_recipe({"name": "x", "distill": {"stages": stages}})


@pytest.mark.parametrize(("scheduler", "middle", "end"), [("linear", 0.6, 0.2), ("constant", 1.0, 1.0)])
def test_other_schedules(llama, scheduler, middle, end):
    what = stage(steps=100, warmup=0.1, final_learning_rate=0.2, scheduler=scheduler)
    optimizer = build_optimizer(llama, what, *trainable_parameters(llama, what))
    factor = build_scheduler(optimizer, what).lr_lambdas[0]
    assert [factor(step) for step in (0, 10, 55, 100)] == pytest.approx([0.1, 1.0, middle, end])


def test_the_learning_rate_rises_then_falls_to_its_end(llama):
    what = stage(steps=100, warmup=0.1, final_learning_rate=0.2)
    optimizer = build_optimizer(llama, what, *trainable_parameters(llama, what))
    scheduler = build_scheduler(optimizer, what)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"] / 1e-2)
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["align", "distill"])
def test_accumulated_micro_batches_equal_one_batch(tiny_family, tmp_path, kind):
    found = []
    for micro in (4, 1, 2):
        model = build(tiny_family("llama")).double()
        what = stage(kind, steps=2, micro_batch=micro, max_grad_norm=0.05)
        loss = align_loss
        if kind == "distill":
            loss = lambda m, ids, what=what: distill_loss(m, ids, stage=what, teacher=None)  # noqa: E731
        (tmp_path / str(micro)).mkdir()
        figures = train(model, what, tmp_path / str(micro), loss)
        found.append((weights(model), figures["first_loss"]))
    for other, loss in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-5)
        for name, value in found[0][0].items():
            assert torch.allclose(other[name], value, rtol=0, atol=1e-6), name


def test_gradients_of_micro_batches_are_means_not_sums(tiny_family, tmp_path):
    norms = []
    for micro in (4, 1):
        model = build(tiny_family("llama"))
        gradients = []
        model.model.layers[0].self_attn.swap.mix.register_hook(gradients.append)
        (tmp_path / str(micro)).mkdir()
        train(model, stage(steps=1, micro_batch=micro), tmp_path / str(micro))
        norms.append(float(sum(gradients).norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.2)


@pytest.mark.parametrize("kind", ["align", "distill"])
def test_gradient_checkpointing_gives_the_same_weights(tiny_family, tmp_path, kind):
    found = []
    for checkpointing in (False, True):
        model = build(tiny_family("llama"))
        what = stage(kind, gradient_checkpointing=checkpointing)
        loss = functools.partial(align_loss, recompute=checkpointing)
        if kind == "distill":
            loss = lambda m, ids, what=what: distill_loss(m, ids, stage=what, teacher=None)  # noqa: E731
        (tmp_path / str(checkpointing)).mkdir()
        train(model, what, tmp_path / str(checkpointing), loss)
        found.append(weights(model))
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, rtol=0, atol=1e-5), name


def test_there_is_no_dropout_in_the_teacher_nor_in_the_student(tiny_family, tmp_path):
    model = build(tiny_family("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    seen = []

    def loss(m, ids):
        seen.extend((align_loss(m, ids), align_loss(m, ids)))
        return seen[-1]

    train(model, stage(steps=1), tmp_path, loss)
    assert seen[0] == seen[1]


def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(llama, tmp_path):
    llama.model.layers[2].self_attn.v_proj.weight.data.fill_(torch.nan)
    before = weights(llama)
    with pytest.raises(TrainingError, match=r"align: the loss is not finite at step 1;"):
        train(llama, stage(), tmp_path)
    for name, value in before.items():
        assert torch.equal(torch.nan_to_num(llama.get_parameter(name)), torch.nan_to_num(value)), name


@pytest.mark.parametrize("steps", [1, 3])
def test_a_gradient_that_is_not_finite_stops_as_well(llama, tmp_path, steps):
    calls = []

    def loss(model, ids):
        calls.append(align_loss(model, ids))
        # its value is 0, its gradient 0 times infinity
        bad = (model.model.layers[0].self_attn.swap.mix * 0).sum().sqrt()
        return calls[-1] + bad if len(calls) == steps else calls[-1]

    before = weights(llama)
    with pytest.raises(TrainingError, match=f"align: the gradient is not finite at step {steps};"):
        train(llama, stage(steps=4), tmp_path, loss)
    assert (changed(before, llama) == set()) == (steps == 1)
    assert all(torch.isfinite(value).all() for name, value in weights(llama).items() if "log_slope" not in name)
    log = tmp_path / "log.jsonl"
    assert (log.read_text().count("\n") if log.exists() else 0) == steps - 1


def test_figures_that_come_late_are_all_logged_and_still_stop(llama, tmp_path, monkeypatch):
    """As on a GPU, where the figures of a step are read when the next one has been launched."""
    monkeypatch.setattr("swapattn.progress.immediate", lambda device: False)
    train(llama, stage(steps=5), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    llama.model.layers[2].self_attn.v_proj.weight.data.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"align: the loss is not finite at step 1;"):
        train(llama, stage(), tmp_path)


def test_a_fused_optimizer_leaves_out_a_step_that_is_marked():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    parameter.grad = torch.full((3,), torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert torch.allclose(parameter, torch.full((3,), 0.9), atol=1e-2)


def test_the_share_of_peak_is_shown_and_logged_where_it_is_known(llama, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("swapattn.progress.share_of_peak", lambda rate, flops, device: 0.25)
    train(llama, stage(), tmp_path)
    assert "25.0% of peak" in capfd.readouterr().err
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["share_of_peak"] == 0.25


def test_a_stage_compiles_the_student_and_its_teacher(llama, tmp_path, monkeypatch, tiny_family):
    seen = []

    @contextlib.contextmanager
    def record(*models):
        seen.append(models)
        yield

    monkeypatch.setattr("swapattn.training.compiled_layers", record)
    train(llama, stage(), tmp_path)
    assert not seen
    teacher = tiny_family("llama")
    what = stage("distill", compile=True)
    loss = functools.partial(distill_loss, stage=what, teacher=teacher)
    options = {"title": "distill", "folder": tmp_path / "run", "log": tmp_path / "log.jsonl", "device": "cpu"}
    run_stage(llama, what, loss, Windows(), **options, seed=0, teacher=teacher)
    assert seen == [(llama, teacher)]


def test_a_checkpoint_that_was_being_written_is_passed_over(llama, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"half")
    assert train(llama, stage(), tmp_path)["steps"] == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_gives_the_models_own_logits(tiny_family, name):
    model = build(tiny_family(name))
    ids = ids_of(2, 15)
    with torch.no_grad():
        assert torch.allclose(
            output_embedding(model)(hidden_states(model, ids)), model(input_ids=ids).logits, atol=1e-5
        )
    check_head(model)


def test_a_head_that_is_not_known_is_refused(tiny_family):
    model = tiny_family("granite")
    model.config.logits_scaling = 7.0
    check_head(model)
    own = model.forward
    model.forward = lambda **kwargs: type("Output", (), {"logits": 2 * own(**kwargs).logits})
    with pytest.raises(UnsupportedModelError, match="scales its logits"):
        check_head(model)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedModelError, match="no plain matrix"):
        check_head(model)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])
def test_distill_loss_is_the_kl_of_all_logits(tiny_family, name, temperature):
    model, teacher = build(tiny_family(name)), tiny_family(name)
    ids = ids_of(2, 17)
    what = stage("distill", temperature=temperature, chunk=5)
    with torch.no_grad():
        p = (teacher(input_ids=ids).logits.double() / temperature).log_softmax(-1)
        q = (model(input_ids=ids).logits.double() / temperature).log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean() * temperature**2)
    assert expected > 1e-3
    for reference in (teacher, None):  # the student's own weights in softmax mode are the teacher
        loss = distill_loss(model, ids, stage=what, teacher=reference)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_a_mixture_with_cross_entropy_predicts_the_next_token(tiny_family):
    model, teacher = build(tiny_family("llama")), tiny_family("llama")
    ids = ids_of(2, 17)
    with torch.no_grad():
        q = model(input_ids=ids).logits.log_softmax(-1)
        p = teacher(input_ids=ids).logits.log_softmax(-1)
    plain = -q[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    reverse = (q.exp() * (q - p)).sum(-1).mean()
    both = stage("distill", losses={"cross_entropy": 0.9, "reverse_kl": 0.1})
    loss = distill_loss(model, ids, stage=both, teacher=teacher)
    assert float(loss.detach()) == pytest.approx(float(0.9 * plain + 0.1 * reverse), rel=1e-5)
    alone = stage("distill", losses={"cross_entropy": 1})
    with pytest.MonkeyPatch.context() as patch:  # no teacher, no second forward pass
        patch.setattr("swapattn.objectives.observing", None)
        assert float(distill_loss(model, ids, stage=alone, teacher=None).detach()) == pytest.approx(
            float(plain), rel=1e-5
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_align_loss_is_the_mean_error_of_the_layers_on_the_teachers_inputs(tiny_family, name):
    model, teacher = build(tiny_family(name)), tiny_family(name)
    ids = ids_of(2, 17)
    outputs, inputs = {}, {}
    # what enters the output projection is the attention output
    last = {"gpt2": "c_proj", "opt": "out_proj", "gpt_neox": "dense"}.get(name, "o_proj")
    owners = list(swaps(model))
    for path in owners:
        projection = teacher.get_submodule(f"{path}.{last}")
        projection.register_forward_pre_hook(lambda _m, args, path=path: outputs.update({path: args[0]}))
        own = model.get_submodule(path)
        own.swap.register_forward_hook(lambda _m, _a, out, path=path: inputs.update({path: out}))
    with torch.no_grad():
        teacher(input_ids=ids)
        loss = align_loss(model, ids)
        parts = [normalized_mse(inputs[path].flatten(2), outputs[path]) for path in owners]
    assert float(loss) == pytest.approx(float(torch.stack(parts).mean()), rel=1e-4)
    assert len(parts) == 3


def no_memory(on_cpu):
    if on_cpu:
        return RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory")
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize(
    ("what", "settings"),
    [
        (
            stage("distill", micro_batch=2),
            "lower micro_batch (now 2), or set gradient_checkpointing: true, or lower chunk (now chosen by itself), "
            "or lower length (now 24)",
        ),
        (stage(micro_batch=1, compile=True), "set gradient_checkpointing: true and compile: false, or lower length"),
        (stage("distill", micro_batch=1, gradient_checkpointing=True, chunk=9), "lower chunk (now 9), or lower length"),
    ],
    ids=["all", "align", "few"],
)
@pytest.mark.parametrize("on_cpu", [False, True])
def test_out_of_memory_says_what_to_lower(llama, tmp_path, what, settings, on_cpu, monkeypatch):
    def loss(model, ids):
        raise no_memory(on_cpu)

    monkeypatch.setattr("swapattn.training.compiled_layers", lambda *_: contextlib.nullcontext())
    with pytest.raises(TrainingError) as caught:
        train(llama, what, tmp_path, loss)
    assert str(caught.value).startswith(f"align: out of memory; under distill.stages.align: {settings}")


def test_an_error_of_another_process_keeps_its_own_words():
    def raised(message):
        try:
            raise SourceError(message)
        except SourceError as error:
            return SourceError(
                f"Caught SourceError in DataLoader worker 0.\n{''.join(traceback.format_exception(error))}"
            )

    message = "hub dataset a/b could not be read (ConnectionError: no route); use a local copy"
    assert str(of_worker(raised(message))) == message
    plain = SourceError(message)
    assert of_worker(plain) is plain


def test_other_errors_are_not_taken_for_a_lack_of_memory(llama, tmp_path):
    def loss(model, ids):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(llama, stage(), tmp_path, loss)


@pytest.mark.parametrize(
    ("batch", "micro", "count", "expected"),
    [(32, None, 1, (32, 1)), (32, 8, 1, (8, 4)), (32, None, 8, (4, 1)), (32, 8, 2, (8, 2)), (24, 6, 3, (4, 2))],
)
def test_a_batch_is_shared_out_whole(batch, micro, count, expected):
    found = shares(stage(batch=batch, micro_batch=micro, tokens=batch * 24), "align", count)
    assert found == expected
    assert found[0] * found[1] * count == batch


def test_a_batch_that_cannot_be_shared_out_is_refused():
    for count in (3, 8):
        with pytest.raises(UsageError, match=f"batch 4 cannot be shared out among {count} processes"):
            shares(stage(), "align", count)
