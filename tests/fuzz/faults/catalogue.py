"""Every fault that is planted."""

from tests.fuzz.faults.drops import DROPS
from tests.fuzz.faults.entries import ENTRIES
from tests.fuzz.faults.kinds import KINDS
from tests.fuzz.faults.lengths import LENGTHS
from tests.fuzz.faults.mutant import Mutant
from tests.fuzz.faults.prefixes import PREFIXES
from tests.fuzz.faults.requests import REQUESTS
from tests.fuzz.faults.restores import RESTORES

MUTANTS: tuple[Mutant, ...] = (*LENGTHS, *ENTRIES, *DROPS, *REQUESTS, *RESTORES, *KINDS, *PREFIXES)
