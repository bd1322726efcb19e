"""Prompts with a trigger word: the word before it, the class word, is repeated to make room for identity rows.

Source: TencentARC/PhotoMaker, pipeline.py, with two changes. The class tokens are never cut off; where a prompt is too
long, text goes from its tail, and the end token stays. Weights and embeddings are read as ComfyUI reads them.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.sd1_clip
import comfy.sdxl_clip
import torch

TRIGGER = "img"
# Keys under which `comfy.sdxl_clip` takes tokens, and the tokenizers they come from.
ENCODERS = {"l": "clip_l", "g": "clip_g"}

Token = tuple[int | torch.Tensor, float]


@dataclass(frozen=True)
class Prompt:
    """A tokenised text: per text encoder its tokens with weights, None standing where a trigger word was."""

    sequences: dict[str, list[Token | None]]
    persons: int


@dataclass(frozen=True)
class ClassTokens:
    """Tokens for `CLIP.encode_from_tokens`, and per person the positions of the class tokens, start token included."""

    tokens: dict[str, list[list[Token]]]
    positions: list[list[int]]


def read_prompt(
    tokenizer: comfy.sdxl_clip.SDXLTokenizer, text: str, trigger: str | Sequence[str] = TRIGGER, several: bool = False
) -> Prompt:
    """Tokenise a text around its trigger words.

    A trigger word is matched as the published special token is: in its exact case, also inside words ("imgs" is "img"
    and "s").

    Args:
        tokenizer: of an SDXL CLIP.
        text: may hold weights, "(a man img:1.2)", and "embedding:name".
        trigger: one word, or several, any of which stands for a person.
        several: whether there may be more than one trigger word in the text.

    Raises:
        ValueError: an unusable trigger word, none or too many of them in the text, or one without a class word.
    """
    words = [trigger] if isinstance(trigger, str) else list(trigger)
    _check_words(words)
    sequences = {key: _sequence(getattr(tokenizer, name), text, words) for key, name in ENCODERS.items()}
    persons = sequences["l"].count(None)
    named = " or ".join(f"'{word}'" for word in words)
    if not persons:
        raise ValueError(
            f"The text has no trigger word {named}, found '{_shown(text)}'. Write it after the word for the person, in "
            f"this case: 'a photo of a man {words[0]}'."
        )
    if persons > 1 and not several:
        raise ValueError(
            f"The text has {persons} trigger words {named}, expected one, also as a part of other words: "
            f"'{_shown(text)}'. Keep the one after the word for the person, or say how many pictures belong to each "
            "person."
        )
    for sequence in sequences.values():
        _check_class_words(sequence, named, text)
    return Prompt(sequences, persons)


def expand(tokenizer: comfy.sdxl_clip.SDXLTokenizer, prompt: Prompt, repeats: Sequence[int]) -> ClassTokens:
    """Repeat each person's class token and pad or cut to the encoders' length (77).

    Args:
        repeats: class tokens per person, in the order of the trigger words.

    Raises:
        ValueError: the class tokens do not fit, or the two encoders see them at different positions.
    """
    length = room(tokenizer)
    tokens, positions, excess = {}, {}, 0
    for key, name in ENCODERS.items():
        items = _expanded(prompt.sequences[key], repeats)
        kept = _cut(items, length)
        excess = max(excess, len(items) - len(kept))
        tokens[key] = [_padded(getattr(tokenizer, name), [token for token, _ in kept])]
        positions[key] = [
            [index for index, (_, owner) in enumerate(kept, start=1) if owner == person]
            for person in range(len(repeats))
        ]
    if positions["l"] != positions["g"]:
        raise ValueError(
            f"The text encoders see the class word at different positions: {positions['l']} and {positions['g']}. An "
            "embedding before it fits only one of them; use one made for SDXL, or move it behind the trigger word."
        )
    if excess:
        logging.warning("PhotoMaker: the last %d tokens of the text do not fit beside the class tokens.", excess)
    return ClassTokens(tokens, positions["l"])


def without_triggers(tokenizer: comfy.sdxl_clip.SDXLTokenizer, prompt: Prompt) -> dict[str, list[list[Token]]]:
    """The text as if the trigger words were not written, for `CLIP.encode_from_tokens`."""
    return {
        key: [_padded(getattr(tokenizer, name), [token for token in prompt.sequences[key] if token][: room(tokenizer)])]
        for key, name in ENCODERS.items()
    }


def room(tokenizer: comfy.sdxl_clip.SDXLTokenizer) -> int:
    """Tokens of text between the start and the end token (75)."""
    return tokenizer.clip_l.max_length - 2


def _check_words(words: list[str]) -> None:
    for word in words:
        if not word or re.search(r"[\s()\\]", word):
            raise ValueError(
                f"The trigger word '{word}' is empty or has spaces, brackets or backslashes in it. Use a plain word "
                f"such as '{TRIGGER}'."
            )
    if not words:
        raise ValueError(f"There is no trigger word. Give at least one, such as '{TRIGGER}'.")


def _check_class_words(sequence: list[Token | None], named: str, text: str) -> None:
    for index, token in enumerate(sequence):
        if token is None and (index == 0 or sequence[index - 1] is None):
            raise ValueError(
                f"There is no word before a trigger word {named} in '{_shown(text)}'. Write it after the word for the "
                "person, as in 'a man img'."
            )


def _shown(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _sequence(tokenizer: comfy.sd1_clip.SDTokenizer, text: str, words: list[str]) -> list[Token | None]:
    """One encoder's tokens of a text, without start, end and padding."""
    longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    # Names of embeddings are skipped: a trigger word may be a part of them.
    pattern = re.compile(rf"{re.escape(tokenizer.embedding_identifier)}\S*|({longest_first})")
    escaped = comfy.sd1_clip.escape_important(text)
    segments = [(escaped, 1.0)] if tokenizer.disable_weights else comfy.sd1_clip.token_weights(escaped, 1.0)
    sequence = []
    for segment, weight in segments:
        start = 0
        for match in pattern.finditer(segment):
            if match.group(1):
                sequence += [*_tokens(tokenizer, segment[start : match.start()], weight), None]
                start = match.end()
        sequence += _tokens(tokenizer, segment[start:], weight)
    return sequence


