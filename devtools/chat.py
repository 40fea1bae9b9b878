"""Questions as a chat model gets them."""

from typing import Any


def chat_ids(tokenizer: Any, question: str) -> list[int]:
    """Return a question as token ids, in the model's chat template when it has one."""
    if tokenizer.chat_template is None:
        return list(tokenizer(question)["input_ids"])
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
