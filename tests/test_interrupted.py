"""A distillation that is killed, told to stop, out of disk, or run by two processes ends as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import swapattn.data
import swapattn.training
from swapattn.conversion import convert
from swapattn.distillation import distill
from swapattn.errors import TrainingError, UsageError
from swapattn.recipe import parse_recipe

STAGE = {"tokens": 768, "length": 32, "batch": 4, "learning_rate": 1e-2, "warmup": 0.4}
LORA = {"train": "lora", "backbone_learning_rate": 1e-2, "micro_batch": 2, "chunk": 20}
EVERYTHING = {"train": "all", "backbone_learning_rate": 1e-3}
APART = {
    "document_mask": True,
    "losses": {"forward_kl": 0.5, "cross_entropy": 0.5},
    "gradient_checkpointing": True,
}
SHORTEST = 8  # so that windows of 32 tokens hold several documents
RECIPE = {
    "name": "tiny",
    "convert": {"local": {"window": 8, "sinks": 2}},
    "distill": {
        "save_steps": 2,
        "stages": [
            {"stage": "calibrate", "tokens": 256, "length": 64},
            {"stage": "align", **STAGE},
            {"stage": "distill", **STAGE, **LORA},
            {"stage": "distill", **STAGE, **EVERYTHING, **APART, "micro_batch": 1, "chunk": 20},
        ],
    },
}

# One process imports once and forks a child for each run; a child does to itself what `harm` says.
PROGRAM = """
import gc, json, os, signal, sys, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from swapattn import data, distillation, processes, training
data.SHORTEST = 8
from swapattn.recipe import parse_recipe

gc.freeze()  # Trainer collects garbage after every stage, in each child
start, work, recipe, runs = Path(sys.argv[1]), Path(sys.argv[2]), *map(json.loads, sys.argv[3:])

def harmed(harm, where, stage, step):
    number = getattr(signal, harm, None)
    if harm == "NAN":  # in one process
        original = training.StageTrainer.compute_loss
        def patched(self, *args, **kwargs):
            here = (Path(self.args.output_dir).name, self.state.global_step + 1, os.environ["RANK"])
            return original(self, *args, **kwargs) * (float("nan") if here == (stage, step, "1") else 1)
        training.StageTrainer.compute_loss = patched
    elif where == "save":  # the weights are written, the optimiser's state is not
        original = training.StageTrainer._save_optimizer_and_scheduler
        def patched(self, folder):
            if self.state.global_step == step and Path(folder).parent.name == stage:
                os.kill(os.getpid(), number)
            original(self, folder)
        training.StageTrainer._save_optimizer_and_scheduler = patched
    else:
        original = training.StageProgress.on_pre_optimizer_step
        def patched(self, args, state, control, **kwargs):
            original(self, args, state, control, **kwargs)
            if (self.run, state.global_step + 1) == (stage, step):
                os.kill(os.getpid(), number)
        training.StageProgress.on_pre_optimizer_step = patched

def counted(file):  # write how many numbers of each stage's model and teacher are here, and how many there are in all
    original = training.StageTrainer.__init__
    def patched(self, loss, **kwargs):
        if os.environ.get("RANK") and not processes.sharded() and kwargs["args"].output_dir.endswith("stage-3"):
            kwargs["model"].unused = torch.nn.Parameter(torch.zeros(()))  # some families have such
        original(self, loss, **kwargs)
        models = (kwargs["model"], getattr(loss, "keywords", {}).get("teacher"))
        held = [[(getattr(p, "_local_tensor", p).numel(), p.numel()) for p in m.parameters()] for m in models if m]
        with file.open("a") as log:
            log.write(json.dumps([list(map(sum, zip(*sizes))) for sizes in held]) + "\\n")
    training.StageTrainer.__init__ = patched

def child(out, harm, environment):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
        os.environ.update(environment)
        if harm:
            harmed(*harm)
        counted(work / f"{out}-{os.environ.get('RANK')}.jsonl")
        distillation.distill(start, recipe=parse_recipe(recipe), output=work / out, device="cpu")
        code = 0
    except Exception as error:
        traceback.print_exc()
    finally:
        os._exit(code)

