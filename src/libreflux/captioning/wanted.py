"""Which captions are wanted: their names, and the prompt that asks for each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from libreflux.errors import OptionError
from libreflux.plainjson import is_text

PROMPTS = {
    "short": "Describe this picture in one short sentence of at most fifteen words. Say what is shown, and nothing "
    "that cannot be seen. Answer with the sentence alone.",
    "long": "Describe this picture in three to five sentences: what is shown, what it does, where it is, its colours, "
    "the light, the style or medium, and in quotes every text that can be read. Say nothing that cannot be seen. "
    "Answer with the description alone.",
    "tags": "List ten to twenty tags for this picture, the most important first, in lower case, separated by commas. "
    "Answer with the tags alone.",
}
"""Of the captions that are known by name."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
MOST_CHARACTERS = 10_000


def wanted_captions(captions: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Name to prompt, in the order in which captions are written: short, long, tags, then others by name.

    Args:
        captions: names that are known, or "name=prompt"; or prompts by their names.

    Raises:
        OptionError: no caption, a name that is not known or cannot be one, a name that is there twice, or no prompt.
    """
    if isinstance(captions, Mapping):
        pairs = [(str(name), prompt) for name, prompt in captions.items()]
    else:
        texts = [captions] if isinstance(captions, str) else list(captions)
        pairs = [_pair(text) for text in texts]
    if not pairs:
        raise OptionError("is empty", "captions", hint=f"name some of {', '.join(PROMPTS)}")
    found: dict[str, str] = {}
    for name, prompt in pairs:
        if not _NAME.fullmatch(name):
            raise OptionError(
                f"{name!r} is no name", "captions", hint="use letters, digits, - and _, as in mood=PROMPT"
            )
        if name in found:
            raise OptionError(f"{name} is there twice", "captions", hint="give one prompt for each name")
        if not isinstance(prompt, str) or not prompt.strip() or not is_text(prompt) or len(prompt) > MOST_CHARACTERS:
            hint = f"give a text of at most {MOST_CHARACTERS:,} characters"
            raise OptionError(f"{name} has no prompt that can be asked", "captions", hint=hint)
        found[name] = prompt.strip()
    return {name: found[name] for name in sorted(found, key=place_of_name)}


def place_of_name(name: str) -> tuple[int, str]:
    """Sorts the names of captions: those that are known first, in their order."""
    return (list(PROMPTS).index(name) if name in PROMPTS else len(PROMPTS)), name


def _pair(text: object) -> tuple[str, str]:
    name, equals, prompt = str(text).partition("=")
    name = name.strip()
    if equals:
        return name, prompt
    if name not in PROMPTS:
        hint = f"use {', '.join(PROMPTS)}, or write its prompt: name=PROMPT"
        raise OptionError(f"no prompt is known for {name!r}", "captions", hint=hint)
    return name, PROMPTS[name]
