"""Load a file or folder as a `LanguageModel`: the model, its tokenizer, and the sampling that its file recommends.

In: a path, or a repository's name. Out: a `LanguageModel`, which also encodes prompts. Replies are made in reply.py.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NoReturn

from ..chat_format import renderer
from ..chat_format.messages import for_template
from ..chat_format.template import Message, encode_chat
from ..config import Config
from ..distributed import team
from ..distributed.place import Place, placed
from ..doctor.ready import make_ready
from ..doctor.verdict import device_name, usable_kernels
from ..errors import InputError
from ..files.hub import resolve
from ..generation.drafting import LONGEST, MOST, NGRAM, ROW, Drafts
from ..generation.sampling import Sampling
from ..loading.assistant import assistant_beside, load_assistant
from ..loading.loader import Progress, load_model, open_model
from ..media.kind import KINDS
from ..media.projector import Media, media_beside, open_media
from ..memory import SOME_ROOM, MemoryPlan, Room
from ..model.assistant import Assistant
from ..model.model import Model
from ..paths import cache_folder, read_object
from ..shard import Shard
from ..tokens.tokenizer import Tokenizer
from .parts import PromptIds, with_soft_tokens

log = logging.getLogger("mlx_gemma4")

# The keys under general.sampling, with the value of those that a file leaves out: Google's choice for Gemma 4.
SAMPLING_KEYS: dict[str, Any] = {"temp": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.0, "penalty_repeat": 1.0}
_OFF = {"top_k": 0, "top_p": 1.0}
_FIELDS = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}  # of Sampling and generation_config.json


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer."""

    path: Path
    config: Config
    model: Model
    tokenizer: Tokenizer
    sampling: Sampling  # as the file recommends
    plan: MemoryPlan  # of the weights
    drafts: Drafts | None = None  # of tokens, so that a step makes several; None: a token a step
    media: Media | None = None  # what it sees and hears with; None: it reads text alone

    def encode_prompt(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        raw: bool = False,
        after: Sequence[int] = (),
        system: str | None = None,
        think: bool | None = None,
    ) -> list[int]:
        """Return the token ids of a prompt, as a user's turn in the file's chat template.

        Args:
            prompt: text, or parts of content as messages have them.
            raw: encode the text as it is instead, without the template.
            after: token ids of the conversation so far, up to its last reply: the prompt is its next turn.
            system: content of the system message.
            think: let the model think first; None: the template's default.

        Raises:
            InputError: the template can't continue a conversation, or `system` comes too late.
        """
        if raw:
            if not isinstance(prompt, str):
                raise InputError("--raw sends a text as it is, and no pictures or sounds; leave it out")
            return self.tokenizer.encode(prompt, add_bos=not after)
        turn: Message = {"role": "user", "content": prompt}
        if not after:
            told: list[Message] = [{"role": "system", "content": system}] if system else []
            return self.encode_messages([*told, turn], enable_thinking=think)
        if system:
            raise InputError("--system: the saved conversation has begun already; leave it out, or start a new one")
        # What the template writes between one reply and the next is found with made-up turns before it.
        past: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        before = encode_chat(self.tokenizer, past, add_generation_prompt=False, enable_thinking=think)
        both = self.encode_messages([*past, turn], enable_thinking=think)
        end = max((i for i, token in enumerate(before) if token in self.tokenizer.stop_ids), default=None)
        if end is None or both[: end + 1] != before[: end + 1]:
            raise InputError(f"{self.path}: its chat template doesn't let a saved conversation go on; use --raw")
        del both[: end + (after[-1] in self.tokenizer.stop_ids)]
        return both

    def encode_messages(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), **variables: Any
    ) -> PromptIds:
        """Return the token ids of messages in OpenAI's form, pictures and sounds included.

        Args:
            variables: names for the chat template, as `encode_chat` takes them.

        Raises:
            InputError: the template refuses the messages, or a part of them can't be read.
        """
        takes = self.media.kinds if self.media else ()
        known, declared = for_template(messages, tools, self.tokenizer.chat_template, takes)
        ids = encode_chat(self.tokenizer, known, tools=declared or None, **variables)
        return with_soft_tokens(ids, known, self.tokenizer, self.media, self.model.soft)


def demo_path() -> Path:
    """Return the path of the built-in model."""
    return Path(str(files("mlx_gemma4") / "demo" / "gemma4-demo.gguf"))


