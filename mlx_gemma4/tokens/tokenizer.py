"""Text to token ids and back, from the vocabulary that a model file carries.

In: the metadata of a GGUF (`Tokenizer.from_gguf`) or a Hugging Face folder (`Tokenizer.from_folder`).
Out: a `Tokenizer`: text -> ids, ids -> text.

Two kinds of GGUF vocabulary are read, both with the results of llama.cpp (src/llama-vocab.cpp):

`gemma4`  BPE with a list of merges. A space becomes U+2581, the text is cut into runs of newlines and the
          rest, and characters that aren't in the vocabulary become byte tokens <0xXX>.
`llama`   (gemma3 and older) SentencePiece BPE: no merges, but a score for each token. The neighbours whose
          concatenation has the best score join first, the leftmost of equals before the others.

The Rust library `tokenizers` does the work for both. A vocabulary that it can't encode exactly as llama.cpp does is
refused; no Gemma has one.

Three things differ from llama.cpp on purpose. Tokens of the shape <|name>, <name|> or <|name|> are control
tokens even where the file calls them user-defined, so that nobody can type one. No merge ever makes a control or
byte token. And </s> is the HTML tag that it is in Gemma 3's vocabulary, not an end of text.
This module knows nothing about chat: see chat_format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from ..errors import InputError, reason
from ..paths import read_object

SPACE = "\u2581"  # SentencePiece's form of a space
# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# <|turn>, <turn|>, <|"|>: in Gemma 4's vocabulary just the tokens of its chat and tool grammar look so.
_MARKER = re.compile(r"<\|[^<>\s]+>|<[^<>\s]+\|>")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Control tokens by their meaning, whatever type a file gives them; "</s>" and the like are HTML tags in Gemma 3.
_MEANING = re.compile(r"<(?:pad|eos|bos|unk|mask|start_of_turn|end_of_turn|start_of_image|end_of_image)>")
LONGEST = 256  # characters of a token; Gemma's have 31 at most, and work grows with the square of this
# Tokens that end a reply, beside those the file names: ids 1, 106 and 50 in Gemma 4, 1 and 106 in Gemma 3.
# Found by text, since 50 is an unused token in Gemma 3 and a trimmed vocabulary has other ids.
_ENDS = ("<eos>", "<turn|>", "<|tool_response>", "<end_of_turn>")

Encoder = Callable[[str], "list[int]"]


class Splitter:
    """Cuts text at given strings; where several begin at one place, at the longest."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        lengths: dict[str, set[int]] = {}
        for text in ids:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._starts = re.compile(f"[{re.escape(''.join(lengths))}]") if lengths else None

    def split(self, text: str) -> list[str | int]:
        """Return the text between the strings, never empty, and the ids of the strings, in order."""
        parts: list[str | int] = []
        done = 0
        for match in self._starts.finditer(text) if self._starts else ():
            at = match.start()
            candidates = (text[at : at + n] for n in self._lengths[text[at]])
            found = next((c for c in candidates if c in self._ids), None) if at >= done else None
            if found:
                parts += [text[done:at], self._ids[found]] if at > done else [self._ids[found]]
                done = at + len(found)
        return [*parts, text[done:]] if done < len(text) else parts