codes = []
for out, harm, environments in runs:
    print("=== a run", file=sys.stderr, flush=True)
    pids = [child(out, harm, environment) for environment in environments]
    codes.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
print(json.dumps(codes))
"""


MARK = "=== a run\n"


@pytest.fixture(scope="module")
def start(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "c"
    return convert(tiny_teacher, folder, recipe=parse_recipe(RECIPE)).path


@pytest.fixture(scope="module", autouse=True)
def _short_documents():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swapattn.data, "SHORTEST", SHORTEST)
        yield


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The run that nothing happens to."""
    return distill(start, recipe=parse_recipe(RECIPE), output=tmp_path_factory.mktemp("whole") / "w", device="cpu").path


KILLED = [
    ("SIGKILL", "step", "stage-1", 4),
    ("SIGKILL", "save", "stage-1", 4),  # only half of the checkpoint is there
    ("SIGKILL", "step", "stage-2", 5),
    ("SIGKILL", "step", "stage-3", 6),
]
TOLD = [("SIGTERM", "step", "stage-1", 3), ("SIGINT", "save", "stage-3", 2)]
SHARED = [("SIGTERM", "step", "stage-3", 3)]
SHARDED = [("NAN", "step", "stage-1", 4), ("SIGKILL", "step", "stage-2", 4), ("SIGTERM", "step", "stage-3", 3)]


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """Folder of all runs that were interrupted, their exit codes and what they said, each by its name."""
    work = tmp_path_factory.mktemp("interrupted")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**base, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    wanted = [("killed", harm, [{}]) for harm in [*KILLED, None]] + [("told", harm, [{}]) for harm in [*TOLD, None]]
    wanted += [("shared", harm, ranks) for harm in [*SHARED, None]]
    fsdp = [{**rank, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} for rank in ranks]
    # what the processes saved goes on in one, and the other way round
    wanted += zip(["sharded"] * 4, [*SHARDED, None], [fsdp, [{}], fsdp, fsdp], strict=True)
    command = [sys.executable, "-c", PROGRAM, str(start), str(work), json.dumps(RECIPE), json.dumps(wanted)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    codes, said = {}, {}
    found = json.loads(answer.stdout.splitlines()[-1])
    parts = answer.stderr.split(MARK)[1:]
    for (name, _, _), code, text in zip(wanted, found, parts, strict=True):
        codes.setdefault(name, []).append(code)
        said[name] = said.get(name, "") + text
    return work, codes, said


def losses(folder):
    records = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    return [(record["stage"], record["step"], record["loss"]) for record in records]


def weights(folder):
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def assert_same(found, expected, tolerance):
    assert [row[:2] for row in losses(found)] == [row[:2] for row in losses(expected)]
    assert [row[2] for row in losses(found)] == pytest.approx([row[2] for row in losses(expected)], abs=tolerance)
    other = weights(found)
    for key, value in weights(expected).items():
        assert torch.allclose(other[key], value, rtol=0, atol=tolerance), key


def test_killed_at_any_step_the_loss_curve_is_that_of_an_uninterrupted_run(whole, runs):
    work, codes, said = runs
    assert codes["killed"] == [[-9], [-9], [-9], [-9], [0]], said["killed"]
    assert said["killed"].count("resuming") == 4
    assert_same(work / "killed", whole, 1e-6)
    assert not (work / ".killed.run").exists()


def test_sigterm_and_ctrl_c_save_the_step_and_say_how_to_go_on(whole, runs):
    work, codes, said = runs
    assert codes["told"] == [[1], [1], [0]], said["told"]
    assert "align: stopped by SIGTERM, saved after step 3 of 6; repeat the command to go on" in said["told"]
    # told while it was saving step 2, it takes one step more
    assert "saving after this step; Ctrl-C again ends at once" in said["told"]
    assert "distill 3: stopped by Ctrl-C, saved after step 3 of 6; repeat the command to go on" in said["told"]
    assert_same(work / "told", whole, 1e-6)


def test_two_processes_are_one(whole, runs):
    work, codes, said = runs
    assert codes["shared"] == [[1, 1], [0, 0]], said["shared"]
    assert "distill 3: stopped by SIGTERM, saved after step 3 of 6" in said["shared"]
    assert said["shared"].count("resuming") == 1, "one process talks"
    assert_same(work / "shared", whole, 1e-5)
    assert not (work / ".shared.run").exists()


def test_a_full_disk_loses_no_earlier_checkpoint(start, whole, tmp_path, monkeypatch):
    original = swapattn.training.StageTrainer._save_rng_state

    def full(self, folder):
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
        original(self, folder)

    monkeypatch.setattr(swapattn.training.StageTrainer, "_save_rng_state", full)
    with pytest.raises(TrainingError, match=r"checkpoint of step 4 .*No space left.*that of step 2 is kept: free some"):
        distill(start, recipe=parse_recipe(RECIPE), output=tmp_path / "out", device="cpu")
    assert [path.name for path in (tmp_path / ".out.run" / "stage-1").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    distill(start, recipe=parse_recipe(RECIPE), output=tmp_path / "out", device="cpu")
    assert_same(tmp_path / "out", whole, 1e-6)


def _crash_at_three(self, args, state, control, **_):
    self.trainer.record_step(state.global_step + 1)
    if state.global_step == 3:
        raise KeyboardInterrupt


def test_a_torn_log_is_mended_and_another_way_to_save_and_launch_is_the_same_run(start, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(swapattn.training.StageProgress, "on_pre_optimizer_step", _crash_at_three)
    with pytest.raises(KeyboardInterrupt):
        distill(start, recipe=parse_recipe(RECIPE), output=tmp_path / "out", device="cpu")
    monkeypatch.undo()
    with (tmp_path / ".out.run" / "train.jsonl").open("a") as file:
        file.write('{"stage": "align", "st')
    stages = [s if s["stage"] == "calibrate" else {**s, "cuda_graph": False} for s in RECIPE["distill"]["stages"]]
    other = parse_recipe({**RECIPE, "distill": {**RECIPE["distill"], "save_steps": None, "stages": stages}})
    distill(start, recipe=other, output=tmp_path / "out", device="cpu")
    assert_same(tmp_path / "out", whole, 1e-6)


def test_two_processes_that_share_the_parameters_are_one(whole, runs):
    work, codes, said = runs
    assert codes["sharded"] == [[1, 1], [-9], [1, 1], [0, 0]], said["sharded"]
    assert "align: the gradient is not finite at step 4; no weight was changed by it" in said["sharded"]
    assert "distill 3: stopped by SIGTERM, saved after step 3 of 6" in said["sharded"]
    assert_same(work / "sharded", whole, 1e-5)
    assert not (work / ".sharded.run").exists()
    for rank in range(2):
        rows = [json.loads(line) for line in (work / f"sharded-{rank}.jsonl").read_text().splitlines()]
        assert all(model[0] == pytest.approx(model[1] / 2, rel=0.01) for model, *_ in rows)
        teacher = rows[-1][1]
        head = 320 * 32
        assert teacher[0] == pytest.approx(head + (teacher[1] - head) / 2, rel=0.01), "all but the output embedding"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "not run under DeepSpeed: shard with FSDP2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "add --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "does not offload"),
    ],
)
def test_other_ways_of_sharding_are_refused(start, tmp_path, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        distill(start, recipe=parse_recipe(RECIPE), output=tmp_path / "out", device="cpu")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, {"ACCELERATE_USE_FSDP": "true"}], ids=["ddp", "fsdp"])
def test_torchrun_and_the_command_line(start, whole, tmp_path, variables):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(parse_recipe(RECIPE).to_yaml())
    program = tmp_path / "run.py"
    program.write_text(f"from swapattn import data; data.SHORTEST = {SHORTEST}\nfrom swapattn.cli import main; main()")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program), "distill"]
    options = ["--recipe", str(recipe), "--device", "cpu", "-o", str(tmp_path / "out"), "--json"]
    environment = {**os.environ, **variables}
    answer = subprocess.run(
        [*command, str(start), *options], env=environment, capture_output=True, text=True, check=True
    )
    assert len(json.loads(answer.stdout)["stages"]) == 4
    assert_same(tmp_path / "out", whole, 1e-5)
    shutil.rmtree(tmp_path / "out")