def _tokens(tokenizer: comfy.sd1_clip.SDTokenizer, text: str, weight: float) -> list[Token]:
    """Tokens of a text without weights; embeddings of another encoder's width are left out, as ComfyUI does."""
    batches = tokenizer.tokenize_with_weights(text, return_word_ids=True, disable_weights=True)
    words = [token for batch in batches for token, _, word in batch if word]
    return [(token, weight) for token in words if isinstance(token, int) or len(token) == tokenizer.embedding_size]


def _expanded(sequence: list[Token | None], repeats: Sequence[int]) -> list[tuple[Token, int | None]]:
    """Tokens with the person whose class token they are, None for other text."""
    items, person = [], 0
    for token in sequence:
        if token is not None:
            items.append((token, None))
        else:
            class_token = items.pop()[0]
            items += [(class_token, person)] * repeats[person]
            person += 1
    return items


def _cut(items: list[tuple[Token, int | None]], length: int) -> list[tuple[Token, int | None]]:
    """The first tokens that fit beside the class tokens, which all stay."""
    text = length - sum(owner is not None for _, owner in items)
    if text < 0:
        raise ValueError(
            f"The pictures need {length - text} class tokens, but a text has room for {length}. Use fewer pictures."
        )
    kept = []
    for item in items:
        if item[1] is not None or text > 0:
            kept.append(item)
            text -= item[1] is None
    return kept


def _padded(tokenizer: comfy.sd1_clip.SDTokenizer, tokens: list[Token]) -> list[Token]:
    padding = tokenizer.max_length - 2 - len(tokens)
    return [(tokenizer.start_token, 1.0), *tokens, (tokenizer.end_token, 1.0), *[(tokenizer.pad_token, 1.0)] * padding]
