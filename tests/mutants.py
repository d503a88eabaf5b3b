"""Does a test notice when a line is wrong? Changes the code in one place at a time, and runs the tests that should fail.

    make mutants MUTANTS_ARGS="objective attention --sample 50"

Stands beside the tests, as it judges them and not the code. mutmut's operators make the mutants; mutmut's own runner would
import torch for each, which takes longer than the tests. Here one process imports the libraries, and forks a child for every
mutant, which imports a copy of this repository in which that one place is changed.
"""

import argparse
import gc
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import libcst as cst
import psutil
import pytest
from mutmut.mutation.mutators import mutation_operators, operator_string

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "custom_diffusion"
COMMANDS = [
    "test_command.py::test_bad_input_is_one_line_and_leaves_nothing",
    "test_command.py::test_a_function_has_the_defaults_of_its_flags",
]
# What is changed -> the tests that should notice, the quickest first.
MODULES = {
    "training/objective.py": ["test_objective.py"],
    "training/samples.py": ["test_data.py"],
    "training/augmentation.py": ["test_data.py"],
    "model/attention.py": ["test_invariants.py", "test_objective.py"],
    "model/tokens.py": [
        "test_invariants.py",
        "test_objective.py",
        "test_inputs.py::test_tokens_that_the_tokenizer_refuses",
    ],
    "weights/format.py": [
        "test_weights.py",
        "test_compress.py",
        "test_export.py::test_what_was_kept_and_how_it_is_used_is_told",
        "test_hub.py::test_weights_are_read_by_their_id_and_nothing_else_is_fetched",
        "test_pickles.py::test_loading_into_a_pipeline_runs_nothing",
        "test_inputs.py::test_weights_files_of_other_things",
        "test_inputs.py::test_weights_files_cut_anywhere",
    ],
    "weights/pipeline.py": ["test_weights.py", "test_compress.py"],
    "weights/low_rank.py": ["test_compress.py", "test_export.py"],
    "weights/least_squares.py": ["test_merge.py"],
    "model/text_features.py": ["test_merge.py"],
    "tools/merge.py": ["test_merge.py", *COMMANDS],
    "tools/export.py": ["test_export.py", *COMMANDS],
    "training/settings.py": [
        "test_settings.py",
        "test_checkpoints.py::test_other_flags_are_named",
        "test_resuming.py::test_the_flags_that_are_named_keep_the_samples_per_step",
        "test_resuming.py::test_checkpoints_that_do_not_record_it_compare_the_flags_behind_it",
    ],
    "training/checkpoints.py": ["test_checkpoints.py", "test_resuming.py"],
    # Whole runs, so only some of them.
    "train_custom_diffusion.py": [
        "test_settings.py",
        "test_checkpoints.py",
        "test_resuming.py",
        "test_inputs.py::test_the_run_ends_before_it_writes",
        "test_course.py::test_gradients_are_clipped_to_max_grad_norm",
        "test_trackers.py",
    ],
}
WORDING_CALLS = {"warn", "print", "InputError", "ValueError", "RuntimeError", "RunStopped", "info", "warning"}
WORDING_KEYWORDS = {"help", "desc", "unit", "metavar", "description"}
MEMORY = 16 << 30  # bytes of address space; a mutant that allocates without end must not take the machine along


class Mutations(cst.CSTVisitor):
    """Collects (node, its replacement): what mutmut does, statements left out, and conditions turned round.

    Not what a message says, nor annotations.
    """

    def __init__(self):
        self.found = []
        self.in_wording = 0

    def on_visit(self, node):
        if isinstance(node, (cst.Annotation, cst.Import, cst.ImportFrom, cst.Decorator)):
            return False
        self.in_wording += _is_wording(node)
        for kind, operator in mutation_operators:
            if isinstance(node, kind) and not _is_progress_bar(node):
                replacements = list(operator(node))
                if operator is operator_string:
                    replacements = [] if self.in_wording else replacements[:1]  # another case is much the same as XX
                self.found += [(node, replacement) for replacement in replacements]
        if isinstance(node, cst.Expr) and isinstance(node.value, cst.Call):
            self.found.append((node, cst.Pass()))
        if isinstance(node, (cst.If, cst.While, cst.CompIf)):
            self.found.append((node, node.with_changes(test=_negated(node.test))))
        return True

    def on_leave(self, node):
        self.in_wording -= _is_wording(node)