def load(
    path: str | Path | None = None,
    *,
    weights: Literal["auto", "packed", "dense"] = "auto",
    fuse: bool = True,
    progress: Progress | None = None,
    preparing: Progress | None = None,
    room: Room = SOME_ROOM,
    context: int | None = None,
    shard: Shard | None = None,
    split: team.Split = "auto",
    draft: str | Path | None = "auto",
    draft_max: int = MOST,
    mmproj: str | Path | None = "auto",
) -> LanguageModel:
    """Load a GGUF file (or any part of a split one), or a folder of safetensors with its `config.json`.

    Where `mlx.launch` has started this process among others, all run the model together: on rank 0 this returns when
    each has its shard. On the others it makes rank 0's calls and ends the process with it (docs/several-macs.md).

    Args:
        path: the file or folder, or `REPO[:QUANT]` on Hugging Face; None: the small built-in model.
        weights: "packed" keeps quantized blocks as they are in the file, "dense" expands them to fp32; "auto" is
            packed on a GPU, and on a CPU dense if memory allows.
        fuse: join each MLP's gate and up projections.
        progress: called with (bytes read, bytes in all).
        preparing: called after that, on a GPU, with (kernels that are ready, kernels in all).
        room: for keys and values, that must be there beside the weights.
        context: tokens of a conversation, at most; None: as many as the model takes.
        shard: load only this rank's part: several processes run the model together, and each makes the same calls.
        split: on several ranks, a part of each layer for each, or so many layers; "auto" measures what is faster.
        draft: the assistant that drafts for it: a file, a folder or `REPO[:QUANT]`; "auto": one that lies beside the
            model and fits, if there is any; None: none.
        draft_max: drafts of tokens that a step checks, at most; 0: none are made. How many pay is measured.
        mmproj: the projector that makes it see or hear, a file or a folder, read now; "auto": one that lies beside the
            model and fits, or the model's own folder, read when the first picture or sound comes; None: none.

    Raises:
        InputError: a file can't be used, assistant or projector is another model's, or there is too little memory.

    >>> lm = load()  # or load("gemma-4-E2B-it-Q4_K_M.gguf"), or load("ggml-org/gemma-4-E2B-it-GGUF:Q4_K_M")
    >>> lm.config.context
    2048
    """
    place = placed() if shard is None else None
    if place and place.rank:
        follow(place)
    path = demo_path() if path is None else resolve(path)
    if place:
        given: dict[str, Any] = {"weights": weights, "fuse": fuse, "context": context}
        name, named = "" if path == demo_path() else team.portable(path), draft not in (None, "auto")
        drafter = (resolve(draft) if draft and named else draft) if draft_max else None
        shard, drafter = team.gather(place, path, name, split, drafter, given | {"room": asdict(room)})
        given |= {"room": room, "draft": drafter, "draft_max": draft_max, "mmproj": mmproj}
        lm = load(path, progress=progress, preparing=preparing, shard=shard, **given)
        return replace(lm, model=team.lead(lm.model, lm.drafts))
    with open_model(path) as (config, source, metadata):
        tokenizer = Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_gguf(metadata, str(path))
        renderer.start()  # while the weights are read
        config = config.keep_to(context)
        media = _media(mmproj, path, config)
        if media:  # of what its projector takes, what the vocabulary has a token for
            media.kinds &= {kind for kind in KINDS if tokenizer.token_id(f"<|{kind}|>") is not None}
        room = replace(room, later=media.unread if media else 0)
        model, plan = load_model(config, source, weights, fuse, progress, usable_kernels(), room, shard)
    assistant = _assistant(draft, path, model, config) if draft_max else None
    make_ready(model, preparing, assistant)
    drafts = None
    if draft_max:
        least_alike, row = LONGEST if model.replays else NGRAM, ROW if model.kernels else 1.0
        drafts = Drafts(draft_max, assistant, least_alike=least_alike, row=row)
        with suppress(RuntimeError):  # this user has no home folder
            how = ", replayed" if model.replays else ""  # not as in versions that traced what checks drafts
            how += f", {shard.size} ranks, {shard.kind}" if shard else ""
            drafts.keep(cache_folder() / "drafts.json", f"{device_name()}, {path.name}{how}")
    return LanguageModel(path, model.config, model, tokenizer, _sampling_defaults(path, metadata), plan, drafts, media)


def follow(place: Place, joined: Callable[[], None] = lambda: None) -> NoReturn:
    """Be another rank than 0: load the shard of what rank 0 loads, make its calls, and end with it.

    Args:
        joined: called when rank 0 has been found.
    """

    def load_shard(path: Path, shard: Shard, draft: Path | None, given: dict[str, Any]) -> tuple[Model, Any]:
        lm = load(path, **given | {"room": Room(**given["room"])}, shard=shard, draft=draft, mmproj=None)
        return lm.model, lm.drafts and lm.drafts.drafter

    team.follow_rank_0(
        place, lambda name: resolve(Path(name).expanduser()) if name else demo_path(), load_shard, joined
    )


def _assistant(draft: str | Path | None, path: Path, model: Model, config: Config) -> Assistant | None:
    """Return the assistant that `load` asks for. One that was not named is no reason to fail."""
    if draft is None:
        return None
    if str(draft) != "auto":
        return load_assistant(resolve(draft), model, config)
    found = assistant_beside(path, config)
    try:
        return load_assistant(found, model, config) if found else None
    except InputError as error:
        log.warning("No drafts: %s", error)
        return None


def _media(mmproj: str | Path | None, path: Path, config: Config) -> Media | None:
    """Return the projector that `load` asks for. One that was not named is read when it is needed."""
    if mmproj is None or str(mmproj) == "auto":
        return media_beside(path, config) if mmproj else None
    media = open_media(Path(mmproj).expanduser(), config)
    media.load()
    return media


def _sampling_defaults(path: Path, metadata: Mapping[str, Any]) -> Sampling:
    """Return the sampling that a file or folder recommends, completed from SAMPLING_KEYS."""
    source, given = path, {key: metadata.get(f"general.sampling.{key}") for key in SAMPLING_KEYS}
    if path.is_dir():
        source = path / "generation_config.json"
        given = read_object(source) if source.is_file() else {}
        given |= {key: given.get(name) for key, name in _FIELDS.items()}
    sampling = Sampling(**{_FIELDS.get(key, key): value for key, value in SAMPLING_KEYS.items()})
    for key, field in ((key, _FIELDS.get(key, key)) for key in SAMPLING_KEYS):
        try:
            if given.get(key) is not None:
                sampling = replace(sampling, **{field: type(SAMPLING_KEYS[key])(given[key])})
        except (TypeError, ValueError, OverflowError, InputError):
            off = _OFF.get(key, SAMPLING_KEYS[key])  # llama.cpp, too, takes these out of range for off
            log.warning("%s: recommends %s %s for sampling, which can't be; taking %s", source, field, given[key], off)
            sampling = replace(sampling, **{field: off})
    return sampling
