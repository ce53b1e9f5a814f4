"""Whether the tests notice deliberate faults: mutants of the code, each run against the tests of its module.

    python benchmarks/mutation.py --sample 60 --seed 0 --csv mutation.csv

A mutant has one fault: another comparison or arithmetic operator, another constant, a negated condition, swapped
arguments, or a statement, a keyword argument or a call such as `.detach()` left out. It is compiled in memory, so no
file changes, and runs in a child of this process, which has imported all libraries already. A mutant is killed when a
test fails, or when it takes more processor time than `--seconds`. The same command resumes an interrupted table.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import csv
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # module or folder -> its tests, those that fail soonest first
    "distortions": "distortions",
    "guidance/base": "guidance_steps callback guidance stock_pipelines",
    "guidance/coefficients": "schedulers step",
    "guidance/curriculum": "curriculum restoration_guidance",
    "guidance/milo": "guidance_steps guidance callback",
    "guidance/modular": "modular",
    "guidance/reference": "guidance_steps guidance restoration_guidance",
    "guidance/region_adaptive": "restoration_guidance",
    "guidance/trace": "guidance_steps guidance",
    "guidance/x0": "step guidance_steps restoration_guidance guidance callback",
    "metric/card": "network official",
    "metric/loading": "network official refusals",
    "metric/loss": "network functional metric_properties",
    "metric/mask_finder": "mask_finder network",
    "metric/network": "network metric_properties mask_finder",
    "metric/torchmetrics": "torchmetrics",
    "metric/visualize": "visualize",
    "diffbir/cleaning": "cleaning",
    "diffbir/color": "color sampling_golden",
    "diffbir/fidelity_join": "fidelity",
    "diffbir/prompts": "pipeline_options diffbir_pipeline convert_diffbir adapters",
    "diffbir/rules": "cleaning sampling_golden pipeline_options",
    "diffbir/sampling": "sampling_golden diffbir_pipeline pipeline_options adapters",
    "diffbir/schedulers": "pipeline_options sampling_golden",
    "diffbir/stages": "fidelity restore",
    "diffbir/tiles": "pipeline_options sampling_golden",
    "pipelines/diffbir": "diffbir_pipeline pipeline_options callback sampling_golden fidelity adapters",
}
COLUMNS = ["folder", "module", "index", "line", "fault", "before", "after", "result", "killed_by", "seconds"]
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Add,
}  # fmt: skip
DROPPED_CALLS = {"abs", "clamp", "clamp_min", "detach", "eval", "flip", "float", "round", "requires_grad_"}


class Mutant(NamedTuple):
    """One fault, and where it is."""

    module: str  # such as "guidance/x0"
    index: int  # among the faults of the module
    line: int
    fault: str
    before: str
    after: str

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from all other mutants, as a table holds it."""
        return tuple(str(value) for value in self)


class Place(NamedTuple):
    """Where a syntax tree holds a node."""

    parent: ast.AST
    field: str
    index: int | None

    def put(self, node: ast.AST) -> None:
        """Put another node there."""
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def places(node: ast.AST) -> Iterator[tuple[Place, ast.AST]]:
    """Go through the nodes whose value a test can see: neither annotations nor texts of errors and warnings."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "ctx"):
            continue
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            if isinstance(child, ast.AST):
                yield Place(node, field, index if isinstance(value, list) else None), child
                if not isinstance(child, ast.Raise | ast.JoinedStr | ast.ImportFrom) and not is_warning(child):
                    yield from places(child)


def is_warning(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"


def variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield the faults of one node: what they are called, and what takes its place."""
    if type(node) in SWAPS:
        yield "operator", SWAPS[type(node)]()
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 1.25 or 1.0
        yield "constant", ast.Constant(other)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield "sign", node.operand
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        negated = copy.copy(node)
        negated.test = ast.UnaryOp(ast.Not(), node.test)
        yield "negated condition", negated
    elif isinstance(node, ast.Call):
        yield from call_variants(node)
    elif is_droppable(node):
        yield "dropped statement", ast.Pass()


