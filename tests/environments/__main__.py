"""Run the same tests with SGLang hooked, with all patches in and with a part of them, and compare all that they do.

    python -m tests.environments [--out FOLDER] [--environments hooked,patched,partly] [--skip-tests] [TEST ...]

Copies of the installed SGLang are made in FOLDER (links, no gigabytes), and the patches go in by ``rkv-sglang patch``.
Then: the scheduler's answers and every step of it under a few settings must be equal in all of them, with no function
hooked that SGLang calls by itself (``answers.py``); the bodies of a server without a policy and without the package
must be those of a fully patched one with it, byte for byte (``bodies.py``); and the tests must pass. What was found
stands in FOLDER/result.json.
"""

import argparse
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from tests.environments import bodies
from tests.environments.answers import expected_hooks
from tests.environments.trees import ENVIRONMENTS, Environment, capabilities_in, make_tree, run_module, with_tree

FOLDER = Path(".cache/environments")
# The oracle's tokens, and everything that says how exact admission is and what a preempted request does.
TESTS = ["tests/e2e/test_oracle.py", "tests/e2e/test_memory.py", "tests/e2e/test_traps.py", "tests/e2e/test_restore.py"]
WITHOUT_THE_PACKAGE = {"SGLANG_PLUGINS": "rkv_probe"}


def differences(first: Any, other: Any, path: str = "") -> list[str]:
    """Return where two values of JSON differ, at most the first few places."""
    if isinstance(first, dict) and isinstance(other, dict) and first.keys() == other.keys():
        pairs = [(f"{path}.{key}", first[key], other[key]) for key in first]
    elif isinstance(first, list) and isinstance(other, list) and len(first) == len(other):
        pairs = [(f"{path}[{i}]", one, two) for i, (one, two) in enumerate(zip(first, other, strict=True))]
    else:
        return [] if first == other else [f"{path}: {str(first)[:200]} and {str(other)[:200]}"]
    return [line for name, one, two in pairs for line in differences(one, two, name)][:5]


def compare_answers(trees: dict[str, Path], out: Path) -> dict[str, Any]:
    """Record the scheduler in every environment; return counts and every difference."""
    found: dict[str, Any] = {}
    for name, tree in trees.items():
        run_module(tree, ["tests.environments.answers", str(out / f"answers-{name}.json")])
        found[name] = json.loads((out / f"answers-{name}.json").read_text())
    problems = []
    first_name, first = next(iter(found.items()))
    for name, these in found.items():
        if not Path(these["sglang"]).is_relative_to(trees[name].resolve()):
            problems.append(f"{name}: it was {these['sglang']} that ran")
        for run, record in these["runs"].items():
            hooked, expected = set(record["hooked"]), expected_hooks(run, capabilities_in(trees[name]))
            problems += [f"{name} {run}: {target} is hooked and native, or neither" for target in hooked ^ expected]
            for part in ("answers", "schedule"):
                for line in differences(first["runs"][run][part], record[part], part):
                    problems.append(f"{run}: {first_name} and {name} differ in {line}")
    runs = first["runs"].values()
    return {
        "runs": len(runs),
        "answers": sum(len(run["answers"]) for run in runs),
        "tokens": sum(len(answer["output_ids"]) for run in runs for answer in run["answers"]),
        "steps": sum(event.get("event") == "step" for run in runs for event in run["schedule"]),
        "compactions": sum(event.get("event") == "compaction" for run in runs for event in run["schedule"]),
        "retractions": sum(answer["retractions"] for run in runs for answer in run["answers"]),
        "hooks": {name: len(these["runs"]["plain"]["hooked"]) for name, these in found.items()},
        "problems": problems,
    }


def compare_bodies(trees: dict[str, Path], out: Path) -> dict[str, Any]:
    """Ask a stock server without the package and a patched one with it; return counts and every difference."""
    found = {}
    for name, env in (("hooked", WITHOUT_THE_PACKAGE), ("patched", {})):
        run_module(trees[name], ["tests.environments.bodies", str(out / f"bodies-{name}.json")], env)
        found[name] = json.loads((out / f"bodies-{name}.json").read_text())["bodies"]
    tries = [body for one in found["hooked"] for body in one["tries"]]
    problems = bodies.differences(found["hooked"], found["patched"])
    return {"requests": len(found["hooked"]), "bytes": sum(map(len, tries)), "problems": problems}


def run_tests(tree: Path, report: Path, tests: list[str]) -> dict[str, Any]:
    """Run tests with the SGLang of a tree; return counts and the names of those that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    done = subprocess.run(command, env=with_tree(tree))
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.attrib['classname']}::{case.attrib['name']}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if done.returncode and not failed:
        failed = [f"pytest ended with {done.returncode}"]
    return {**counts, "seconds": round(float(suite.attrib["time"])), "problems": failed}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.environments", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--environments", default=",".join(one.name for one in ENVIRONMENTS))
    parser.add_argument("--skip-tests", action="store_true", help="compare answers, steps and bodies only")
    parser.add_argument("tests", nargs="*", default=TESTS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Compare and test; returns the exit status."""
    options = parse(argv)
    wanted = options.environments.split(",")
    chosen: list[Environment] = [one for one in ENVIRONMENTS if one.name in wanted]
    out: Path = options.out.resolve()
    trees = {one.name: make_tree(out, one) for one in chosen}
    started = time.monotonic()
    result: dict[str, Any] = {"answers": compare_answers(trees, out)}
    print("answers:", result["answers"], flush=True)
    if {"hooked", "patched"} <= trees.keys():
        result["bodies"] = compare_bodies(trees, out)
        print("bodies:", result["bodies"], flush=True)
    for name, tree in trees.items() if not options.skip_tests else ():
        result[f"tests {name}"] = run_tests(tree, out / f"tests-{name}.xml", options.tests)
        print(f"tests {name}:", result[f"tests {name}"], flush=True)
    result["seconds"] = round(time.monotonic() - started)
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    problems = [problem for part in result.values() if isinstance(part, dict) for problem in part["problems"]]
    print("\n".join(problems) or "nothing differs")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
