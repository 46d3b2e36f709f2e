"""Everything that an evaluation measures on one model, taken from an earlier run where that measured the same."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .environment import hardware, say, versions
from .errors import CheckpointError
from .perplexity import WINDOWS, embedded_perplexity
from .score_store import Store, fingerprint, key_of
from .scoring import Scored, Scorer, Settings, from_record, plain_sample
from .tasks import Unit


@dataclass(frozen=True)
class Extras:
    """What is measured beside the tasks.

    `text` is a file for the perplexity by position; `longest` bounds the tokens of a probe and `documents` is the
    number of those of recall and passkey at each length (None: as the device allows); `generation` says whether the
    probes that are no matter of length are among them.
    """

    perplexity: bool = False
    text: Path | None = None
    probes: bool = False
    cost: bool = False
    longest: int | None = None
    documents: int | None = None
    generation: bool = True


@dataclass(frozen=True)
class Subject:
    """A model to measure: `role` names it, `load` gives (model, tokenizer) from `folder`.

    `variant` says what `load` changes in the model that the folder holds.
    """

    role: str
    folder: Path
    load: Callable[[], tuple[Any, Any]]
    store: Store
    device: str
    dtype: str = "as stored"
    variant: str = ""


@dataclass
class Measured:
    """What was found: by task, and by name of the extra as plain values; `machine` if a model was loaded for it."""

    tasks: dict[str, Scored] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    machine: str = ""


def measure(
    subject: Subject, units: Sequence[Unit], settings: Settings, extras: Extras, *, samples: Path | None = None
) -> Measured:
    """Measure one model; it is loaded only if something has to be measured, and freed at the end.

    Args:
        subject: the model.
        units: the tasks, loaded.
        settings: how they are scored.
        extras: what else.
        samples: folder for `samples_TASK_ROLE.jsonl`; None = write none.

    Raises:
        CheckpointError: the model cannot be loaded or has no tokenizer.
        SwapattnError: out of memory even for one sequence at a time.
    """
    return _Measurement(subject, settings, samples).run(units, extras)


_EDITION = 3  # one more when an extra measures something else under the same settings: what was kept is not taken then


class _Measurement:
    def __init__(self, subject: Subject, settings: Settings, samples: Path | None) -> None:
        self.subject, self.settings, self.samples = subject, settings, samples
        on_gpu = subject.device.startswith("cuda")
        self.identity = {
            "model": fingerprint(subject.folder),
            "variant": subject.variant,
            "dtype": subject.dtype,
            # two GPUs differ in the last digits, two CPUs of one thread pool or another hardly
            "device": hardware(subject.device) if on_gpu else subject.device,
            "versions": {k: v for k, v in versions().items() if k in ("swapattn", "torch", "transformers", "lm_eval")},
        }
        self.measured = Measured()

    def run(self, units: Sequence[Unit], extras: Extras) -> Measured:
        keys = {unit.name: key_of({**self.identity, **self._task(unit)}) for unit in units}
        known = self._known(units, keys)
        missing = [unit.name for unit in units if unit.name not in known]
        if missing:
            say(f"scoring the {self.subject.role} model on {', '.join(missing)}")
        for unit in units:
            scored = known.get(unit.name)
            if scored is None:
                scored = self._scorer.score(unit)
                self.subject.store.put(keys[unit.name], scored.to_record(samples=self.samples is not None))
            self.measured.tasks[unit.name] = scored
            self._write_samples(scored)
        self._measure_extras(extras)
        self.__dict__.pop("_scorer", None)
        self.__dict__.pop("_loaded", None)  # before the other one is loaded: never two models in memory
        gc.collect()
        return self.measured

    def _known(self, units: Sequence[Unit], keys: Mapping[str, str]) -> dict[str, Scored]:
        known = {}
        for unit in units:
            record = self.subject.store.get(keys[unit.name])
            scored = from_record(record, samples=self.samples is not None) if record else None
            if scored is not None:
                known[unit.name] = scored
        if known:
            say(f"the {self.subject.role} model's results kept from an earlier run: {', '.join(known)}")
        return known

    def _task(self, unit: Unit) -> dict[str, Any]:
        documents = unit.digest(self.settings.limit, self.settings.num_fewshot)
        return {"task": unit.name, "version": unit.version, "documents": documents, **asdict(self.settings)}

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = self.subject.load()
        if tokenizer is None:
            raise CheckpointError(f"{self.subject.folder} has no tokenizer, which evaluation needs")
        parameter = next(model.parameters())
        self.measured.machine = f"{hardware(str(parameter.device))}, {str(parameter.dtype).removeprefix('torch.')}"
        return model, tokenizer

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(*self._loaded, self.settings)

    def _measure_extras(self, extras: Extras) -> None:
        seed = self.settings.seed or 0
        if extras.perplexity:
            self._remember(
                "perplexity",
                {"windows": WINDOWS, "length": "512 at most"},
                lambda: asdict(embedded_perplexity(*self._loaded)),
            )
        if extras.text is not None:
            from .probes import perplexity_of_file

            text = hashlib.sha256(extras.text.read_bytes()).hexdigest()
            path, longest = extras.text, extras.longest
            self._remember(
                "text",
                {"text": text, "longest": longest},
                lambda: perplexity_of_file(*self._loaded, path, longest=longest),
            )
            # kept by content: an earlier run may have known the text by another path
            self.measured.extras["text"] = {**self.measured.extras["text"], "text": str(path)}
        if extras.probes:
            from .probes import collect

            options: dict[str, Any] = {
                "seed": seed,
                "longest": extras.longest,
                "documents": extras.documents,
                "generation": extras.generation,
            }
            self._remember("probes", options, lambda: collect(*self._loaded, **options))
        if extras.cost:
            from .cost import measure as measure_cost

            say(f"measuring state and speed of the {self.subject.role} model")
            # a time is never taken from an earlier run: another load on the machine would pass for a difference
            self.measured.extras["cost"] = measure_cost(self._loaded[0], beyond=True)

    def _remember(self, name: str, parts: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> None:
        key = key_of({**self.identity, "extra": name, "edition": _EDITION, **parts})
        found = self.subject.store.get(key)
        if found is None:
            say(f"measuring the {self.subject.role} model: {name}")
            found = compute()
            self.subject.store.put(key, found)
        else:
            say(f"the {self.subject.role} model's {name} kept from an earlier run")
        self.measured.extras[name] = found

    def _write_samples(self, scored: Scored) -> None:
        if self.samples is None:
            return
        for leaf, samples in scored.samples.items():
            name = re.sub(r"[^\w.-]", "_", leaf)
            path = self.samples / f"samples_{name}_{self.subject.role}.jsonl"
            scratch = path.with_name(f".{path.name}.writing")
            with scratch.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(plain_sample(sample), ensure_ascii=False) + "\n" for sample in samples)
            os.replace(scratch, path)
