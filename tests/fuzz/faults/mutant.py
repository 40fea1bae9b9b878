"""One fault: a change of one file of the package, and the test that must find it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: What is wrong.
        file: Below ``rkv_sglang/``.
        old: Stands in the file once.
        new: Takes its place.
        test: Arguments of pytest: the test that finds it. A quick one, where there are several.
    """

    name: str
    file: str
    old: str
    new: str
    test: tuple[str, ...]