class Tokenizer:
    """Text <-> ids of one vocabulary. Immutable, and safe to use from several threads.

    bos_id       goes before every text
    stop_ids     ids that end a reply
    control_ids  ids that are never text: nothing a user types becomes one, and `decode` leaves them out
    control_starts  the characters that control tokens begin with ("<")
    chat_template  the file's Jinja source, or None
    split_special  returns a text cut at its control tokens: the text between them as it is, each of them as its id
    """

    def __init__(
        self,
        tokens: Sequence[str],
        types: Sequence[int],
        encode: Encoder,
        control: Iterable[int],
        *,
        bos_id: int | None = None,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        self.vocab_size = len(tokens)
        self.chat_template = chat_template
        self._tokens = tokens
        self._types = types
        self._encode = encode
        self._pieces: dict[int, bytes] = {}  # filled as ids are met
        self._control = {tokens[i]: i for i in control}
        self.split_special = Splitter(self._control).split
        self.control_ids = frozenset(self._control.values())
        self.control_starts = frozenset(text[0] for text in self._control)
        if bos_id is None or not 0 <= bos_id < len(tokens):
            if "<bos>" not in self._control:
                raise InputError("the tokenizer names no BOS token: convert the model again")
            bos_id = self._control["<bos>"]
        self.bos_id = bos_id
        ends = [self._control[text] for text in _ENDS if text in self._control]
        self.stop_ids = frozenset([*ends, *(i for i in stop_ids if 0 <= i < len(tokens))])

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "the file") -> Tokenizer:
        """Return the tokenizer that a GGUF's metadata describes (keys tokenizer.ggml.* and tokenizer.chat_template).

        Strings are str, arrays are numpy arrays or sequences. `source` names the file in an InputError.
        """
        try:
            return _from_metadata(metadata)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Return the tokenizer of a Hugging Face folder.

        Reads tokenizer.json and, where they exist, tokenizer_config.json, chat_template.jinja and
        generation_config.json. Raises InputError.
        """
        return _from_folder(Path(path))

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`. Control tokens in it stay text unless `parse_special`. BOS is never doubled."""
        ids: list[int] = []
        for part in self.split_special(text) if parse_special else [text]:
            ids.extend([part] if isinstance(part, int) else self._encode(_valid(part)))
        if add_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`. Bytes that form no character become U+FFFD; unknown ids are left out."""
        return b"".join(self.piece(i, skip_special=skip_special) for i in ids).decode("utf-8", "replace")

    def piece(self, token: int, *, skip_special: bool = True) -> bytes:
        """Return the UTF-8 bytes of one id, perhaps only a part of a character."""
        if token < 0 or (
            skip_special and token in self.control_ids
        ):  # soft tokens, of pictures and sounds, are no text
            return b""
        if token not in self._pieces:
            self._pieces[token] = self._make_piece(token)
        return self._pieces[token]

    def _make_piece(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            return b""
        text, kind = self._tokens[token], self._types[token]
        if kind == BYTE:
            return bytes([int(text[3:5], 16)])
        if kind != USER_DEFINED and token not in self.control_ids:
            text = text.replace(SPACE, " ")
        return text.encode("utf-8", "surrogateescape")

    def token_id(self, text: str) -> int | None:
        """Return the id of a control token such as "<|turn>", or None if this vocabulary has no such token."""
        return self._control.get(text)


def _from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gemma4", "llama"):
        raise InputError(f"tokenizer {str(model)[:40]!r} isn't supported: only Gemma's kinds, gemma4 and llama, are")
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(_array(metadata, "tokens"))]
    if long := max(map(len, tokens)) > LONGEST and max(tokens, key=len):
        raise _refused(f"a token of {len(long)} characters")
    types = _array(metadata, "token_type", len(tokens))
    named = {x: metadata.get(f"tokenizer.ggml.{x}_token_id") for x in ("bos", "eos", "eot", "eom")}
    for i in (x for x in named.values() if type(x) is int and 0 <= x < len(tokens)):
        if types[i] in (NORMAL, USER_DEFINED) and re.fullmatch(r"<[^<>\s]+>", tokens[i]):
            types[i] = CONTROL  # it begins or ends what people say: nobody types it
    vocab = _Vocab(tokens, types)
    # Ollama writes a vocabulary of merges under the name of the kind without; its scores count up from 0.
    merges = metadata.get("tokenizer.ggml.merges")
    if model == "gemma4" or metadata.get("tokenizer.ggml.pre") == "gemma4" or (merges is not None and len(merges)):
        encode = _gemma4_encoder(vocab, _array(metadata, "merges"))
    else:
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        encode = _llama_encoder(vocab, _array(metadata, "scores", len(tokens)), prefix)
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        tokens,
        types,
        encode,
        vocab.control,
        bos_id=named["bos"] if type(named["bos"]) is int else None,
        stop_ids=[i for i in (named["eos"], named["eot"], named["eom"]) if type(i) is int],
        chat_template=template if isinstance(template, str) else None,
    )


class _Vocab:
    """The token lists of a GGUF, checked, and the sets that both encoders need."""

    def __init__(self, tokens: list[str], types: list[int]) -> None:
        self.ids = {text: i for i, text in enumerate(tokens)}
        if twice := len(tokens) - len(self.ids):
            raise InputError(f"the tokenizer lists {twice} tokens twice: convert the model again")
        bytes_ = [text for text, kind in zip(tokens, types, strict=True) if kind == BYTE]
        if wrong := [text for text in bytes_ if not _BYTE.fullmatch(text)]:
            raise InputError(f"the tokenizer has a byte token {wrong[0]!r}, not <0xXX>: convert the model again")
        self.all_bytes = len(bytes_) == 256
        self.control = _control_ids(tokens, types)
        self.never = {*bytes_, *(tokens[i] for i in self.control)}  # tokens that no merge may make
        user = (i for i, kind in enumerate(types) if kind == USER_DEFINED)
        self.user = {tokens[i]: i for i in user if tokens[i] not in self.never}


def _array(metadata: Mapping[str, Any], name: str, length: int | None = None) -> list[Any]:
    """Return the list tokenizer.ggml.`name`; InputError if it is missing, empty or of another length."""
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None or isinstance(value, str | bytes) or not hasattr(value, "__len__"):
        raise InputError(f"the file has no list tokenizer.ggml.{name}: convert the model again")
    if length is not None and len(value) != length:
        raise InputError(f"tokenizer.ggml.{name} has {len(value)} entries for {length} tokens: convert the model again")
    result = value.tolist() if hasattr(value, "tolist") else list(value)
    wanted: type | tuple[type, ...] = str if name in ("tokens", "merges") else (int, float)
    if not result or not isinstance(result[0], wanted):
        raise InputError(f"tokenizer.ggml.{name} is empty or of the wrong type: convert the model again")
    return result


def _control_ids(tokens: Sequence[str], types: Sequence[int]) -> list[int]:
    """Return the ids that users must not be able to type: control tokens, and markers of chat and tool grammar."""
    return [
        i
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, UNKNOWN)
        or (text[0] == "<" and kind != BYTE and (_MARKER.fullmatch(text) or _MEANING.fullmatch(text)))
    ]


def _gemma4_encoder(vocab: _Vocab, merges: list[str]) -> Encoder:
    # The first of equal merges counts, as in llama.cpp.
    kept = [merge for merge in dict.fromkeys(merges) if merge.replace(" ", "", 1) not in vocab.never]
    # The rest of a line merges apart from newlines, and without further cutting into words.
    lines = pre_tokenizers.Split(tokenizers.Regex(r"\n+"), "isolated")
    encode = _rust_encoder(vocab, [tuple(merge.split(" ", 1)) for merge in kept], prefix=False, pre_tokenizer=lines)
    # llama.cpp takes a run of newlines for its token even where no merges lead to it.
    if any(encode(run) != [vocab.ids[run]] for run in ("\n" * i for i in range(1, 65)) if run in vocab.ids):
        raise _refused("runs of newlines that no merges make")
    return encode


def _llama_encoder(vocab: _Vocab, scores: list[float], prefix: bool) -> Encoder:
    """Return the encoder of SentencePiece BPE by scores: of pairs, ranked by the score of the token that they make.

    A list of ranked pairs gives the same ids. Let a token t be made at some place of a text. No earlier merge
    crossed the ends of that place, so inside it everything went as if t's text stood alone: of the ways to cut t in
    two, only one is ever used. So a queue of pairs, ranked by the score of what they make and leftmost first,
    pops what a queue of scores pops; pairs that are never used do no harm. Only equal scores of different tokens,
    and characters that occur in tokens but are none, could make a difference.
    """
    ids = vocab.ids
    # Text that is a user-defined token doesn't get as far as merging, unless the token has spaces as U+2581.
    barred = vocab.never.union(text for text in vocab.user if SPACE not in text)
    scored = zip(ids, scores, strict=True)
    mergeable = sorted((-score, text) for text, score in scored if len(text) > 1 and text not in barred)
    halves = ids.keys() | {character for _, text in mergeable for character in text}
    pairs = [
        (left, right)
        for _, text in mergeable
        for i in range(1, len(text))
        if (left := text[:i]) in halves and (right := text[i:]) in halves
    ]
    made = {left + right for left, right in pairs}  # padding tokens, which share a score, are not among them
    if len({score for score, text in mergeable if text in made}) != len(made):
        raise _refused("equal scores of different tokens")
    return _rust_encoder(vocab, pairs, prefix=prefix)


def _rust_encoder(vocab: _Vocab, pairs: list[Any], *, prefix: bool, pre_tokenizer: Any | None = None) -> Encoder:
    """Return the `tokenizers` pipeline with these merges. Raises InputError where llama.cpp's results would differ."""
    if not vocab.all_bytes:
        raise _refused("fewer than 256 byte tokens")  # characters would be dropped silently
    try:
        engine = tokenizers.Tokenizer(models.BPE(vocab.ids, pairs, byte_fallback=True))
    except Exception as error:  # the library raises plain Exception
        raise _refused(f"merges that can't be used ({error})") from error
    steps: list[Any] = [normalizers.Prepend(" ")] if prefix else []
    engine.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if pre_tokenizer is not None:
        engine.pre_tokenizer = pre_tokenizer
    # Found in the text as typed, before spaces become U+2581; each stretch between them is encoded by itself.
    engine.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in vocab.user])
    return _encoder(engine)


def _refused(what: str) -> InputError:
    return InputError(f"the tokenizer has {what}, as no Gemma's has: convert the original model again")


def _encoder(engine: tokenizers.Tokenizer) -> Encoder:
    def encode(text: str) -> list[int]:
        if len(text) < 2000:
            return engine.encode(text, add_special_tokens=False).ids
        # The same, without offsets, and other threads run meanwhile.
        return engine.encode_batch_fast([text], add_special_tokens=False)[0].ids

    return encode


def _valid(text: str) -> str:
    """Return `text` with surrogates (from undecodable input) joined where they pair, else replaced by U+FFFD."""
    if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _from_folder(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{folder} has no tokenizer.json: give a folder with the whole model")
    try:
        engine = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{file} can't be read: {error}") from error
    found = engine.get_vocab(with_added_tokens=True)
    if not isinstance(engine.model, models.BPE) or "<0x00>" not in found or SPACE not in found:
        raise InputError(f"{file} isn't a Gemma tokenizer: BPE with U+2581 for spaces and byte tokens")
    added = engine.get_added_tokens_decoder()
    if (most := max(found.values())) > 2 * len(found) + 10_000 or max(map(len, found)) > LONGEST:
        raise InputError(f"{file}: has a token of id {most} or over {LONGEST} characters, as no Gemma's has")
    tokens, types = [""] * (most + 1), [UNUSED] * (most + 1)
    for text, i in found.items():
        tokens[i], types[i] = text, BYTE if _BYTE.fullmatch(text) else NORMAL
    for i, token in added.items():
        marks = _MARKER.fullmatch(token.content) or _MEANING.fullmatch(token.content)
        types[i] = CONTROL if token.special or marks else USER_DEFINED
    # Markers that the file doesn't call special are made special, so that none is found in typed text.
    engine.add_special_tokens([tokenizers.AddedToken(tokens[i], special=True) for i in added if types[i] == CONTROL])
    engine.encode_special_tokens = True
    config, generation = _object(folder / "tokenizer_config.json"), _object(folder / "generation_config.json")
    bos = config.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    eos = generation.get("eos_token_id")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        several = (x for x in template if isinstance(x, dict))
        template = next((x.get("template") for x in several if x.get("name") == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        try:
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / 'chat_template.jinja'}: can't be read ({reason(error)})") from error
    return Tokenizer(
        tokens,
        types,
        _encoder(engine),
        _control_ids(tokens, types),
        bos_id=engine.token_to_id(bos) if isinstance(bos, str) else None,
        stop_ids=[i for i in (eos if isinstance(eos, list) else [eos]) if type(i) is int],
        chat_template=template if isinstance(template, str) else None,
    )


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
