"""Answers that were collected where nothing judges them, in one compressed file of JSON lines, and judged later."""

import gzip
import json
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from benchmarks.accuracy.judge import Judge, judged
from benchmarks.accuracy.problems import Problem
from benchmarks.accuracy.rows import ByProblem
from benchmarks.accuracy.store import Sample
from benchmarks.common.settings import Setting, parse_setting

# So many answers are compressed together, and may be lost when the process is killed.
TOGETHER = 32


class AnswerFile:
    """``with AnswerFile(path, info) as file:`` writes answers, from any thread.

    The file is a chain of gzip members, so that what is cut off costs its last member alone. Its first line is
    ``info``, what the benchmark says of the run.
    """

    def __init__(self, path: Path, info: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._lock = threading.Lock()
        self._waiting = [json.dumps({"info": info})]
        self._flush()

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._flush()
            self._file.close()

    def add(self, setting: Setting, sample: Sample) -> None:
        """Keep an answer that is not judged yet."""
        with self._lock:
            self._waiting.append(json.dumps({"setting": setting.name, **asdict(sample)}))
            if len(self._waiting) >= TOGETHER:
                self._flush()

    def _flush(self) -> None:
        if self._waiting and not self._file.closed:
            self._file.write(gzip.compress("".join(f"{line}\n" for line in self._waiting).encode()))
            self._file.flush()
            self._waiting = []


def read_answers(path: Path) -> tuple[dict[str, Any], dict[Setting, list[Sample]]]:
    """Return what is said of the run, and the answers of each setting, in the order they came; not judged.

    Raises:
        ValueError: The file is none of ``AnswerFile``; one line.
    """
    lines = _whole_lines(path)
    try:
        info = dict(json.loads(lines[0])["info"])
        found: dict[str, list[Sample]] = {}
        for line in lines[1:]:
            fields = json.loads(line)
            found.setdefault(fields.pop("setting"), []).append(Sample(**fields))
        return info, {parse_setting(name): samples for name, samples in found.items()}
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no answers of benchmarks.accuracy.collect ({error}): name another file"
        ) from None


def judge_answers(
    answers: Mapping[Setting, Sequence[Sample]], problems: Sequence[Problem], judge: Judge
) -> dict[Setting, ByProblem]:
    """Judge the answers to every problem that all settings have answered, and return them by problem.

    Raises:
        ValueError: There is none; one line.
    """
    by_setting: dict[Setting, dict[str, list[Sample]]] = {setting: {} for setting in answers}
    for setting, samples in answers.items():
        for sample in samples:
            by_setting[setting].setdefault(sample.problem, []).append(sample)
    everywhere = [p for p in problems if all(p.key in by_problem for by_problem in by_setting.values())]
    if not everywhere:
        raise ValueError("no problem has been answered under every setting: name the same --problems, or some settings")
    results = {}
    for setting, by_problem in tqdm(by_setting.items(), desc="judging", unit="setting", mininterval=2):
        results[setting] = {p.key: [judged(judge, p, sample) for sample in by_problem[p.key]] for p in everywhere}
    return results


def _whole_lines(path: Path) -> list[str]:
    data, lines = path.read_bytes(), ""
    while data:
        one = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            text = one.decompress(data)
        except zlib.error as error:
            raise ValueError(f"{path} is not compressed as answers are ({error}): name another file") from None
        if not one.eof:
            break
        lines, data = lines + text.decode(), one.unused_data
    return lines.split("\n")[:-1]
