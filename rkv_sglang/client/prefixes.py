"""Named prefixes of a running server: made of a document and what judges it, listed, deleted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from rkv_sglang.client.server import answered, raise_refusal, server_info
from rkv_sglang.client.tokens import Tokenizer
from rkv_sglang.config import BY_REPEAT, PREFIX_FIELD
from rkv_sglang.messages import shown

# Behind a document that is to be judged by its own repetition.
REPEAT = "\n\nRepeat the text above, word for word:\n\n"
# A request that asks for nothing else needs a token, and every vocabulary has this one.
ANY_TOKEN = 0
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

    @property
    def info(self) -> Mapping[str, Any]:
        """The server's ``/server_info``."""
        return self._info

    def tokenizer(self) -> Tokenizer:
        """Return the server's own."""
        return Tokenizer(self._server, self._api_key, self._info)

    def create(
        self,
        name: str,
        document: Sequence[int],
        task: Sequence[int] | None,
        budget: int,
        judge: str | None = None,
        *,
        traced: bool = False,
    ) -> Mapping[str, Any]:
        """Have a prefix made, and return the ``meta_info`` of it, whose ``kv_prefix`` says name, length and budget.

        Args:
            document: Its tokens, with any special ones in front.
            task: Tokens of what requests are about, behind the document; None: the document is repeated, and judged by
                that.
            judge: Of a document with a task, by what that judges it; None for the server's own way.
            traced: Whether ``kv_trace`` is to say what is kept, under ``document``.
        """
        behind = [*self.tokenizer().ids(REPEAT), *document] if task is None else task
        judge = BY_REPEAT if task is None else judge
        wish = {"create": name, "length": len(document), "budget": budget}
        wish |= {} if judge is None else {"judge": judge}
        with _showing(f"{len(document)} tokens and {len(behind)} that judge them"):
            return self._ask([*document, *behind], wish, {"kv_trace": True} if traced else {})

    def list(self) -> Sequence[Any]:
        """Return what the server says of each prefix, in the order of their making."""
        found = self._ask([ANY_TOKEN], {"list": True})[PREFIX_FIELD]
        if not isinstance(found, list):
            raise ValueError(f"{self._server} answers unlike SGLang with rkv_sglang: its prefixes are {shown(found)}")
        return found

    def delete(self, name: str) -> None:
        """Delete a prefix."""
        self._ask([ANY_TOKEN], {"delete": name})

    def _ask(
        self, input_ids: Sequence[int], wish: Mapping[str, Any], others: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """Return the ``meta_info`` of an answer that says that a wish was granted."""
        custom = {PREFIX_FIELD: wish, **(others or {})}
        payload = {
            "input_ids": input_ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0, "custom_params": custom},
        }
        answer = answered(self._server, "/generate", payload, ANSWER_TIMEOUT_S, self._api_key)
        try:
            raise_refusal(answer)
            meta_info: Mapping[str, Any] = answer["meta_info"]
            # Only then it is.
            meta_info[PREFIX_FIELD]
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self._server} answers unlike SGLang with rkv_sglang ({shown(error)} in its answer)"
            ) from error
        return meta_info


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
