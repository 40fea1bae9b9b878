"""Faults that are planted are faults of the package as it is."""

import pytest

from tests.fuzz.faults import judge
from tests.fuzz.faults.catalogue import MUTANTS
from tests.support.harness.environment import PROJECT_ROOT


def test_every_fault_still_fits_its_file_and_its_test_is_there():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        compile(judge.with_fault(PROJECT_ROOT, mutant), mutant.file, "exec")
        assert (PROJECT_ROOT / mutant.test[0]).is_file()


def test_a_checkout_that_is_no_copy_is_never_changed():
    before = {mutant.file: (PROJECT_ROOT / "rkv_sglang" / mutant.file).read_text() for mutant in MUTANTS}
    for mutant in MUTANTS[:3]:
        with pytest.raises(RuntimeError, match="is no copy"), judge.planted(PROJECT_ROOT, mutant):
            pass
    assert before == {mutant.file: (PROJECT_ROOT / "rkv_sglang" / mutant.file).read_text() for mutant in MUTANTS}