def call_variants(call: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    first = call.args[:2]
    if len({ast.unparse(each) for each in first if not is_text(each)}) == 2:
        yield "swapped arguments", with_fields(call, args=[first[1], first[0], *call.args[2:]])
    named = [keyword for keyword in call.keywords if keyword.arg]
    for keyword in named:
        yield "dropped argument", with_fields(call, keywords=[each for each in call.keywords if each is not keyword])
    roles = {keyword.arg: keyword.value for keyword in named}
    if {"dist", "ref"} <= roles.keys():
        other = {"dist": roles["ref"], "ref": roles["dist"]}
        swapped = [ast.keyword(each.arg, other.get(each.arg or "", each.value)) for each in call.keywords]
        yield "swapped arguments", with_fields(call, keywords=swapped)
    if isinstance(call.func, ast.Attribute) and call.func.attr in DROPPED_CALLS:
        yield "dropped call", call.func.value


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Starred | ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def with_fields(node: ast.Call, **fields: list) -> ast.Call:
    changed = copy.copy(node)
    vars(changed).update(fields)
    return changed


def is_droppable(node: ast.AST) -> bool:
    """Say whether a statement can be left out without leaving a name undefined, which any test would notice."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id in {each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)}
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break)


def parse(module: str) -> ast.Module:
    return ast.parse(source_of(module).read_text(encoding="utf-8"))


def source_of(module: str) -> Path:
    return ROOT / ("" if module.startswith("pipelines/") else "milo_latent") / f"{module}.py"


def faults(module: str) -> Iterator[tuple[ast.Module, Place, str, ast.AST, ast.AST]]:
    tree = parse(module)
    for place, node in list(places(tree)):
        for fault, other in variants(node):
            yield tree, place, fault, node, other


def mutants_of(module: str) -> list[Mutant]:
    """Return all mutants of a module."""
    found, line = [], 0
    for index, (_, place, fault, node, other) in enumerate(faults(module)):
        line = getattr(node, "lineno", getattr(place.parent, "lineno", line))
        before, after = shortened(text_of(node, place), text_of(other, place))
        found.append(Mutant(module, index, line, fault, before, after))
    return found


def text_of(node: ast.AST, place: Place) -> str:
    """Return code in one line, that of an operator with what it stands between."""
    if isinstance(node, ast.operator | ast.cmpop | ast.boolop):
        parent = copy.copy(place.parent)
        vars(parent)[place.field] = [node] if place.index is not None else node
        if isinstance(parent, ast.Compare) and len(parent.comparators) > 1:
            return f"{type(node).__name__} {place.index} of {ast.unparse(place.parent)}"
        node = parent
    return " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())


def shortened(before: str, after: str) -> tuple[str, str]:
    """Cut what two long texts have in common at their start, and what is too long for a line."""
    pairs = enumerate(zip(before, after, strict=False))
    common = next((at for at, (one, other) in pairs if one != other), min(len(before), len(after)))
    start = max(common - 40, 0) if max(len(before), len(after)) > 80 else 0
    return before[start : start + 80], after[start : start + 80]


def mutated_tree(mutant: Mutant) -> ast.Module:
    for index, (tree, place, _, _, other) in enumerate(faults(mutant.module)):
        if index == mutant.index:
            place.put(other)
            return ast.fix_missing_locations(tree)
    raise ValueError(f"Expected a fault of {mutant.module}, got number {mutant.index}. Start with another table.")


class MutantLoader(importlib.machinery.SourceFileLoader):
    """Loads one module with its fault."""

    tree: ast.Module

    def get_code(self, fullname: str):
        """Compile the mutated tree."""
        return compile(self.tree, self.path, "exec")


class MutantFinder(importlib.abc.MetaPathFinder):
    """Finds the module that has the fault, and leaves all others to the finders after it."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = "milo_latent." + mutant.module.replace("/", ".").removesuffix(".__init__")
        self.loader = MutantLoader(self.name, str(source_of(mutant.module)))
        self.loader.tree = mutated_tree(mutant)

    def find_spec(self, fullname, path=None, target=None):
        """Return the specification of the module, None for others."""
        if fullname != self.name:
            return None
        folders = [str(Path(self.loader.path).parent)] if self.loader.path.endswith("__init__.py") else None
        return importlib.util.spec_from_file_location(
            fullname, self.loader.path, loader=self.loader, submodule_search_locations=folders
        )


def load_libraries() -> None:
    """Import all that the modules need, and forget the modules themselves."""
    for module in TESTS:
        if source_of(module).is_file():
            importlib.import_module("milo_latent." + module.replace("/", "."))
    importlib.import_module("milo_latent.testing")
    for name in [name for name in sys.modules if name.split(".")[0] == "milo_latent"]:
        del sys.modules[name]
    gc.freeze()


def tests_of(module: str) -> list[str]:
    names = TESTS.get(module) or TESTS[module.split("/")[0]]
    return [str(ROOT / "tests" / f"test_{name}.py") for name in names.split()]


def run_tests(mutant: Mutant, output: Path, seconds: int) -> tuple[int, float]:
    """Run the mutant's tests in a child of this process; return its exit status, 0 where all pass, and its time."""
    child = os.fork()
    if child:
        _, status, usage = os.wait4(child, 0)
        return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    code = 2
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.meta_path.insert(0, MutantFinder(mutant))
        options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not packaging", f"--rootdir={ROOT}"]
        code = int(pytest.main([*options, "--override-ini=addopts=-rfE", *tests_of(mutant.module)]))
    finally:
        os._exit(code)


def judge(mutant: Mutant, seconds: int) -> dict[str, object]:
    """Return the row of one mutant."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        status, time = run_tests(mutant, output, seconds)
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    reports = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    failed = [report.rpartition("/")[2] for report in reports if "test_" in report]
    killed_by = "time" if status < 0 else next(iter(failed), "" if status == 0 else f"exit status {status}")
    return mutant._asdict() | {
        "folder": mutant.module.split("/")[0], "result": "survived" if status == 0 else "killed",
        "killed_by": killed_by, "seconds": round(time, 1),
    }  # fmt: skip


def chosen_modules(patterns: list[str]) -> list[str]:
    """Return the modules that have tests here, those whose name begins with one of the patterns."""
    known = []
    for name in TESTS:
        folder = ROOT / "milo_latent" / name
        known += [f"{name}/{path.stem}" for path in sorted(folder.glob("*.py"))] if folder.is_dir() else [name]
    return [module for module in known if not patterns or module.startswith(tuple(patterns))]


def read_rows(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Return the rows of the table by the mutant."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {tuple(row[name] for name in Mutant._fields): row for row in csv.DictReader(file)}


def print_table(rows: list[dict]) -> None:
    results = Counter((row["folder"], row["result"]) for row in rows)
    print("\n| folder | mutants | killed | share |\n| --- | ---: | ---: | ---: |")
    for folder in [*sorted({row["folder"] for row in rows}), "all"]:
        killed, survived = (
            sum(count for key, count in results.items() if folder in (key[0], "all") and key[1] == result)
            for result in ("killed", "survived")
        )
        print(f"| {folder} | {killed + survived} | {killed} | {killed / max(killed + survived, 1):.1%} |")


def main() -> None:
    """Judge a sample of the mutants, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="such as guidance/x0 (default: all that have tests here)")
    parser.add_argument("--sample", type=int, default=60, help="number of mutants; 0 takes all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--seconds", type=int, default=180, help="processor time after which a mutant counts as killed")
    parser.add_argument("--csv", type=Path, required=True, help="table to write or to resume")
    options = parser.parse_args()
    modules = chosen_modules(options.modules)
    mutants = [mutant for module in modules for mutant in mutants_of(module)]
    if options.sample:
        mutants = random.Random(options.seed).sample(mutants, min(options.sample, len(mutants)))
    sys.path.insert(0, str(ROOT))
    load_libraries()
    rows = read_rows(options.csv)
    for number, mutant in enumerate(mutants, start=1):
        if mutant.key not in rows:
            rows[mutant.key] = judge(mutant, options.seconds)
            with contextlib.closing(options.csv.open("a", newline="", encoding="utf-8")) as file:
                writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(rows[mutant.key])
        row = rows[mutant.key]
        print(f"{number}/{len(mutants)} {row['result']}: {mutant.module}:{mutant.line} {mutant.fault}: ", end="")
        print(f"{mutant.before} -> {mutant.after} ({row['killed_by']}, {row['seconds']} s)", flush=True)
    print_table([rows[mutant.key] for mutant in mutants])


if __name__ == "__main__":
    main()
