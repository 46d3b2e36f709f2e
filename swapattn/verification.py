"""`verify`: whether a checkpoint is what it claims to be, one row of a table for each claim."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from . import sources
from .attention import swaps
from .audit import beyond_linear, lengths
from .cache import CACHE
from .call import AttentionCall
from .checkpoint import Checkpoint, find
from .environment import say
from .errors import CheckpointError, SwapattnError
from .integrity import altered_files, damaged_shards, foreign_code, pickled_files, rewritten
from .loading import load, load_teacher
from .modeling import swap_classes
from .positions import LIMITS, positions_of
from .remote_code import use_own_code
from .shards import INDEX, decays, read_config, read_weight_map
from .stored import trained_tensors
from .surgery import SwapPlan, plan
from .swap import LightningSwap

DOUBLE_LIMIT = 600_000_000  # parameters up to which the comparisons run in fp64
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}  # of the largest logit; the models' own norms compute in fp32
CALIBRATED_SLOPES = (0.001, 5.0)  # the range of `decay.slope_of_distance`
_RELOAD = """
import sys
folder, target, blocked = sys.argv[1:]
if blocked == "blocked":
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("swapattn", "lightning_attention"):
                raise ImportError(name + " is blocked")
    sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
ids = load_file(target + ".ids")["ids"]
with torch.no_grad():
    save_file({"logits": model(input_ids=ids, use_cache=False).logits.contiguous()}, target)
