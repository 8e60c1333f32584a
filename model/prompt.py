"""Prompts before they are encoded: how they are cleaned, and how many tokens the model takes. No torch."""

from __future__ import annotations

import html
import re
from functools import lru_cache
from pathlib import Path

import ftfy
from tokenizers import Tokenizer

from conf.schema import ModelSettings
from model.config import DiTConfig
from model.files import CheckpointError, locate


def clean(prompt: str) -> str:
    """Mends broken Unicode, undoes HTML escapes (twice, as pages are escaped twice) and collapses white
    space.
    """
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def load_tokenizer(path: Path) -> Tokenizer:
    """The published `tokenizer.json` itself, which neither cuts nor pads. Raises CheckpointError.

    Going by `tokenizer_config.json`, transformers 5 builds a T5 tokenizer of its own around the vocabulary,
    without the normaliser and the byte fallback.
    """
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: {error}") from error
    found.no_truncation()
    found.no_padding()
    return found


def unused_tokens(m: ModelSettings, prompt: str) -> int:
    """Tokens at the end of a prompt that the transformer of this checkpoint has no place for."""
    files = locate(m)
    tokens = len(_tokenizer(files.tokenizer).encode(clean(prompt)).ids)
    return max(0, tokens - DiTConfig.from_file(files.config).text_len)


_tokenizer = lru_cache(maxsize=1)(load_tokenizer)
"""Kept, since a vocabulary of 256 000 takes a second to read and every lesson's prompt is counted."""
