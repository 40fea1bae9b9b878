"""Run a program of SGLang's frontend language and record every request that it makes of the server."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from devtools.launch import past_proxies


@dataclass(frozen=True)
class Call:
    """One request as the server counted it; a batch of choices is one request each."""

    prompt: str
    answer: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    compactions: int


@dataclass(frozen=True)
class ProgramRun:
    """What a program gave.

    Attributes:
        texts: Its variables.
        choices: Those of them that ``select`` chose.
        calls: Its requests, in no set order.
        num_racing: How many of the first calls ran side by side on a cache that did not have their prompts, so that
            what they hit depends on which came first; their hits are not compared.
    """

    texts: Mapping[str, str]
    choices: Mapping[str, str]
    calls: Sequence[Call]
    num_racing: int = 0


class RecordingEndpoint(RuntimeEndpoint):
    """SGLang's own backend of the frontend, which also keeps what the server says of each request."""

    def __init__(self, url: str) -> None:
        # SGLang's own client asks the environment.
        os.environ.update(past_proxies())
        super().__init__(url)
        self.calls: list[Call] = []

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        prompt = s.text_
        answer, info = super().generate(s, sampling_params)
        self._record(prompt, answer, info)
        return answer, info

    def commit_lazy_operations(self, s: Any) -> None:
        # As SGLang has it, through the method below: what a fork shares is prefilled once.
        self._generate_http_request(s, {"text": s.text_, "sampling_params": {"max_new_tokens": 0}})

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        answers = super()._generate_http_request(s, data)
        if isinstance(answers, dict):
            self._record(data["text"], "", answers["meta_info"])
        else:
            for prompt, answer in zip(data["text"], answers, strict=True):
                self._record(prompt, "", answer["meta_info"])
        return answers

    def _record(self, prompt: str, answer: str, info: Mapping[str, Any]) -> None:
        # A prefill without generation comes back with one token that nobody uses.
        tokens = info["completion_tokens"] if answer else 0
        self.calls.append(
            Call(prompt, answer, info["prompt_tokens"], info["cached_tokens"], tokens, info.get("kv_compactions", 0))
        )


def run_program(
    url: str, program: Any, names: Sequence[str], choices: Sequence[str], *, forks: bool = False
) -> ProgramRun:
    """Run a program greedily twice: on an empty prefix cache, then on the one that the first run left behind.

    The texts are those of the first run, the calls those of both.

    Args:
        url: Of the server, on which nothing else runs.
        program: What ``sgl.function`` returns, without arguments.
        names: Its variables.
        choices: Those of them that ``select`` sets.
        forks: Whether it makes requests side by side.

    Raises:
        RuntimeError: The server refused a request or did not answer.
    """
    endpoint = RecordingEndpoint(url)
    endpoint.flush_cache()
    states, num_calls = [], []
    for _ in range(2):
        state = program.run(backend=endpoint, temperature=0)
        # A program goes on in threads of its own, and what fails there would only be a warning.
        state.sync()
        if state.error() is not None:
            raise RuntimeError(f"the program failed: {state.error()}")
        states.append(state)
        num_calls.append(len(endpoint.calls))
    texts = {name: states[0][name] for name in names}
    chosen = {name: texts[name] for name in choices}
    return ProgramRun(texts, chosen, endpoint.calls, num_calls[0] if forks else 0)


def continues_compacted(call: Call, calls: Sequence[Call]) -> bool:
    """Return whether the call's prompt goes on behind an answer whose cache was compacted."""
    return any(other.compactions and call.prompt.startswith(other.prompt + other.answer) for other in calls)


def compared_hits(theirs: ProgramRun, ours: ProgramRun) -> list[tuple[int, int]]:
    """Return the prefix hits of the prompts that both servers got, as pairs (theirs, ours).

    Prompts behind a compacted answer are left out: what it generated is not in the prefix cache. So are racing ones.
    """
    hits: dict[str, list[int]] = {}
    for call in theirs.calls[theirs.num_racing :]:
        hits.setdefault(call.prompt, []).append(call.cached_tokens)
    # The first run's request with a prompt comes before the second run's on both servers.
    return [
        (hits[call.prompt].pop(0), call.cached_tokens)
        for call in ours.calls[ours.num_racing :]
        if hits.get(call.prompt) and not continues_compacted(call, ours.calls)
    ]


def structure_differences(theirs: ProgramRun, ours: ProgramRun, choices: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one line for each difference that a policy may not make; ``choices`` are what may be selected."""
    wrong = []
    if set(theirs.texts) != set(ours.texts):
        wrong.append(f"other variables: {sorted(set(theirs.texts) ^ set(ours.texts))}")
    if len(theirs.calls) != len(ours.calls):
        wrong.append(f"{len(ours.calls)} requests instead of {len(theirs.calls)}")
    for run in (theirs, ours):
        wrong += [f"{name} is {text!r}" for name, text in run.choices.items() if text not in choices[name]]
    different = [pair for pair in compared_hits(theirs, ours) if pair[0] != pair[1]]
    if different:
        wrong.append(f"prefix hits differ for {len(different)} of the same prompts: {different[:3]}")
    if theirs.texts != ours.texts and not any(call.compactions for call in ours.calls):
        wrong.append("other texts, although nothing was compacted")
    return wrong
