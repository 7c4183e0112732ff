"""The shape of the code: import order, what no module may do, and that importing changes nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAME = "recurrent_drafting"
PACKAGE = sorted((ROOT / NAME).glob("*.py"))
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.name != "setup.py")
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
MAX_FUNCTION_LINES = 50

# A module imports only modules above it; ``__init__`` is whatever takes names from the package itself.
ORDER = (
    "errors",
    "memory",
    "config",
    "assets",
    "draft_tree",
    "prompt_lookup",
    "kv_cache",
    "length_groups",
    "packed_model",
    "compiled_forward",
    "sampling",
    "acceptance",
    "drafter",
    "manifest",
    "checkpoint",
    "recycling",
    "beam_search",
    "verifier",
    "metrics",
    "tree_budget",
    "latency_cache",
    "decoding",
    "custom_generate",
    "hub",
    "lossless",
    "losses",
    "cli",
    "local_drafters",
    "formats",
    "sources",
    "token_rows",
    "data",
    "base_and_drafter",
    "engines",
    "self_data",
    "regeneration",
    "continuations",
    "distillation",
    "distributed",
    "hidden_cache",
    "tracking",
    "resume",
    "file_lock",
    "run_guard",
    "resumable_trainer",
    "muon",
    "trainer",
    "train_serve",
    "estimate",
    "training_data",
    "starting_drafter",
    "output_directory",
    "__init__",
    "result_files",
    "detokenizer",
    "reply_stream",
    "single_prompt",
    "prompt_files",
    "evaluation_log",
    "evaluation",
    "answers",
    "evaluation_tracking",
    "quick_run",
    "sweep",
    "plots",
    "report",
    "delivery",
    "chat",
    "vllm_proposer",
    "speculators_registry",
)
# They run inside optional packages, and nothing else imports them.
OPTIONAL = ("vllm_proposer", "speculators_registry")

# Everything a process shares that an import could disturb, before and after importing the package.
IMPORT_PROBE = f"""
import logging, random, signal, sys
import numpy, torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

def registered():
    return [*CONFIG_MAPPING._extra_content.values(), *MODEL_MAPPING._extra_content.values()]

def shared():
    return (
        torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
        len(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT),
    )

random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
before, foreign = shared(), registered()
import {NAME}
print([name for name in ("vllm", "wandb", "datasets", "gguf") if name in sys.modules])
for module in sys.argv[1:]:
    __import__(module)
print(before == shared())
print([kind.__name__ for kind in registered() if kind not in foreign])
"""


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Return the package's modules that a file imports, wherever in the file it does."""
    modules = {item.stem for item in PACKAGE}
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            head, _, rest = (node.module or "").partition(".")
            names = [rest.partition(".")[0]] if rest else [alias.name for alias in node.names]
            found |= {name if name in modules else "__init__" for name in names if head == NAME}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                head, _, rest = alias.name.partition(".")
                found |= {rest or "__init__"} if head == NAME else set()
    return found


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def broad(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)


def run(*commands: list[str]) -> list[tuple[int, str, str]]:
    """Run Python processes side by side; return code, output and errors of each."""
    processes = [
        subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    results = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, results, strict=True)]


def test_the_order_names_every_module_once() -> None:
    assert sorted(ORDER) == [path.stem for path in PACKAGE]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_a_module_imports_only_modules_above_it(path: Path) -> None:
    above = set(ORDER[: ORDER.index(path.stem)])
    assert imported(path) <= above


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS, *BENCHMARKS], ids=lambda path: path.stem)
def test_no_broad_except_and_no_long_function(path: Path) -> None:
    handlers = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ExceptHandler)]
    assert [handler.lineno for handler in handlers if broad(handler)] == []
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(path)}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_the_package_never_prints(path: Path) -> None:
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if ast.unparse(call.func) == "print"] == []


def public_functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """List the functions and methods that no underscore hides."""
    for item in ast.iter_child_nodes(node):
        if isinstance(item, (ast.ClassDef, ast.FunctionDef)) and not item.name.startswith("_"):
            if isinstance(item, ast.ClassDef):
                yield from public_functions(item, f"{item.name}.")
            else:
                yield prefix + item.name, item


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_public_tensors_have_their_shapes_in_the_docstring(path: Path) -> None:
    kinds = {"Tensor", "Tensor | None", "torch.Tensor"}
    without = []
    for name, function in public_functions(tree_of(path)):
        arguments = [*function.args.args, *function.args.kwonlyargs]
        annotations = {ast.unparse(item) for item in (*(a.annotation for a in arguments), function.returns) if item}
        if annotations & kinds and not re.search(r"`\[.*\]`", ast.get_docstring(function) or ""):
            without.append(name)
    assert without == []


def class_defaults() -> dict[str, str]:
    """Return the classes of the package that set a default, by the name of the field."""
    return {
        item.target.id: node.name
        for path in PACKAGE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Settings", "Arguments", "Grid"))
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None
    }


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_default_is_stated_twice(path: Path) -> None:
    known, twice = class_defaults(), []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
            names = {item.value.lstrip("-") for item in node.args if isinstance(item, ast.Constant)}
            default = next((item.value for item in node.keywords if item.arg == "default"), None)
            if isinstance(default, ast.Constant) and default.value is not None:
                twice += [f"--{name}: {known[name]} has its default" for name in sorted(names & set(known))]
    assert twice == []


def test_no_ten_lines_stand_twice() -> None:
    tests = sorted(path for path in (ROOT / "tests").rglob("*.py"))
    seen: dict[tuple[str, ...], str] = {}
    twice = []
    for path in [*PACKAGE, *SCRIPTS, *BENCHMARKS, *tests]:
        numbered = [(n, line.strip()) for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]
        code = [(n, line) for n, line in numbered if line and not line.startswith(("#", "import ", "from "))]
        for start in range(len(code) - 9):
            window = tuple(line for _, line in code[start : start + 10])
            place = f"{path.relative_to(ROOT)}:{code[start][0]}"
            if (first := seen.setdefault(window, place)) != place:
                twice.append(f"{first} and {place}")
    assert twice == []


@pytest.mark.slow
def test_importing_the_package_only_registers_its_classes_and_needs_no_optional_package() -> None:
    modules = [f"{NAME}.{module}" for module in ORDER if module not in ("__init__", *OPTIONAL)]
    [(_, out, err)] = run(["-c", IMPORT_PROBE, *modules])
    assert out.splitlines() == ["[]", "True", "['RecurrentDraftingConfig', 'Drafter']"], err


@pytest.mark.slow
def test_help_and_a_misspelt_flag_of_the_generation_script() -> None:
    script = "generate_speculator.py"
    (code, out, err), (misspelt_code, misspelt_out, misspelt_err) = run([script, "--help"], [script, "--interactiv"])
    assert (code, err) == (0, "") and "--interactive" in out
    assert (misspelt_code, misspelt_out) == (2, "")
    assert misspelt_err.count("\n") == 1 and "did you mean --interactive?" in misspelt_err
