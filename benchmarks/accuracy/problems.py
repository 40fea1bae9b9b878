"""Problems with known answers: JSON lines, or a data set of the Hugging Face hub."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkv_sglang.messages import one_line
from rkv_sglang.user_files import read_text, reason

# A few of this project's own, for dry runs.
DRY_RUN_PROBLEMS = Path(__file__).with_suffix(".jsonl")
# GSM8K works the answer out in words and puts it behind this mark.
_GSM8K_MARK = "####"
MOST_BYTES = 2**30


@dataclass(frozen=True)
class Problem:
    """A question and its answer; ``key`` names both by their content."""

    question: str
    answer: str

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([self.question, self.answer]).encode()).hexdigest()[:16]


def load_problems(source: str, split: str = "test", subset: str | None = None) -> list[Problem]:
    """Return the problems of a file of JSON lines, or of a data set of the hub.

    Args:
        source: A path, or a name such as ``openai/gsm8k``.
        split: Of a data set of the hub.
        subset: Of a data set of the hub that has several, such as ``main``.

    Raises:
        ValueError: There is no such file, a record lacks a field, or two problems are the same; one line.
    """
    if Path(source).exists() and not Path(source).is_dir():
        records: Iterable[Mapping[str, Any]] = _json_lines(Path(source))
    elif source.endswith((".jsonl", ".json")):
        raise ValueError(f"there is no file {source}")
    else:
        records = _hub_records(source, split, subset)
    problems = [_problem(record, f"{source}, record {i}") for i, record in enumerate(records, start=1)]
    if not problems:
        raise ValueError(f"{source} has no problems")
    if len({problem.key for problem in problems}) < len(problems):
        raise ValueError(f"{source} has the same problem twice")
    return problems


def _json_lines(path: Path) -> list[Mapping[str, Any]]:
    records = []
    try:
        text = read_text(path, most_bytes=MOST_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({reason(error)})") from None
    # Not every separator that Python knows: a question may hold them.
    for i, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {i} is no JSON: {one_line(error)}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {i} is no JSON object")
            records.append(record)
    return records


def _hub_records(name: str, split: str, subset: str | None) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(f"{name} is no file; for a data set of the Hugging Face hub: pip install datasets") from None
    try:
        records: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        # The library raises errors of many kinds (network, unknown name or split); each of them ends the run.
        raise ValueError(f"the data set {name} could not be loaded: {str(error).splitlines()[0]}") from error
    return records


def _problem(record: Mapping[str, Any], where: str) -> Problem:
    # Data sets of the hub spell the same fields with and without capitals.
    fields = {str(name).lower(): value for name, value in record.items()}
    question = fields.get("problem", fields.get("question"))
    if question is None or fields.get("answer") is None:
        raise ValueError(f"{where}: needs the fields problem (or question) and answer, has {', '.join(sorted(fields))}")
    answer = str(fields["answer"]).rpartition(_GSM8K_MARK)[2].strip()
    if not answer:
        raise ValueError(f"{where}: the answer is empty")
    return Problem(str(question), answer)
