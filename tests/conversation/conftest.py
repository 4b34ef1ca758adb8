"""The actor of tests of conversations."""

from __future__ import annotations

import pytest
from scripted import REAL, Actor

from mlx_gemma4 import LanguageModel


@pytest.fixture
def actor(lm: LanguageModel) -> Actor:
    return Actor(lm, REAL)