def _is_wording(node):
    if isinstance(node, cst.Call):
        name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
        return isinstance(name, cst.Name) and name.value in WORDING_CALLS
    if isinstance(node, cst.Arg):
        return node.keyword is not None and node.keyword.value in WORDING_KEYWORDS
    return isinstance(node, cst.ConcatenatedString)


def _is_progress_bar(node):
    return isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value == "tqdm"


def _negated(test):
    inner = test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    return cst.UnaryOperation(cst.Not(whitespace_after=cst.SimpleWhitespace(" ")), inner)


def mutants_of(code: str) -> list[tuple[cst.Module, cst.CSTNode, cst.CSTNode]]:
    """(module, node, what takes its place) of every mutant."""
    module = cst.parse_module(code)
    mutations = Mutations()
    module.visit(mutations)
    return [(module, node, replacement) for node, replacement in mutations.found]


def difference(code: str, mutated: str) -> str:
    """For example "17: - the line  + the line as it is now"."""
    before, after = code.splitlines(), mutated.splitlines()
    start = _same(before, after)
    end = _same(before[start:][::-1], after[start:][::-1])
    gone = [f"- {line.strip()}" for line in before[start : len(before) - end]]
    new = [f"+ {line.strip()}" for line in after[start : len(after) - end]]
    return f"{start + 1}: {'  '.join(gone + new)}"


