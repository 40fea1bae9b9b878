"""Named prefixes of a running server: made of a document and what judges it, listed, deleted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from rkv_sglang.client.server import answered, raise_refusal, server_info
from rkv_sglang.config import PREFIX_FIELD
from rkv_sglang.messages import shown

# Behind a document that is to be judged by its own repetition.
REPEAT = "\n\nRepeat the text above, word for word:\n\n"
# A request that asks for nothing else needs a token, and every vocabulary has this one.
ANY_TOKEN = 0
TOKENIZE_TIMEOUT_S = 120
# A document may be long, and the server busy with others.
ANSWER_TIMEOUT_S = 3600


class Prefixes:
    """The named prefixes of one server.

    Args:
        server: Its address, ``http://host:port``.
        api_key: What it was started with as ``--api-key``.

    Raises:
        ValueError: There is no such server, or it has no policy; one line. So do all methods where the server refuses,
            in its own words, or does not answer.
    """

    def __init__(self, server: str, api_key: str | None = None) -> None:
        self._server, self._api_key = server.rstrip("/"), api_key
        why = "has no policy, so it makes no prefixes: start it with --kv-policy rkv"
        self._info = server_info(self._server, api_key, without=why)

    def create(self, name: str, document: str, task: str | None, budget: int, judge: str | None = None) -> Any:
        """Have a prefix made, and return what the server says of it: name, length and budget in tokens.

        The tokenizer's special tokens stand in front of the document alone.

        Args:
            task: What requests are about, behind the document; None: the document is repeated, and judged by that.
            judge: Of a document with a task, by what that judges it; None for the server's own way.
        """
        with _showing("tokens"):
            document_ids = self._ids(document, special=True)
            task_ids = self._ids(REPEAT if task is None else task)
        if task is None:
            return self.create_of_ids(name, document_ids, [*task_ids, *document_ids], budget, "repeat")
        return self.create_of_ids(name, document_ids, task_ids, budget, judge)

    def create_of_ids(
        self, name: str, document_ids: Sequence[int], task_ids: Sequence[int], budget: int, judge: str | None = None
    ) -> Any:
        """Do what ``create`` does with tokens, sent as they are."""
        wish = {"create": name, "length": len(document_ids), "budget": budget}
        if judge is not None:
            wish["judge"] = judge
        with _showing(f"{len(document_ids)} tokens and {len(task_ids)} that judge them"):
            return self._ask([*document_ids, *task_ids], wish)

    def list(self) -> Sequence[Any]:
        """Return what the server says of each prefix, in the order of their making."""
        found = self._ask([ANY_TOKEN], {"list": True})
        if not isinstance(found, list):
            raise ValueError(f"{self._server} answers unlike SGLang with rkv_sglang: its prefixes are {shown(found)}")
        return found

    def delete(self, name: str) -> Any:
        """Delete a prefix."""
        return self._ask([ANY_TOKEN], {"delete": name})

    def _ids(self, text: str, *, special: bool = False) -> Sequence[int]:
        """Return a text's tokens; with the special ones in front of it, not with those behind."""
        if self._info.get("skip_tokenizer_init"):
            raise ValueError(f"{self._server} has no tokenizer: start it without --skip-tokenizer-init")
        plain = self._tokenized(text, special=False)
        return with_front(plain, self._tokenized(text, special=True)) if special else plain

    def _tokenized(self, text: str, *, special: bool) -> Sequence[int]:
        payload = {"prompt": text, "add_special_tokens": special}
        answer = answered(self._server, "/tokenize", payload, TOKENIZE_TIMEOUT_S, self._api_key)
        ids = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"{self._server} answers unlike SGLang: its /tokenize gives no tokens")
        return ids

    def _ask(self, input_ids: Sequence[int], wish: dict[str, Any]) -> Any:
        params = {"max_new_tokens": 1, "temperature": 0, "custom_params": {PREFIX_FIELD: wish}}
        payload = {"input_ids": input_ids, "sampling_params": params}
        answer = answered(self._server, "/generate", payload, ANSWER_TIMEOUT_S, self._api_key)
        try:
            raise_refusal(answer)
            return answer["meta_info"][PREFIX_FIELD]
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self._server} answers unlike SGLang with rkv_sglang ({shown(error)} in its answer)"
            ) from error


def with_front(plain: Sequence[int], special: Sequence[int]) -> Sequence[int]:
    """Return a text's tokens with those special ones in front of it that its tokenizer puts there.

    Args:
        plain: The text alone.
        special: The text with special tokens, before it or behind.
    """
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return special[: start + len(plain)]
    return special


@contextlib.contextmanager
def _showing(label: str) -> Iterator[None]:
    """Show on a terminal that something goes on, and for how long."""
    done = threading.Event()
    with tqdm(desc=label, bar_format="{desc}: {elapsed}", leave=False, disable=None) as bar:

        def tick() -> None:
            while not done.wait(1):
                bar.refresh()

        watcher = threading.Thread(target=tick, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
