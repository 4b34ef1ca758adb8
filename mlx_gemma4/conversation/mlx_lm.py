"""Adapt a loaded model to mlx-lm's functions: `mlx_lm.generate(*for_mlx_lm(lm), prompt="...")`.

In: a `LanguageModel`. Out: the two objects that mlx-lm calls model and tokenizer. Written for mlx-lm 0.28 and later,
which nothing else here needs. mlx-lm's list of caches, one a layer, is a list of a single `KVState` here: it may be
passed as `prompt_cache` and trimmed, and holds all that was read.
"""

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from ..chat_format.messages import for_template
from ..chat_format.template import Message, encode_chat, render_chat
from ..errors import InputError
from ..kv.state import KVState
from ..tokens.tokenizer import Tokenizer
from .language_model import LanguageModel


class MlxLmCache:
    """A KV state with the methods of mlx-lm's prompt caches."""

    def __init__(self, kv: KVState) -> None:
        self.kv = kv

    @property
    def state(self) -> list[mx.array]:
        return self.kv.arrays

    @property
    def offset(self) -> int:
        return self.kv.length

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Remove the last n tokens; return how many. Raises InputError if they are too many (see `KVState.rewind`)."""
        n = min(n, self.kv.length)
        self.kv.rewind(self.kv.length - n)
        return n


class MlxLmModel:
    """The model as mlx-lm uses it."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.layers: list[Any] = []  # mlx-lm makes a cache for each; this model has one cache

    def __call__(self, inputs: mx.array, cache: Sequence[MlxLmCache] | None = None) -> mx.array:
        """Return the logits, fp32 [1, 1, vocab], after the last of the tokens `inputs`, int [1, T]."""
        if inputs.shape[0] != 1:
            raise InputError(f"a batch of {inputs.shape[0]} prompts: this model takes one at a time")
        if inputs.shape[1] > 1:
            self.lm.config.check_ids(cast("list[int]", inputs[0].tolist()))
        (held,) = self.make_cache() if cache is None else cache
        if held.kv.length + inputs.size > self.lm.config.context:
            raise InputError(f"the model's context holds {self.lm.config.context} tokens, and it is full; ask for less")
        return self.lm.model.forward(inputs[0], held.kv)[None, None]

    def make_cache(self) -> list[MlxLmCache]:
        """Return a new prompt cache."""
        return [MlxLmCache(self.lm.model.new_state())]


class MlxLmTokenizer:
    """The tokenizer as mlx-lm wraps it in its own."""

    bos_token, eos_token = "<bos>", "<eos>"
    clean_up_tokenization_spaces = False  # for mlx-lm's streaming detokenizer

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.inner = tokenizer
        self.chat_template = tokenizer.chat_template
        self.vocab_size = tokenizer.vocab_size
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = min(tokenizer.stop_ids, default=None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text. As with mlx-lm's other tokenizers, control tokens may be spelled in it."""
        return self.inner.encode(text, add_bos=add_special_tokens, parse_special=True)

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.inner.decode([ids] if isinstance(ids, int) else ids, skip_special=skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        """Return the control tokens, the only ones that mlx-lm looks for by name."""
        return {self.inner.decode([i], skip_special=False): i for i in sorted(self.inner.control_ids)}

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        enable_thinking: bool | None = None,
        **variables: Any,
    ) -> list[int] | str:
        """Return the prompt. With `tokenize`, control tokens spelled in messages stay text."""
        known, declared = for_template(messages, tools or (), self.chat_template)
        given: dict[str, Any] = {"tools": declared or None, "enable_thinking": enable_thinking, **variables}
        given["add_generation_prompt"] = add_generation_prompt
        return encode_chat(self.inner, known, **given) if tokenize else render_chat(self.chat_template, known, **given)


def for_mlx_lm(lm: LanguageModel) -> tuple[MlxLmModel, Any]:
    """Return the model and the tokenizer that mlx-lm's `generate`, `stream_generate` and `generate_step` take.

    One sequence at a time; no draft model. As always in mlx-lm, `apply_chat_template` turns thinking on unless told
    otherwise, and control tokens are part of the reply's text. Raises InputError if mlx-lm isn't installed.

    >>> import mlx_gemma4, mlx_lm
    >>> model, tokenizer = for_mlx_lm(mlx_gemma4.load())
    >>> messages = [{"role": "user", "content": "Hello"}]
    >>> prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
    >>> text = mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=8)
    >>> text == mlx_gemma4.generate(model.lm, "Hello", max_tokens=8, sampling=mlx_gemma4.Sampling(temperature=0))
    True
    """
    try:
        from mlx_lm.tokenizer_utils import TokenizerWrapper
    except ImportError as error:
        raise InputError("mlx-lm is not installed; pip install mlx-lm") from error
    return MlxLmModel(lm), TokenizerWrapper(MlxLmTokenizer(lm.tokenizer), eos_token_ids=lm.tokenizer.stop_ids)
