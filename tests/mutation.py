"""Break the code on purpose, one place at a time, and see whether a test fails.

    python -m tests.mutation [--count 60] [--seed 1] [--skip 0] [--only data/packing ...]

A mutant is a copy of the source with one change: a comparison turned, a term swapped, a condition
negated, a call or a keyword dropped. Mutants are drawn by the seed, spread evenly over `MODULES`.
Each runs the test file that mirrors its module; where no test fails, those of its folder and those
that import the module. A mutant that hangs counts as killed. What is printed at the end is the kill
rate.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mipha"

MODULES = (
    *("alignment/dpo", "alignment/ppo", "alignment/preference", "alignment/rollout"),
    *("assistant/assistant", "comparison/statistics"),
    *("data/batches", "data/collate", "data/encode", "data/held_out", "data/images"),
    *("data/mixture", "data/order", "data/packing", "data/check/text", "data/check/whole_set"),
    *("deploy/gguf/language_model", "deploy/gguf/mmproj", "deploy/serve/batching"),
    *("deploy/serve/request_fields", "deploy/serve/requests", "engine/optimizer"),
    *("engine/states", "engine/trackers", "evaluation/answers", "evaluation/predict"),
    *("evaluation/score", "evaluation/benchmarks/easy_vqa", "evaluation/benchmarks/gqa"),
    *("evaluation/benchmarks/mmbench", "evaluation/benchmarks/mme", "evaluation/benchmarks/mmvet"),
    *("evaluation/benchmarks/pope", "evaluation/benchmarks/scienceqa"),
    *("evaluation/benchmarks/seedbench", "evaluation/benchmarks/textvqa"),
    *("evaluation/benchmarks/vizwiz", "evaluation/benchmarks/vqav2", "models/attention"),
    *("models/loss", "models/modeling", "models/processing", "models/projector"),
    *("models/tuning", "models/vision_tower", "planning/plan", "training/loop"),
    *("training/pipeline", "training/placement", "training/proof"),
)

_TURNED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
}
_SWAPPED = {"any": "all", "all": "any", "min": "max", "max": "min"}
_PRELOADED = ("pytest", "hypothesis", "scipy.stats", "torch", "peft", "PIL.Image")
_PRELOADED += ("transformers.models.llava.modeling_llava", "transformers.models.auto")
"""Imported once: a forked process has them already."""

_LONGEST = 120
_WIDER_LEFT_OUT = ("e2e", "house", "docs", "studies")


class Mutant(NamedTuple):
    """One change of one module.

    Args:
        module: Path in the package, without suffix.
        line: Line of the change.
        old: Source of what is replaced.
        new: Source that stands there instead.
        text: The whole module with it.
    """

    module: str
    line: int
    old: str
    new: str
    text: str

    def __str__(self) -> str:
        old, new = self.old, " ".join(self.new.split())
        if max(len(old), len(new)) > _LONGEST:  # begin where the two part
            new = new.removeprefix("(").replace("'", '"')
            pairs = enumerate(zip(old.replace(" ", ""), new.replace(" ", ""), strict=False))
            same = max(0, next((place for place, (a, b) in pairs if a != b), 0) - 20)
            old, new = (f"...{text[same:][:_LONGEST]}..." for text in (old, new))
        return f"{self.module}:{self.line}: {old} -> {new}"


def mutants_of(module: str) -> Iterator[Mutant]:
    """Yield every mutant of a module."""
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    lines = source.encode().splitlines(keepends=True)
    for node, new in _changes(ast.parse(source)):
        start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
        end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
        whole = source.encode()
        old, changed = whole[start:end].decode(), (whole[:start] + new.encode() + whole[end:])
        yield Mutant(module, node.lineno, " ".join(old.split()), new, changed.decode())


def _changes(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Yield nodes, each with the source that replaces it."""
    skipped = (ast.Assert, ast.JoinedStr, ast.arguments)  # messages, annotations and defaults
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Raise):
            yield child, "pass"
            continue
        if isinstance(child, skipped) or _is_of_types(child):
            continue
        for new in _variants(child):
            yield child, new
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            child.decorator_list = []
        yield from _changes(child)


def _is_of_types(node: ast.AST) -> bool:
    """Return whether a node only says types: a subscript of types, an `if TYPE_CHECKING`."""
    guard = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    alias = isinstance(node, ast.AnnAssign) and node.value is None
    return guard or alias


