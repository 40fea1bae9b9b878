"""Finished samples on disk: one line each, so that an interrupted run goes on behind the last one."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.settings import as_file_name


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer to one problem under one setting.

    ``problem`` is a ``Problem.key``, ``outcome`` that of the verdict, times are seconds since 1970, and ``devices`` are
    the accelerators of the server, 1 if there is none.
    """

    problem: str
    sample: int
    outcome: str
    found: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: str
    compactions: int
    evicted_tokens: int
    start: float
    end: float
    devices: int
    text: str

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class SampleStore:
    """A file of samples that all have the same description: everything that decides an answer or its time.

    The file's name has a hash of the description, so that a run with anything changed starts a file of its own; its
    first line is the description. Number of problems and of samples are not part of it: more of either go on in the
    same file.
    """

    def __init__(self, folder: Path, name: str, description: Mapping[str, Any]) -> None:
        """Open the file, or make it.

        Raises:
            ValueError: The file holds something else; one line.
        """
        header = json.dumps({"description": description}, sort_keys=True)
        digest = hashlib.sha256(header.encode()).hexdigest()[:12]
        self.path = folder / f"{as_file_name(name)}-{digest}.jsonl"
        self.samples: dict[tuple[str, int], Sample] = {}
        self._cut_off = ""
        if self.path.exists():
            self._read(header)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.write_text(header + "\n")

    def add(self, sample: Sample) -> None:
        """Keep a sample, on disk before this returns."""
        if self._cut_off:
            os.truncate(self.path, self.path.stat().st_size - len(self._cut_off.encode()))
            self._cut_off = ""
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(sample)) + "\n")
        self.samples[sample.problem, sample.sample] = sample

    def _read(self, header: str) -> None:
        content = self.path.read_text()
        first, *lines = content.split("\n")
        if first != header:
            raise ValueError(f"{self.path} was not written by this benchmark: remove it")
        # Without its line feed, the last line was cut off while it was written, and its sample is made again; or it is
        # being written by another process, and whoever only reads must leave it.
        self._cut_off = lines[-1] if lines else ""
        for number, line in enumerate(lines[:-1], start=2):
            try:
                sample = Sample(**json.loads(line))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number} is no sample ({error}): remove the line") from None
            self.samples[sample.problem, sample.sample] = sample
