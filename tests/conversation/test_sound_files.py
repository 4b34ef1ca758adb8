"""A sound file through `load` and `chat`: the projector that lies beside the model hears it."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import sound_files
from scripted import REAL, SHORT
from signals import RATE, voice

from mlx_gemma4 import InputError, Session, load
from mlx_gemma4.conversation.reply import prompt_ids

MEDIA = Path(__file__).parents[1] / "fixtures" / "media"


@pytest.mark.parametrize("kind", ["a", "ua"])
def test_a_sound_file_in_a_conversation(kind: str, tmp_path: Path) -> None:
    """A second is 25 soft tokens between two control tokens, and what is asked next reads none of them again."""
    lm = load(MEDIA / kind / "model.gguf")
    tokenizer = copy.copy(lm.tokenizer)
    tokenizer.chat_template = REAL
    lm = replace(lm, tokenizer=tokenizer)
    path = tmp_path / "said.mp3"
    path.write_bytes(sound_files.encoded("mp3", "libmp3lame", voice(RATE)[None], RATE))
    asked = {"role": "user", "content": [{"type": "audio", "audio": path}, {"type": "text", "text": "a"}]}
    ids = prompt_ids(lm, [asked])
    soft = [i for i, id in enumerate(ids) if id < 0]
    assert soft == list(range(soft[0], soft[0] + 25))
    ends = [tokenizer.token_id(text) for text in ("<|audio>", "<audio|>")]
    assert [ids[soft[0] - 1], ids[soft[-1] + 1]] == ends

    session = Session(lm, options=SHORT)
    for said in (asked, "b"):
        deque(session.send(said), maxlen=0)
        assert session.reply is not None
        read = session.reply.statistics
        assert read.prompt_tokens + read.reused_tokens >= len(ids)
    assert read.reused_tokens > soft[-1] + 1


def test_without_a_projector_a_sound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "said.wav"
    path.write_bytes(sound_files.wav(voice(RATE)))
    session = Session(load(MEDIA / "a" / "model.gguf", mmproj=None))
    with pytest.raises(InputError, match="--mmproj"):
        next(session.send({"role": "user", "content": [{"type": "audio", "audio": path}]}))
