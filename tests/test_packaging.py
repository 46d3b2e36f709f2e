"""What holds between the files: import arrows, what stays light, what a wheel carries."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from swapattn.recipe import recipe_names

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "swapattn"
KERNELS = ROOT / "kernels" / "lightning_attention"

# The layers, from the outside in: a module imports from its own layer or a later one, never from an earlier one.
LAYERS = (
    {"__main__", "cli"},
    {"quickstart"},
    {"distillation", "evaluation", "generation", "sampling", "conversion", "bench", "report", "throughput"}
    | {"curves", "estimate", "preparation"}
    | {"kernel_bench", "kernel_lab"}
    | {"inspection", "verification", "selection", "families"},
    {
        "surgery",
        "calibration",
        "attention",
        "swap",
        "outside",
        "call",
        "adapters",
        "modeling",
        "made",
        "loading",
        "cache",
        "data",
        "losses",
        "sources",
        "tasks",
        "checkpoint",
    }
    | {
        "audit",
        "training",
        "objectives",
        "shards",
        "stored",
        "scores",
        "eval_table",
        "probes",
        "recall",
        "positions",
        "cost",
        "peak",
    }
    | {"rotary_check", "loss_kernel", "compilation", "replay"}
    | {"optimizer", "lora", "sharding", "logits", "vocabulary"}
    | {"processes", "progress", "reporting", "resumption", "stopping", "exclusive"}
    | {"graph", "integrity", "remote_code", "unpickling"}
    | {
        "scoring",
        "measurement",
        "baselines",
        "score_store",
        "significance",
        "thresholds",
        "perplexity",
        "carried",
        "mirror",
    }
    | {"streaming", "footprint", "model_card", "publishing"},
    {"recipe", "decay", "feature_map", "norms", "gates", "inputs", "errors", "wheels", "environment"}
    | {"rollback", "masks", "cells", "section", "stages", "text"},
)
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
OWNERS_OF_KERNELS = {"swap", "feature_map", "kernel_bench", "kernel_lab"}


def imports(file: Path, *, top_level: bool = False) -> set[str]:
    """Absolute dotted names of what `file` imports; `from .x import y` gives `<package>.x.y` and `<package>.x`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    base = file.resolve().relative_to(ROOT if file.is_relative_to(PACKAGE) else KERNELS.parent).with_suffix("").parts
    found: set[str] = set()
    for node in _statements(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = list(base[: len(base) - node.level]) if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def _statements(tree: ast.Module) -> list[ast.AST]:
    """What runs on import: everything outside functions and `if TYPE_CHECKING`."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        found.append(node)
        waiting += list(ast.iter_child_nodes(node))
    return found


def module_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def own(names: set[str]) -> set[str]:
    """Modules of swapattn among imported names."""
    parts = [name.split(".") for name in names if name.startswith("swapattn.")]
    return {part[1] for part in parts} & {module_of(file) for file in PACKAGE.rglob("*.py")}


def sources(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.py"))
    assert files, f"no sources in {folder}"
    return files


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


class TestLayout:
    def test_nothing_shadows_the_package_kernels_of_hugging_face(self):
        assert not (ROOT / "kernels" / "__init__.py").exists()
        assert not (ROOT / "tests" / "__init__.py").exists()

    def test_every_module_has_a_place_in_the_layers(self):
        assert {module_of(file) for file in sources(PACKAGE)} - {"__init__"} <= set(DEPTH)

    @pytest.mark.parametrize("file", sources(PACKAGE), ids=name_of)
    def test_imports_point_inwards(self, file):
        module = module_of(file)
        if module == "__init__":  # the public functions, loaded on first use
            return
        wrong = {name for name in own(imports(file)) if DEPTH[name] < DEPTH[module]}
        assert not wrong, f"{module} imports from an outer layer: {', '.join(sorted(wrong))}"

    @pytest.mark.parametrize("file", sources(PACKAGE), ids=name_of)
    def test_the_kernels_are_imported_in_few_places(self, file):
        if any(name.split(".")[0] == "lightning_attention" for name in imports(file)):
            assert module_of(file) in OWNERS_OF_KERNELS

    @pytest.mark.parametrize("file", sources(KERNELS), ids=name_of)
    def test_the_kernels_know_only_torch_triton_and_the_standard_library(self, file):
        roots = {name.split(".")[0] for name in imports(file) if name}
        assert roots <= {"torch", "triton", "lightning_attention"} | sys.stdlib_module_names

    @pytest.mark.parametrize("file", [PACKAGE / "__init__.py", *sources(PACKAGE / "cli")], ids=name_of)
    def test_what_answers_help_imports_nothing_heavy(self, file):
        names = imports(file, top_level=True)
        roots = {name.split(".")[0] for name in names}
        assert roots <= {"click", "swapattn"} | sys.stdlib_module_names
        assert own(names) <= {"cli", "errors", "environment"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    try:
        import hatchling  # noqa: F401
    except ImportError:  # pip builds in an environment of its own, which needs the package index
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


class TestWheel:
    def test_it_carries_code_recipes_text_and_types(self, wheel):
        names = set(zipfile.ZipFile(wheel).namelist())
        recipes = {path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
        assert recipes
        assert {f"swapattn/recipes/{name}" for name in recipes} <= names
        assert {f"swapattn/assets/{name}" for name in ("README.md", "train.txt.zst", "heldout.txt.zst")} <= names
        assert {"swapattn/py.typed", "swapattn/cli/__init__.py", "lightning_attention/__init__.py"} <= names
        assert not [name for name in names if name.startswith(("tests/", "kernels/"))]

    def test_unpacked_it_finds_its_own_recipes_and_text(self, wheel, tmp_path):
        zipfile.ZipFile(wheel).extractall(tmp_path)
        program = (
            "import json, pathlib, swapattn, swapattn.recipe as r, importlib.resources as i\n"
            "size = (i.files('swapattn') / 'assets' / 'train.txt.zst').stat().st_size\n"
            "print(json.dumps([swapattn.__file__, str(r.recipe_folder()), r.recipe_names(), size]))"
        )
        # PYTHONPATH comes before site-packages, and so before the editable install of this checkout
        answer = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
            check=True,
            capture_output=True,
            text=True,
        )
        package, folder, names, size = json.loads(answer.stdout)
        assert Path(package).is_relative_to(tmp_path)
        assert Path(folder).is_relative_to(tmp_path)
        assert names == recipe_names()
        assert names
        assert size == (PACKAGE / "assets" / "train.txt.zst").stat().st_size
