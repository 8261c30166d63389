"""The options of a question and their letters: every option gets one, every reference answer is some of them."""

import re
import string
import unicodedata
from typing import NamedTuple

from hov2.answers import answer_text, choice_letters

# How an option begins that has a letter: "B. joke", "(B) joke", "[b] joke", "B: joke", "B - joke"; not "D.C. is far".
_LABEL = re.compile(r"\s*[\[(（]?([A-Za-z])(?:\s*[.:)\]．：）、](?!\w\.)|\s+[-–—]\s)\s*", re.ASCII)
# An answer of nothing but letters: "B", "a, c", "(A) and (C)", "AC", "The answer is B".
_LETTERS = re.compile(r"\W*(?:\b(?:the|answers?|options?|is|are|and|or|[a-z]|(?-i:[A-J]{2,}))\b\W*)+", re.IGNORECASE)
_ONLY_LETTERS = re.compile(r"[A-Za-z](?:\s*[,;]\s*[A-Za-z])*")


class Choices(NamedTuple):
    """Options with their letters, and the solution with the right ones in its answer."""

    options: tuple[str, ...]
    solution: str


class _Option(NamedTuple):
    letter: str
    words: str  # folded, without the letter
    had_letter: bool
    text: str  # as the model reads it


def with_letters(options: list[str], solution: str, options_name: str = "options") -> Choices:
    """Return the options, those without a letter with one before it, and the solution.

    An answer in an option's own words becomes that option's letter: among options that have no letters as they are
    written, these words go before letters. Raises ValueError for an answer that is none of the options; one that can't
    be read at all stays as it is. `options_name` is what the record calls the options.
    """
    lettered = _lettered(options)
    answer = answer_text(solution)
    said = solution.strip() if answer is None else answer
    letters = _letters_of_words(said, lettered)
    if letters:
        solution = _with_answer(solution, answer, ",".join(letters))
    else:
        letters = choice_letters(said)
        only_words = not _LETTERS.fullmatch(said) and not _LABEL.match(said)
        if letters and (only_words or not letters <= {option.letter for option in lettered}):
            raise ValueError(f"{said!r:.80} is none of the {len(options)} in {options_name!r}")
    return Choices(tuple(option.text for option in lettered), solution)


def _lettered(options: list[str]) -> list[_Option]:
    """Return the options with their letters: their own where each has another one, else by their places."""
    if len(options) > len(string.ascii_uppercase):
        raise ValueError(f"{len(options)} options, and 26 letters for them")
    labels = [_LABEL.match(option) for option in options]
    own_letters = [label[1].upper() if label else None for label in labels]
    all_have = None not in own_letters and len(set(own_letters)) == len(options)
    lettered = []
    for option, label, own_letter, letter in zip(options, labels, own_letters, string.ascii_uppercase):
        if all_have or own_letter == letter:
            lettered.append(_Option(own_letter, _fold(option[label.end() :]), True, option))
        else:
            lettered.append(_Option(letter, _fold(option), False, f"{letter}. {option}"))
    return lettered


def _letters_of_words(said: str, options: list[_Option]) -> list[str]:
    """Return the letters of the options whose words an answer gives, one or a list of them; [] if it doesn't.

    Raises ValueError where the words are those of several options, or of another one than the letter before them.
    """
    if _ONLY_LETTERS.fullmatch(said) and all(option.had_letter for option in options):
        return []  # "C" is the letter, also where another option says "C"
    label = _LABEL.match(said)
    if label:
        letter = label[1].upper()
        letters = _letters_of(said[label.end() :], options)
        if letter in letters:
            return [letter]
        if letters:
            raise ValueError(f"{said!r:.80} has the letter of one option and the words of another")
    letters = _letters_of(said, options)
    if len(letters) > 1:
        raise ValueError(f"{said!r:.80} is several of the options")
    if letters:
        return letters
    of_parts = [_letters_of(part, options) for part in re.split(r"[,;\n]|\band\b", said) if part.strip()]
    if all(len(of_part) == 1 for of_part in of_parts):
        return sorted({of_part[0] for of_part in of_parts})
    return []


def _letters_of(words: str, options: list[_Option]) -> list[str]:
    """Return the letters of all options with these words."""
    folded = _fold(words)
    return [option.letter for option in options if folded and option.words == folded]


def _with_answer(solution: str, answer: str | None, letters: str) -> str:
    """Return the solution with `letters` as its answer; `answer` None: it is nothing but the answer."""
    if answer is None:
        return letters
    block = re.compile(rf"<answer>\s*{re.escape(answer)}\s*</answer>")
    return block.sub(f"<answer>{letters}</answer>", solution)


def _fold(text: str) -> str:
    """Return `text` without regard to case, spaces, a full stop and how its characters are encoded."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).rstrip(". ")
