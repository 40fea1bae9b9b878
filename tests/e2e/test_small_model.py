"""A real pretrained model behind a real server answers as the dense oracle, and its cache stays bounded."""

from collections.abc import Iterator

import pytest

from devtools.tiny_models import small_model_path
from tests.e2e.workload import SHARED_PREFIX_LEN, Setting, oracle
from tests.support.harness.server import Server
from tests.support.oracle.dense import DenseResult

pytestmark = pytest.mark.server

NUM_TOKENS = 205
# Of the one alone, two compactions and some tokens after them.
NUM_ALONE = 130
SETTING = Setting(budget=45, buffer=37)
QUESTIONS = (
    "How many sheep does each of seven farmers own if they own 84 together and share alike?",
    "Why is the sky blue?",
    "Is 91 a prime number? Explain step by step.",
    "Name three uses of a brick.",
)
SYSTEM_PROMPT = (
    "You are a patient teacher. You think about every question before you answer it, you write each step of your "
    "reasoning on a line of its own, you check every number twice, you never skip a step because it looks easy, and "
    "you end with one short sentence that begins with the word Answer. If a question has no answer, you say so, and "
    "you tell what is missing to find one."
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    env = {"RKV_PROBE_MAX_PRIVATE": str(SETTING.budget + SETTING.buffer)}
    flags = ["--model-path", str(small_model_path()), "--page-size", "16", "--max-total-tokens", "4096"]
    with Server([*flags, *SETTING.flags], env=env) as server:
        yield server


def prompts() -> list[tuple[int, ...]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model_path())
    chats = [[{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": text}] for text in QUESTIONS]
    chats += [[{"role": "user", "content": "Tell me a long story about a lighthouse."}]]
    chats += [[{"role": "user", "content": "Write a letter to a friend who moved to another country."}]]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def assert_as_the_oracle(found: list[int], expected: DenseResult) -> None:
    """Equal up to the oracle's first near-tie, of scores or of logits, and that must not come early."""
    certain = min(expected.num_certain_outputs(), len(found))
    assert found[:certain] == expected.output_ids[:certain]
    pairs = zip(found, expected.output_ids, strict=False)
    agreeing = next((i for i, (a, b) in enumerate(pairs) if a != b), len(found))
    assert agreeing >= len(found) - 5, f"{agreeing} tokens agree, {certain} of them are certain"


def test_six_at_once_and_one_alone_answer_as_the_oracle(server):
    ids = prompts()
    assert len({prompt[:SHARED_PREFIX_LEN] for prompt in ids[:4]}) == 1
    params = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    answers = server.generate_many([list(prompt) for prompt in ids], params)
    assert all(len(answer["output_ids"]) == NUM_TOKENS for answer in answers)
    answers.append(server.generate(list(ids[2]), {**params, "max_new_tokens": NUM_ALONE}))
    assert answers[-1]["meta_info"]["kv_compactions"] == 2
    server.assert_clean()
    assert answers[-1]["meta_info"]["cached_tokens"] >= SHARED_PREFIX_LEN // 16 * 16
    for prompt, answer in zip([*ids, ids[2]], answers, strict=True):
        # Reading the weights takes most of a decode step; with a guess they are read once for many tokens.
        expected = oracle(small_model_path(), prompt, NUM_TOKENS, SETTING, answer["output_ids"])
        assert len(expected.compactions) >= 4
        assert_as_the_oracle(answer["output_ids"], expected)