"""


@dataclass(frozen=True)
class Row:
    """One claim: `passed` is None where it could not be looked at because another one failed."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verification:
    """All rows of one checkpoint."""

    path: Path
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every claim holds."""
        return all(row.passed for row in self.rows)

    @property
    def failed(self) -> list[str]:
        """Names of the rows that failed."""
        return [row.name for row in self.rows if row.passed is False]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {"path": str(self.path), "passed": self.passed, "rows": [asdict(row) for row in self.rows]}

    def to_table(self) -> str:
        """One line a row."""
        words = {True: "pass", False: "FAIL", None: "not run"}
        width = max(len(row.name) for row in self.rows)
        return "\n".join(f"{words[row.passed]:<8}{row.name:<{width}}  {row.detail}" for row in self.rows)


class _Failed(Exception):
    """A claim does not hold; the message is the detail."""


def verify(
    checkpoint: str | Path | None = None,
    *,
    teacher: str | Path | None = None,
    trust_remote_code: bool = False,
    reload: bool = True,
) -> Verification:
    """Check a converted or distilled checkpoint against its teacher and its own record.

    Args:
        checkpoint: folder; default the newest in the current directory.
        teacher: alias, hub id, folder or GGUF file; default the recorded one.
        trust_remote_code: run Python files of the checkpoint that differ from this swapattn's, and allow code that
            its base type came with (`remote_code`).
        reload: also load it in two fresh processes, of which one cannot import swapattn.

    Raises:
        UsageError, CheckpointError: it is no checkpoint, or its record is damaged.
    """
    return _Verifier(find(model=checkpoint), teacher, trust_remote_code).run(reload)


class _Verifier:
    def __init__(self, checkpoint: Checkpoint, teacher: str | Path | None, trust: bool) -> None:
        self.checkpoint, self.folder, self.trust = checkpoint, checkpoint.path, trust
        self.teacher = teacher
        self.rows: list[Row] = []
        self.model: Any = None
        self.teacher_folder: Path | None = None
        self.plan: SwapPlan | None = None

    def run(self, reload: bool) -> Verification:
        with tempfile.TemporaryDirectory(prefix="swapattn-") as scratch:
            whole = self._row("files", self._files)
            loads = self._row("loads", self._load if whole else None)
            processes = self._start(Path(scratch)) if loads and reload else {}
            self._row("weights", self._weights if whole else None)
            self._row("linear in length", self._linear if loads else None)
            self._row("decay", self._decay if whole else None)
            self._row("cached = uncached", self._cached if loads else None)
            self._row("padded = alone", self._padded if loads else None)
            self._row("GQA mapping", self._heads if loads else None)
            for name, process in processes.items():
                self._row(name, process)
            if reload and not loads:
                self._row("reload", None)
        return Verification(self.folder, tuple(self.rows))

    def _row(self, name: str, check: Callable[[], str] | None) -> bool:
        if check is None:
            self.rows.append(Row(name, None, "needs the rows above"))
            return False
        say(f"checking: {name}")
        try:
            self.rows.append(Row(name, True, check()))
        except _Failed as failed:
            self.rows.append(Row(name, False, str(failed)))
        except Exception as error:  # a damaged checkpoint may fail in any way; that is a result, not a crash
            line = " ".join(str(error).split())[:300]
            text = line if isinstance(error, SwapattnError) else f"{type(error).__name__}: {line}"
            self.rows.append(Row(name, False, text))
        return bool(self.rows[-1].passed)

    def _files(self) -> str:
        try:
            weight_map = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError) as error:
            raise _Failed(f"{INDEX} cannot be read ({type(error).__name__})") from error
        problems = damaged_shards(self.folder, weight_map)
        if not problems and self.checkpoint.teacher_path.is_dir():
            problems = altered_files(self.checkpoint.teacher_path)
        if problems:
            raise _Failed("; ".join(problems))
        if pickled := pickled_files(self.folder):
            raise _Failed(f"{pickled[0]} is pickled; a checkpoint holds safetensors only")
        return f"{len(set(weight_map.values()))} safetensors files whole, {len(weight_map)} tensors"

    def _load(self) -> str:
        use_own_code(self.folder, trust=self.trust)
        self.model, _ = load(self.folder, dtype=torch.float32)
        return f"{sum(p.numel() for p in self.model.parameters()):,} parameters, none missing or unexpected"

    def _original(self) -> Path:
        if self.teacher_folder is None:
            if self.teacher is not None:
                self.teacher_folder = sources.materialize(sources.resolve(str(self.teacher))).path
            elif (self.checkpoint.teacher_path / "config.json").is_file():
                self.teacher_folder = self.checkpoint.teacher_path
            else:
                raise _Failed(f"no teacher at {self.checkpoint.teacher_path}: name it with --teacher")
        return self.teacher_folder

    def _plan(self) -> SwapPlan:
        """What the recorded recipe says, found anew from the teacher's config."""
        if self.plan is None:
            self.plan = plan(read_config(self._original()), self.checkpoint.recipe.convert)
        return self.plan

    def _trained(self) -> set[str]:
        """Stored names that were trained, under all names of a tied matrix."""
        trained = set(self.checkpoint.record.get("trained", ()))
        if self.model is None:
            return trained
        known = trained & dict(self.model.named_parameters(remove_duplicate=False)).keys()
        with contextlib.suppress(CheckpointError):  # stored in a form that is not known here
            trained |= trained_tensors(self.folder, read_weight_map(self.folder), self.model, known).keys()
        return trained

    def _weights(self) -> str:
        teacher = self._original()
        theirs, ours = read_weight_map(teacher), read_weight_map(self.folder)
        trained = self._trained()
        absent = sorted(set(theirs) - set(ours))
        added = sorted(name for name in set(ours) - set(theirs) if ".swap." not in name)
        if absent or added:
            raise _Failed(f"{(absent + added)[0]} is {'missing' if absent else 'not the teacher’s'}")
        pairs: dict[tuple[str, str], list[str]] = {}
        for name in theirs.keys() - trained:
            pairs.setdefault((theirs[name], ours[name]), []).append(name)
        different: dict[str, list[str]] = {}
        for (their_file, our_file), names in sorted(pairs.items()):
            if (teacher / their_file).samefile(self.folder / our_file):  # one file under two names
                known = self.checkpoint.record.get("weights", {})
                if rewritten(self.folder, {our_file: known[our_file]} if our_file in known else {}):
                    raise _Failed(f"{our_file}, one file with the teacher's {their_file}, has been written over")
                continue
            with safe_open(teacher / their_file, "pt") as a, safe_open(self.folder / our_file, "pt") as b:
                found = [name for name in sorted(names) if not _same_bits(a.get_tensor(name), b.get_tensor(name))]
            if found:
                different.setdefault(our_file, []).extend(found)
        if different:
            files = "; ".join(f"{file}: {len(names)}, first {names[0]}" for file, names in sorted(different.items()))
            raise _Failed(f"tensors differ from the teacher's and are not listed as trained: {files}")
        same = len(theirs.keys() - trained)
        return f"{same} of {len(theirs)} tensors bit-equal to the teacher's, {len(theirs) - same} listed as trained"

    def _linear(self) -> str:
        config = self.model.config
        local = config.swapattn["spec"]["local"]
        window = local["window"] + local["sinks"] if local else 0
        kept = [site.path for site in self._plan().keep]
        model_class: Any = swap_classes(config.swapattn["base_model_type"])[1]
        roomy = type(config).from_dict(config.to_dict())
        text = roomy.get_text_config()
        for name in LIMITS:
            if getattr(text, name, None):  # without values positions cost nothing
                setattr(text, name, max(getattr(text, name), 2 * lengths(window)[1]))
        with torch.device("meta"):
            empty = model_class._from_config(roomy, dtype=torch.bfloat16)
        try:
            found = beyond_linear(empty.eval(), window=window)
        except Exception:  # masks of some families ask for values, which the meta device lacks
            found = beyond_linear(self.model, window=window, device="cpu")
        outside = {path: why for path, why in found.items() if not any(_in_line(path, k) for k in kept)}
        if outside:
            path, why = min(outside.items())
            raise _Failed(f"{path}: {why}")
        softmax = f"softmax in {len(kept)} kept layers" if kept else "no kept layers"
        return f"nothing grows with the square of the length; {softmax}"

    def _decay(self) -> str:
        weight_map = read_weight_map(self.folder)
        stored: dict[str, torch.Tensor] = {}
        for name in sorted(name for name in weight_map if name.endswith(".swap.log_slope")):
            with safe_open(self.folder / weight_map[name], "pt") as shard:
                stored[name] = shard.get_tensor(name)
        slopes = decays(stored)
        for path, values in slopes.items():
            if not all(0 <= value < float("inf") for value in values):
                raise _Failed(f"{path}: slopes {values} are not finite and ≥ 0")
        recorded: Mapping[str, list[float]] | None = self.checkpoint.record.get("decay")
        trained = {name.removesuffix(".swap.log_slope") for name in self.checkpoint.record.get("trained", ())}
        static = {path: values.tolist() for path, values in self._plan().slopes().items() if path not in trained}
        for source, wanted in (("recorded", recorded or {}), ("the schedule's", static)):
            for path in wanted.keys() & slopes.keys():
                if not _close(slopes[path], wanted[path]):
                    raise _Failed(f"{path}: slopes {_short(slopes[path])}, {source} {_short(wanted[path])}")
        if recorded is None and not self.checkpoint.recipe.convert.decay.learnable:
            low, high = CALIBRATED_SLOPES
            for path in slopes.keys() & trained:
                if not all(low * 0.999 <= value <= high * 1.001 for value in slopes[path]):
                    raise _Failed(f"{path}: slopes {_short(slopes[path])} lie outside calibration's [{low}, {high}]")
        every = [value for values in slopes.values() for value in values]
        origin = f"schedule {self.checkpoint.recipe.convert.decay.schedule}" if static else "as recorded"
        return f"{len(every)} slopes in [{min(every, default=0):.3g}, {max(every, default=0):.3g}], {origin}"

    def _inputs(self, rows: int = 1) -> torch.Tensor:
        """Token ids `[rows, T]`, longer than the local window."""
        window = max((swap.window + swap.sinks for swap in swaps(self.model).values()), default=0)
        length = min(window + 41, positions_of(self.model))
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.get_text_config().vocab_size
        return torch.randint(3, vocabulary, (rows, length), generator=generator)

    def _double(self) -> torch.dtype:
        if sum(p.numel() for p in self.model.parameters()) <= DOUBLE_LIMIT:
            _in_double(self.model)
            return torch.float64
        return torch.float32

    def _compare(self, logits: Callable[[Any], tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> str:
        """Compare what `logits` gives of the checkpoint; where they differ, it may be as in the teacher.

        Layers of other kinds, such as the mamba layers of jamba, are the teacher's own.
        """
        error = _difference(*logits(self.model))
        same = ""
        if not error <= TOLERANCE[dtype]:
            failed = _Failed(f"logits differ by {error:.1e} of the largest")
            try:
                teacher, _ = load_teacher(self._original(), dtype=torch.float32)
            except (SwapattnError, _Failed):
                raise failed from None
            theirs = _difference(*logits(_in_double(teacher) if dtype == torch.float64 else teacher))
            if not error < 10 * theirs:
                raise failed
            same = f" (the teacher's: {theirs:.1e})"
        return f"largest difference {error:.1e} of the largest logit{same}, {str(dtype).removeprefix('torch.')}"

    @torch.no_grad()
    def _cached(self) -> str:
        dtype = self._double()
        ids = self._inputs()
        first = max(1, ids.shape[1] - 20)  # of a model with few positions a single token
        pieces = [ids[:, :first], ids[:, first : first + 12], *torch.split(ids[:, first + 12 :], 1, dim=1)]

        def logits(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
            cache, found = None, []
            for piece in pieces:
                output = model(input_ids=piece, use_cache=True, **{CACHE: cache})
                cache = output[CACHE]
                found.append(output.logits)
            return torch.cat(found, 1), model(input_ids=ids, use_cache=False).logits

        return self._compare(logits, dtype) + "; prefill, a chunk, 8 steps"

    @torch.no_grad()
    def _padded(self) -> str:
        dtype = self._double()
        ids = self._inputs(2)
        short = ids.shape[1] // 2 + 3
        takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        details = []
        for side, real in (("left", slice(-short, None)), ("right", slice(0, short))):
            batch, mask = ids.clone(), torch.ones_like(ids)
            batch[1], mask[1] = 1, 0
            batch[1, real], mask[1, real] = ids[1, :short], 1
            inputs = {"input_ids": batch, "attention_mask": mask}
            inputs |= {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if takes_positions else {}

            def logits(
                model: Any, real: slice = real, inputs: dict[str, torch.Tensor] = inputs
            ) -> tuple[torch.Tensor, torch.Tensor]:
                alone = model(input_ids=ids[1:, :short], use_cache=False).logits[0]
                return model(**inputs, use_cache=False).logits[1, real], alone

            try:
                details.append(self._compare(logits, dtype))
            except _Failed as failed:
                raise _Failed(f"padded on the {side}: {failed}") from None
        largest = max(details, key=lambda text: float(text.split()[2]))  # as a number, not as a word
        return f"{largest}; left and right"

    @torch.no_grad()
    def _heads(self) -> str:
        dtype = self._double()
        groups = set()
        for path, swap in swaps(self.model).items():
            shape = self.model.config.swapattn["layers"][path]
            wrong = _misread_heads(swap, shape, dtype)
            if wrong is not None:
                raise _Failed(f"{path}: changing KV head {wrong[0]} changes query heads {wrong[1]}, not {wrong[2]}")
            groups.add(f"{shape['heads']} query heads on {shape['kv_heads']} KV heads")
        return f"each KV head reaches its own query heads and no other; {', '.join(sorted(groups))}"

    def _start(self, scratch: Path) -> dict[str, Callable[[], str]]:
        """Start both fresh processes; what is returned waits for one and compares."""
        names = {"reload": "importable", "reload, swapattn blocked": "blocked"}
        foreign = foreign_code(self.folder, self.model.config.swapattn["base_model_type"])
        if foreign and not self.trust:
            text = (
                f"not run: {', '.join(foreign[:3])} {'is' if len(foreign) == 1 else 'are'} not what this swapattn "
                "writes; read it, and allow it to run with --trust-remote-code"
            )
            return {name: _failing(text) for name in names}
        ids = self._inputs()[:, :48]
        with torch.no_grad():
            expected = self.model(input_ids=ids, use_cache=False).logits
        checks = {}
        for name, how in names.items():
            target = scratch / how
            save_file({"ids": ids.contiguous()}, f"{target}.ids")
            modules = scratch / f"modules-{how}"  # a cache of its own: another checkpoint's code is never taken
            environment = {
                **os.environ,
                "HF_MODULES_CACHE": str(modules),
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-c", _RELOAD, str(self.folder.resolve()), str(target), how]
            process = subprocess.Popen(
                command, cwd=scratch, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            checks[name] = _waiting(process, target, expected)
        return checks


def _in_double(model: Any) -> Any:
    model.double()
    model.set_experts_implementation("eager")  # the fused product of matrices has no fp64
    return model


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, in units of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def _failing(text: str) -> Callable[[], str]:
    def fail() -> str:
        raise _Failed(text)

    return fail


def _waiting(process: subprocess.Popen[str], target: Path, expected: torch.Tensor) -> Callable[[], str]:
    def wait() -> str:
        _, talk = process.communicate()
        if process.returncode:
            lines = [line for line in talk.splitlines() if line.strip()]
            raise _Failed((lines or [f"exit code {process.returncode}"])[-1][:300])
        found = load_file(target)["logits"]
        error = _difference(found, expected)
        if found.shape != expected.shape or not error <= 1e-5:
            raise _Failed(f"logits differ by {error:.1e} of the largest")
        return "same logits" if error == 0 else f"same logits to {error:.1e} of the largest"

    return wait


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.dim() else bool(a == b)


def _close(found: list[float], wanted: list[float]) -> bool:
    pairs = list(zip(found, wanted, strict=False))
    return len(found) == len(wanted) and all(abs(a - b) <= 1e-6 * max(abs(a), abs(b)) for a, b in pairs)


def _short(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values[:4]) + (", …]" if len(values) > 4 else "]")


def _in_line(path: str, kept: str) -> bool:
    """Whether a module is a kept layer, a part of it, or above it: the whole model makes the mask of kept layers."""
    return f"{path}.".startswith(f"{kept}.") or f"{kept}.".startswith(f"{path}.")


def _misread_heads(
    swap: LightningSwap, shape: Mapping[str, int], dtype: torch.dtype
) -> tuple[int, list[int], list[int]] | None:
    """The first KV head whose change shows in other query heads than the group that repeating it explicitly gives."""
    heads, kv_heads, width, value_dim = (shape[name] for name in ("heads", "kv_heads", "head_dim", "value_dim"))
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # A joint layer has no linear branch before the first tokens have left the window.
    length = 7 + swap.window + swap.sinks
    q, k, v = draw(1, heads, length, width), draw(1, kv_heads, length, width), draw(1, kv_heads, length, value_dim)
    hidden = draw(1, length, shape["hidden_size"]) if swap.decay_gate or swap.output_gate else None
    owners = torch.arange(kv_heads).repeat_interleave(heads // kv_heads)  # as transformers' repeat_kv

    def output(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        linear = (q, k) if swap.rotary_dims else None
        result: torch.Tensor = swap(AttentionCall(q, k, v, None, None, 0, hidden=hidden, linear=linear))
        return result

    normalizer, swap.normalizer = swap.normalizer, "none" if swap.normalizer == "rms_all" else swap.normalizer
    try:
        before = output(k, v)
        for head in range(kv_heads):
            other_k, other_v = k.clone(), v.clone()
            other_k[:, head] += draw(1, length, width)
            other_v[:, head] += draw(1, length, value_dim)
            change = (output(other_k, other_v) - before).abs().amax((0, 1, 3))
            changed = (change > 1e-6 * before.abs().max()).nonzero().flatten().tolist()
            wanted = (owners == head).nonzero().flatten().tolist()
            if changed != wanted:
                return head, changed, wanted
    finally:
        swap.normalizer = normalizer
    return None