def _same(one, other):
    """How many lines from the first on are the same."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


class Bench:
    """A copy of the repository, and the process from which the children that test it are forked."""

    def __init__(self, work: Path):
        self.work = work
        self.copy = work / "copy"
        shutil.copytree(
            ROOT, self.copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "output", "work")
        )

    def baseline(self, tests: list[str]) -> float:
        """The seconds of computing that the tests take without any mutant, once all they import is there."""
        self.order = {}
        sys.dont_write_bytecode = False  # of the unchanged code, for the children to come
        if self.test(tests, 600) != "survived":
            raise SystemExit(f"the tests fail without any mutant\n{(self.work / 'log').read_text()[-3000:]}")
        sys.dont_write_bytecode = True  # that of one mutant could be taken for the next one's
        self.preload()
        gc.freeze()  # else the garbage collector touches, and so copies, every page of a child
        self.order = json.loads((self.work / "durations").read_text())
        before = _computed()
        self.test(tests, 600)
        return _computed() - before

    def test(self, tests: list[str], limit: float) -> str:
        """ "survived", "caught", or "timeout", which is caught too: it computed for `limit` seconds, or waited far longer."""
        (self.work / "status").unlink(missing_ok=True)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            self._run_tests(tests, int(limit))
            os._exit(0)
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > started + 20 * limit:
                for process in (*psutil.Process(child).children(recursive=True), psutil.Process(child)):
                    process.kill()
                os.waitpid(child, 0)
                return "timeout"
            time.sleep(0.02)
        if os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) == signal.SIGXCPU:
            return "timeout"
        status = self.work / "status"  # missing if the child has crashed
        return "survived" if status.exists() and status.read_text() == "0" else "caught"

    def _run_tests(self, tests, limit):
        shutil.rmtree(self.work / "temporary", ignore_errors=True)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        log = os.open(self.work / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.chdir(self.copy)
        sys.path[:0] = [str(self.copy), str(self.copy / "tests")]
        os.environ["PYTHONPATH"] = str(self.copy)
        # No capturing of logs: that of a run which is forked from the child is the run's own.
        options = ["-x", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:logging", "--assert=plain"]
        options.append(f"--basetemp={self.work / 'temporary'}")
        plugin = _Child(self.order)
        status = pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[plugin])
        (self.work / "status").write_text(str(int(status)))
        (self.work / "modules").write_text("\n".join(sys.modules))
        (self.work / "durations").write_text(json.dumps(plugin.durations))

    def preload(self) -> None:
        """Import the libraries that the last child has imported, so that those to come need not."""
        local = {PACKAGE, "train_custom_diffusion", "retrieve", "conftest", "_pytest", "pytest"}
        local |= {path.stem for path in (ROOT / "tests").glob("*.py")}
        for name in (self.work / "modules").read_text().splitlines():
            if name.split(".")[0] not in local and name not in sys.modules:
                try:
                    __import__(name)
                except Exception:  # parts that only their own package can import
                    sys.modules.pop(name, None)


class _Child:
    """What is different about pytest in a child."""

    def __init__(self, order: dict[str, float]):
        self.order = order
        self.durations = Counter()

    def pytest_collection_modifyitems(self, items):
        """The quickest tests of each file first: most mutants fall at once."""
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: (files.index(item.path), self.order.get(item.nodeid, 0)))

    def pytest_collection_finish(self):
        """Training runs are forked from the child itself: a fork server would import torch anew for each mutant."""
        launch = sys.modules.get("launch")
        if launch is not None:
            os.environ.update(launch.ENVIRONMENT | {"PYTHONPATH": os.environ["PYTHONPATH"]})
            launch._forkserver = lambda: multiprocessing.get_context("fork")

    def pytest_runtest_logreport(self, report):
        self.durations[report.nodeid] += report.duration


def _computed():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def judge(bench: Bench, module: str, sample: int | None, again: set[str] | None, save: Callable[[dict], None]) -> None:
    """Run mutants of one module: all, `sample` of them, or those of `again`; after each, hand what is known to `save`."""
    path = bench.copy / (module if (ROOT / module).exists() else f"{PACKAGE}/{module}")
    code = path.read_text()
    seconds = bench.baseline(MODULES[module])
    mutants = mutants_of(code)
    chosen = mutants
    if sample is not None and sample < len(mutants) and again is None:
        chosen = random.Random(module).sample(mutants, sample)
    print(f"{module}: {len(mutants)} mutants; the tests take {seconds:.1f} s", flush=True)
    results = {}
    for tree, node, replacement in chosen:
        mutated = tree.deep_replace(node, replacement).code
        name = difference(code, mutated)
        if mutated == code or (again is not None and _without_number(name) not in again):
            continue
        path.write_text(mutated)
        results[name] = bench.test(MODULES[module], 5 + 5 * seconds)
        save({"mutants": len(mutants), "results": results})
        if results[name] == "survived":
            print(f"  survived {name}", flush=True)
    path.write_text(code)
    counts = Counter(results.values())
    caught = len(results) - counts["survived"]
    print(f"{module}: {len(results)} run, {caught} caught, {counts['survived']} survived", flush=True)


def _without_number(name):
    return name.split(": ", 1)[1]


def survivors(file: Path, module: str) -> set[str]:
    results = json.loads(file.read_text()).get(module, {"results": {}})["results"]
    return {_without_number(name) for name, result in results.items() if result == "survived"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"parts of their names (default: all of {', '.join(MODULES)})")
    parser.add_argument(
        "--sample", type=int, help="mutants of each module, drawn at random, always the same (default: all)"
    )
    parser.add_argument("--again", type=Path, help="results of an earlier call: run only the mutants that survived it")
    parser.add_argument("--output", type=Path, default=Path("mutants.json"), help="results (default: %(default)s)")
    args = parser.parse_args()
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    results = {}
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work))
        for module in MODULES:
            if args.modules and not any(part in module for part in args.modules):
                continue
            again = survivors(args.again, module) if args.again else None
            if again == set():
                continue

            def save(result, module=module):
                results[module] = result
                args.output.write_text(json.dumps(results, indent=1) + "\n")

            judge(bench, module, args.sample, again, save)


if __name__ == "__main__":
    main()
