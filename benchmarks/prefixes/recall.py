"""Part ``recall``: facts of a document asked for behind it, whole, shortened or in a named prefix."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common.schema import Row
from benchmarks.common.settings import Setting, policy_setting
from benchmarks.common.statistics import Estimate, mean_interval
from benchmarks.prefixes.documents import Document, is_right, make_document, question
from benchmarks.prefixes.servers import Servers
from devtools.launch import Server
from rkv_sglang.client.prefixes import REPEAT, Prefixes
from rkv_sglang.config import BY_POLICY, BY_REPEAT, JUDGES, PREFIX_FIELD

FULL, TRUNCATED = "full", "truncated"
CONTROL = "random_attention"
ALL = 0
NAME = "notebook"
# Of every server, so that the same tokens always stay; one policy has another by itself.
WINDOW = 8
# Nothing is compacted in an answer of a few tokens.
BUDGET, BUFFER = 64, 16


@dataclass(frozen=True)
class Asked:
    """A document in tokens, with its questions.

    Attributes:
        document: Its tokens, special ones in front.
        task: Those behind it.
        questions: Those of each fact behind the task.
        codes: What each asks for.
        answer_len: Tokens in which a code can be said.
    """

    document: list[int]
    task: list[int]
    questions: list[list[int]]
    codes: list[str]
    answer_len: int


@dataclass
class Study:
    """What was found of one model.

    Attributes:
        shares: By way and tokens kept, of each document the share of facts that were answered right.
    """

    model: str
    asked: list[Asked]
    shares: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def note(self, way: str, kept: int, share: float) -> None:
        """Note one document more; all ways take the documents in the same order."""
        self.shares.setdefault((way, kept), []).append(share)


def load_tokenizer(model: str) -> Any:
    """Return a model's tokenizer; a model in a folder needs no hub."""
    from transformers import AutoTokenizer

    if Path(model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return AutoTokenizer.from_pretrained(model)


def in_tokens(tokenizer: Any, document: Document) -> Asked:
    """Return a document as it is sent."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return Asked(
        document=list(tokenizer(document.text)["input_ids"]),
        task=ids(document.task),
        questions=[ids(question(station)) for station in document.facts],
        codes=list(document.facts.values()),
        answer_len=max(len(ids(f" {code}.")) for code in document.facts.values()),
    )


def measure(options: argparse.Namespace, servers: Servers, flags: tuple[str, ...]) -> list[Row]:
    """Return the rows of all models.

    Raises:
        ServerError: A server did not start, or a request failed.
        ValueError: There are too many facts, or a server refuses to make a prefix; one line.
    """
    rows: list[Row] = []
    for model in options.models:
        tokenizer = load_tokenizer(model)
        documents = [
            make_document(tokenizer, options.recall_len, options.facts, seed) for seed in range(options.documents)
        ]
        study = Study(Path(model).name, [in_tokens(tokenizer, document) for document in documents])
        repeat = list(tokenizer(REPEAT, add_special_tokens=False)["input_ids"])
        for number, setting in enumerate(options.policies):
            (server,) = servers.only(model, [setting], flags).values()
            # Those that need no policy are asked on the first server.
            judges = (BY_POLICY,) if number else JUDGES
            if number == 0:
                _ask_without_prefixes(server, study, options.recall_kept)
            _ask_with_prefixes(server, study, setting, judges, options.recall_kept, repeat)
        rows += recall_rows(study)
    return rows


def policy_servers(names: Sequence[str]) -> list[Setting]:
    """Return the servers that judge by these policies.

    Raises:
        ValueError: There is no such policy; one line.
    """
    return [policy_setting(name, BUDGET, BUFFER, name, {"window": WINDOW}) for name in names]


def _ask_without_prefixes(server: Server, study: Study, lengths: Sequence[int]) -> None:
    for asked in tqdm(study.asked, desc=f"{study.model}, without prefixes", mininterval=30):
        study.note(FULL, ALL, _share(server, asked, asked.document, None))
        for kept in lengths:
            study.note(TRUNCATED, kept, _share(server, asked, asked.document[-kept:], None))


def _ask_with_prefixes(
    server: Server,
    study: Study,
    setting: Setting,
    judges: Sequence[str],
    lengths: Sequence[int],
    repeat: list[int],
) -> None:
    prefixes = Prefixes(server.url)
    for asked in tqdm(study.asked, desc=f"{study.model}, {setting.name}", mininterval=30):
        for judge in judges:
            behind = [*repeat, *asked.document] if judge == BY_REPEAT else asked.task
            for kept in lengths:
                prefixes.create(NAME, asked.document, behind, kept, judge)
                study.note(setting.name if judge == BY_POLICY else judge, kept, _share(server, asked, [], NAME))
                prefixes.delete(NAME)


def _share(server: Server, asked: Asked, front: list[int], prefix: str | None) -> float:
    """Return the share of a document's facts that are answered right behind these tokens."""
    prompts = [[*front, *asked.task, *tokens] for tokens in asked.questions]
    custom = [{} if prefix is None else {PREFIX_FIELD: prefix}] * len(prompts)
    # One first: the others find in the cache what all begin with.
    answers = server.generate(prompts[:1], asked.answer_len, custom_params=custom[:1])
    if len(prompts) > 1:
        answers += server.generate(prompts[1:], asked.answer_len, custom_params=custom[1:])
    return float(np.mean([is_right(answer["text"], code) for answer, code in zip(answers, asked.codes, strict=True)]))


def recall_rows(study: Study) -> list[Row]:
    """Return a row for each way and length, in the order in which they were asked."""
    return [
        {
            "model": study.model,
            "way": way,
            "kept": kept,
            "documents": len(shares),
            "document_len": round(float(np.mean([len(asked.document) for asked in study.asked])), 1),
            "facts": sum(len(asked.codes) for asked in study.asked),
            **_columns("exact", mean_interval(shares)),
            **_columns("less_full", _difference(shares, study.shares.get((FULL, ALL)))),
            **_columns("less_random", _difference(shares, study.shares.get((CONTROL, kept)))),
        }
        for (way, kept), shares in study.shares.items()
    ]


def _difference(shares: Sequence[float], others: Sequence[float] | None) -> Estimate:
    """Return the mean over documents of a difference within each; NaN without others."""
    if others is None:
        return mean_interval([])
    return mean_interval([own - other for own, other in zip(shares, others, strict=True)])


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    ends = {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return {column: round(value, 4) for column, value in ({name: estimate.mean} | ends).items()}
