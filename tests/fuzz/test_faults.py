"""Faults that are planted are faults of the package as it is."""

import subprocess
import sys

import pytest
from _pytest.mark.expression import Expression

from tests.fuzz.faults import judge
from tests.fuzz.faults.catalogue import MUTANTS
from tests.support.harness.environment import PROJECT_ROOT


def test_every_fault_still_fits_its_file_and_its_test_is_there():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        compile(judge.with_fault(PROJECT_ROOT, mutant), mutant.file, "exec")
        assert (PROJECT_ROOT / mutant.test[0]).is_file()


def test_every_fault_names_a_test_that_is_run():
    files = sorted({mutant.test[0] for mutant in MUTANTS})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    collected = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True).stdout.lower()
    run_nothing = set()
    for file, *chosen in {mutant.test for mutant in MUTANTS}:
        words = Expression.compile(chosen[1]) if chosen else None
        tests = [line for line in collected.splitlines() if line.startswith(f"{file}::")]
        if not any(words is None or words.evaluate(lambda word, test=test: word.lower() in test) for test in tests):
            run_nothing.add((file, *chosen))
    assert not run_nothing


def test_an_answer_of_another_test_is_asked_for_again():
    mutant = MUTANTS[0]
    row = {**judge.NOTHING, "test": " ".join(mutant.test), "test_fails": 1, "test_problem": "found", "pool_machine": 0}
    assert judge.still_answers(row, mutant) == row
    kept = judge.still_answers({**row, "test": "tests/another.py"}, mutant)
    assert not judge.is_judged(kept, (judge.TEST,), first_catch=False) and not judge.is_found(kept)
    assert judge.is_judged(kept, (judge.POOL,), first_catch=False) and kept["test_problem"] == ""


def test_a_checkout_that_is_no_copy_is_never_changed():
    before = {mutant.file: (PROJECT_ROOT / "rkv_sglang" / mutant.file).read_text() for mutant in MUTANTS}
    for mutant in MUTANTS[:3]:
        with pytest.raises(RuntimeError, match="is no copy"), judge.planted(PROJECT_ROOT, mutant):
            pass
    assert before == {mutant.file: (PROJECT_ROOT / "rkv_sglang" / mutant.file).read_text() for mutant in MUTANTS}
