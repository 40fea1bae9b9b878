"""What a policy is given and what it returns."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class ScoreInputs:
    """The resident tokens of one request in one layer, in temporal order.

    Attributes:
        queries: Post-RoPE queries of the last ``window`` tokens, oldest first,
            ``[window, num_qo_heads, head_dim]``, floating.
        keys: Keys as cached, ``[L, num_kv_heads, head_dim]``, floating, on the device of ``queries``.
        prompt_len: Tokens of the prompt; they take part in the scores but are no candidates.

    Raises:
        ValueError: ``prompt_len`` is negative or the prompt and the window do not fit into L tokens.
    """

    queries: Tensor
    keys: Tensor
    prompt_len: int

    def __post_init__(self) -> None:
        window, num_tokens = self.queries.shape[0], self.keys.shape[0]
        if self.prompt_len < 0 or self.prompt_len + window > num_tokens:
            raise ValueError(
                f"prompt_len {self.prompt_len} and a window of {window} queries do not fit into L = {num_tokens} keys"
            )


class Policy(Protocol):
    """A rule that scores the tokens of one request, layer by layer. Its attributes are its hyper-parameters."""

    def score(self, inputs: ScoreInputs) -> Tensor:
        """Score the tokens before the window; reads ``inputs`` only.

        Returns:
            ``[num_kv_heads, L - window]``, fp32; higher means keep. Columns of the prompt are ignored.

        Raises:
            ValueError: A shape, dtype or device of ``inputs`` does not fit.
        """
        ...