def _variants(node: ast.AST) -> Iterator[str]:
    """Yield the sources that may stand in a node's place."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in _TURNED:
            yield _with(node, ops=[_TURNED[type(op)]()])
        case ast.BoolOp():
            yield _with(node, op=_TURNED[type(node.op)]())
            for place in range(len(node.values)):
                yield _with(node, values=node.values[:place] + node.values[place + 1 :])
        case ast.UnaryOp(op=ast.Not()):
            yield f"({ast.unparse(node.operand)})"
        case ast.BinOp() if type(node.op) in _TURNED:
            yield _with(node, op=_TURNED[type(node.op)]())
        case ast.Constant(value=bool(value)):
            yield str(not value)
        case ast.Constant(value=int(value)):
            yield str(value + 1)
        case ast.IfExp():
            yield _with(node, body=node.orelse, orelse=node.body)
        case ast.Call(func=ast.Name(id=name)) if name in _SWAPPED:
            yield _with(node, func=ast.Name(_SWAPPED[name]))
        case ast.Call():
            for place, word in enumerate(node.keywords):
                if word.arg not in (None, "description", "strict"):
                    yield _with(node, keywords=node.keywords[:place] + node.keywords[place + 1 :])
        case ast.Expr(value=ast.Call()):
            yield "pass"


def _with(node: ast.expr, **fields: object) -> str:
    """Return the source of an expression with other fields."""
    changed = type(node)(**{**dict(ast.iter_fields(node)), **fields})
    return f"({ast.unparse(ast.fix_missing_locations(changed))})"


def draw(modules: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Draw mutants, the same number of every module as far as they go."""
    chance = random.Random(seed)
    pools = [list(mutants_of(module)) for module in modules]
    for pool in pools:
        chance.shuffle(pool)
    chance.shuffle(pools)
    drawn = [pool[turn] for turn in range(count) for pool in pools if turn < len(pool)]
    return drawn[:count]


def tests_of(module: str) -> tuple[list[Path], list[Path]]:
    """Return the test file that mirrors a module, and those of its folder or that import it."""
    dotted = module.replace("/", ".")
    above, _, name = dotted.rpartition(".")
    imports = [f"mipha.{dotted} import", f"mipha.{dotted}\n", f"from mipha.{above} import {name}\n"]
    if above == "evaluation.benchmarks":  # found by name, not imported
        imports.append("list_benchmarks()")
    using = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path.relative_to(ROOT / "tests").parts[0] not in _WIDER_LEFT_OUT
        and any(text in path.read_text(encoding="utf-8") for text in imports)
    ]
    mirror = ROOT / "tests" / Path(module).parent / f"test_{name}.py"
    wider = sorted({*using, *mirror.parent.glob("test_*.py")} - {mirror})
    return ([mirror], wider) if mirror.is_file() else (wider, [])


def passes(source: Path, tests: Sequence[Path], limit: float) -> tuple[bool, float]:
    """Run test files on a source folder in a forked process: torch is imported once for all.

    Returns:
        Whether they passed within the limit, and the seconds that they took.
    """
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.environ["PYTHONPATH"] = str(source)
        sys.path.insert(0, str(source))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        import pytest

        code = pytest.main(["-x", "-p", "no:cacheprovider", *map(str, tests)])
        os._exit(int(code))

    # Wait, then end what the tests have left running.
    status = None
    while status is None and time.monotonic() - start < limit:
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status == 0, time.monotonic() - start


def survives(mutant: Mutant, source: Path, clean: dict[tuple[Path, ...], float]) -> str:
    """Return how a mutant fared: killed, killed by wider tests, survived.

    It is not judged where the tests fail without it, which is then tried again for the next.
    """
    file = source / "mipha" / f"{mutant.module}.py"
    original = file.read_text(encoding="utf-8")
    for tests, fate in zip(tests_of(mutant.module), ("killed", "killed wider"), strict=True):
        if not tests:
            continue
        if (key := tuple(tests)) not in clean:
            passed, seconds = passes(source, tests, limit=3600)
            if not passed:
                return "not judged"
            clean[key] = seconds
        file.write_text(mutant.text, encoding="utf-8")
        passed, _ = passes(source, tests, limit=30 + 4 * clean[key])
        file.write_text(original, encoding="utf-8")
        if not passed:
            return fate
    return "survived"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, help="mutants of the draw that were run")
    parser.add_argument("--only", nargs="*", default=MODULES, help="modules, such as data/packing")
    options = parser.parse_args()

    for name in _PRELOADED:
        import_module(name)

    os.chdir(ROOT)
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    drawn = draw(options.only, options.count, options.seed)[options.skip :]
    fates, clean = Counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PACKAGE, Path(folder, "mipha"), ignore=shutil.ignore_patterns("*.pyc"))
        for mutant in drawn:
            fate = survives(mutant, Path(folder), clean)
            fates[fate] += 1
            print(f"{fate:12} {mutant}", flush=True)

    killed = fates["killed"] + fates["killed wider"]
    print(
        f"seed {options.seed}: {len(drawn)} mutants, {fates['killed']} killed by the mirror file, "
        f"{fates['killed wider']} by wider tests, {fates['survived']} survived, "
        f"{fates['not judged']} not judged, because the tests fail without them: "
        f"{100 * killed / max(1, killed + fates['survived']):.1f} % killed"
    )


if __name__ == "__main__":
    main()
