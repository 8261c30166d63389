"""Answers: read out of a completion, parsed, and scored against a reference, by type (docs/data.md, "Your own data").

Each type of problem has one parser, which reads an answer (None or empty: nothing usable in it), and one scorer, which
compares two parsed answers: `PROBLEM_TYPES`, at the end.
"""

import math
import operator
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from hov2.plain_text import FULL_WIDTH, plain_text, without_latex

TAG = re.compile(r"</?(?:context|think|answer)>")  # any of the six

_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)
_CONTEXT = re.compile(r"<context>.*?</context>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def block_text(text: str, tag: str) -> str | None:
    """Return what the first `<tag>` block of `text` holds, stripped; None if there is none or it is never closed."""
    _, opening, rest = text.partition(f"<{tag}>")
    inner, closing, _ = rest.partition(f"</{tag}>")
    return inner.strip() if opening and closing else None


def answer_text(text: str) -> str | None:
    """Return the answer of a completion: what its `<answer>` block outside `<think>` holds, stripped.

    None without such a block, with an unclosed one, or with two that differ.
    """
    blocks = _ANSWER.findall(_THINK.sub("\n", text))
    answers = {block.strip() for block in blocks}
    if len(answers) != 1 or "<answer>" in blocks[0]:
        return None
    return answers.pop()


def untagged_answer(text: str) -> str:
    """Return what a completion without an answer says, without tags.

    That is its text outside the context and think blocks; where there is none, all of it.
    """
    outside = _CONTEXT.sub("\n", _THINK.sub("\n", text))
    outside = outside.rpartition("</think>")[2]  # where the prompt opened the block
    outside = TAG.sub("\n", outside).strip()
    return outside or TAG.sub("\n", text).strip()


def parse_answer(answer: str | None, problem_type: str, options: Sequence[str] | None = None) -> Any:
    """Return an answer as the parser of its problem type reads it; None or empty if there is nothing usable in it.

    `options`: the question's, in the order of their letters, if it has any.
    """
    if not answer:
        return None
    rules = PROBLEM_TYPES[problem_type]
    if options and rules.reword:
        answer = rules.reword(answer, options)
    return rules.parse(answer)


def check_reference(solution: str, problem_type: str, options: Sequence[str] | None = None) -> Any:
    """Return the parsed reference answer of `solution`, which may have tags or none; `options` as in `parse_answer`.

    Raises ValueError for an unknown type or an empty or unusable reference.
    """
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type {problem_type!r} is not one of {', '.join(map(repr, PROBLEM_TYPES))}")
    answer = answer_text(solution)
    if answer is None and not TAG.search(solution):
        answer = solution.strip()
    if not answer:
        raise ValueError(f"solution {solution!r:.60}: no answer in it")
    reference = parse_answer(answer, problem_type, options)
    if not reference:
        raise ValueError(f"solution {solution!r:.60}: {answer!r:.60} is no answer of the type {problem_type!r}")
    return reference


# --- choices ----------------------------------------------------------------------------------------------------------

# Words that no article stands before: "A because", "A fits best", "A He smiles" hold the letter A, "A man" does not.
_NO_NOUN = (
    r"(?:(?i:and|or|nor|but|because|since|as|bc|due|so|if|for|with|in|on|to|from|than|here"
    r"|is|was|has|does|would|could|should|must|may|might|fits|matches|seems|looks|sounds|works|makes|feels"
    r"|describes|explains|captures|reflects|shows|says|applies|i|you|he|she|it|we|they|his|her|its|their"
    r"|the|this|that|these|those|there|both|all|neither|someone|everyone|who|what|when|where|why|how)"
    r"|Yes|No|Not|None|Nobody)(?![\w'’-])"
)
_ARTICLE = rf"[Aa][ \t]+(?!{_NO_NOUN})[A-Za-z][\w'’]"
_END = r"(?![\w'’-]|\.\w)"  # of a letter that is no part of a word or of "D.C."
_CAPITAL = rf"(?!{_ARTICLE})[A-HJ-Z]{_END}"
_EITHER_CASE = rf"(?!{_ARTICLE})[A-HJ-Za-hj-z]{_END}"
_NAMED = re.compile(rf"([A-HJ-Z]){_END}")
_ALONE = re.compile(rf"(?<![A-Za-z0-9'’.-])({_CAPITAL})", re.ASCII)
# A list of letters, each with brackets or none: "A or C", "(B), [D]".
_JOINED = r"(?:\s*(?:[,;/&+]|\band\b|\bor\b))+"
_RUN = re.compile(rf"\s*[\[(]?{_EITHER_CASE}[\])]?(?:{_JOINED}\s*[\[(]?{_EITHER_CASE}[\])]?)+", re.ASCII)
_IN_RUN = re.compile(rf"(?<![A-Za-z])({_EITHER_CASE})", re.ASCII)
# A letter that names an option: "B. sad", "b) sad", "(B) sad", "B: sad", "B - sad", "B" on a line; not the D of "D.C.".
_LABEL = re.compile(r"\s*[\[(]?([A-Za-z])(?:[\])]|[ \t]*(?:[.:,;)=](?!\w\.)|[(–—\n]|$)|[ \t]+-\s)", re.ASCII)
# One without a sign, before what starts anew: "B because", "B he is sad", "B The man is sad".
_UNSIGNED = re.compile(rf"\s*({_EITHER_CASE})(?=[ \t]+(?:{_NO_NOUN}|[A-Z]))", re.ASCII)
# The later ones of a list: "A. sad, C. happy".
_LISTED = re.compile(r"(?:[,;/&\n]|\band\b)\s*[\[(]?([A-Za-z])[\])]?\s*[.:)](?=\s+\w|\w\w)", re.ASCII)
# What says that the next letters are an answer; a noun right before the letter ("option C") just speaks of them.
_CUE = re.compile(
    r"\b(?:(answer|option|choice)|choose|select|pick)s?\b"
    r"((?:[\s:=]|\b(?:is|are|be|would|should|must|the|letter|option|choice|correct|right|most|likely|probably)\b)*)",
    re.IGNORECASE,
)
# Letters that the text refuses: "not B", "I don't think it's B", "neither A nor B" ...
_REFUSED = rf"[\[(]?[A-HJ-Z]{_END}[\])]?(?:\s*(?:,|/|\band\b|\bn?or\b)[ \t]*[\[(]?[A-HJ-Z]{_END}[\])]?)*"
_NOT = r"(?i:(?:\b(?:not|cannot|neither|nor|never|none|except|rather than|instead of|anything but)|n['’]t)\b)"
_SAME_CLAUSE = r"(?:[ \t]+(?!(?i:but|because|since|as|so|only)\b)[A-Za-z][a-z'’]+){0,6}"
_NEGATED = re.compile(rf"{_NOT}{_SAME_CLAUSE}[ \t]+{_REFUSED}", re.ASCII)
# ... or "B is wrong", "B doesn't fit"; but in "B not A" it is A.
_VERB = r"(?:is|are|was|were|ca|can|could|do|does|did|wo|will|would|should|must|may|might|be|seems?|looks?|both|the)"
_WRONG = r"(?:[ \t]+(?:not|cannot|never|wrong|incorrect|false|impossible|unlikely|ruled out)|n['’]t)\b"
_CALLED_WRONG = re.compile(rf"{_REFUSED}(?:[ \t]+{_VERB})*{_WRONG}(?![ \t]+{_CAPITAL})", re.ASCII)
_NOT_AVAILABLE = re.compile(r"(?<![\w/])n(?:\s?/\s?|\.)a(?![\w/])", re.IGNORECASE)
# fmt: off
_FILLER = {
    "and", "or", "the", "my", "final", "best", "correct", "answer", "answers",
    "is", "are", "option", "options", "choice", "choices", "letter", "letters",
}
# fmt: on


def choice_letters(text: str) -> set[str]:
    """Return the set of option letters, upper case, that `text` chooses; empty if none can be told.

    An English article, a letter that is refused, or one inside the option's words is no choice: "B. Vitamin A" is
    {"B"}, "A man" and "not B" are empty.
    """
    text = _NOT_AVAILABLE.sub(" ", plain_text(text))
    words = _words(text)
    letters = {word.upper() for word in words if re.fullmatch("[A-Za-z]", word)}
    if all(word.lower() in _FILLER or word.upper() in letters for word in words):
        return letters  # nothing but letters: "B", "a, c", "(A) (C)", "The answer is A"
    if re.fullmatch("[A-J]{2,}", text) and len(set(text)) == len(text):
        return set(text)  # "AC"
    text = _CALLED_WRONG.sub(" ", _NEGATED.sub(" ", text))
    said = _letters_at(text, 0)
    mentioned = set()
    for cue in _CUE.finditer(text):
        noun, copula = cue.groups()
        if noun and not copula.strip():
            mentioned |= _letters_at(text, cue.end(), _NAMED)
        else:
            said |= _letters_at(text, cue.end(), _ALONE)
    return said or mentioned or set(_ALONE.findall(text))  # the last: "I think B"


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'’]+", text)


def _letters_at(text: str, position: int, single: re.Pattern | None = None) -> set[str]:
    """Return the letters at a position: those of a list ("A or C, I think"), of labels ("A. sad, C. happy"), or one.

    `single`: the form of a letter that is taken although nothing sets it apart.
    """
    run = _RUN.match(text, position)
    label = _LABEL.match(text, position) or _UNSIGNED.match(text, position)
    if run:
        letters = _IN_RUN.findall(run.group()) + _LISTED.findall(text, run.end())
    elif label:
        letters = [label[1]] + _LISTED.findall(text, label.end())
    elif single and single.match(text, position):
        letters = [single.match(text, position)[1]]
    else:
        letters = []
    return {letter.upper() for letter in letters}


def _words_to_letters(text: str, options: Sequence[str]) -> str:
    """Return `text` without the words of the options in it; where it says nothing else, the letters of these instead.

    So that an option's words are never searched for letters, and "Vitamin C" is A if that is option A.
    """
    wordings = {}
    for letter, option in zip(string.ascii_uppercase, options):
        words = re.sub(rf"^\s*\(?{letter}\s*[.:)]", "", option)
        wordings[plain_text(words).strip(" .")] = letter
    rest = plain_text(text)
    named = []
    for words in sorted(wordings, key=len, reverse=True):
        if re.fullmatch("[A-Za-z]?", words):
            continue  # it reads as a letter
        pattern = r"\s+".join(map(re.escape, words.split()))
        shorter = re.sub(rf"(?i)(?<!\w)(?:(?:an?|the)\s+)?{pattern}(?!\w)", " ", rest)
        if shorter != rest:
            named.append(wordings[words])
            rest = shorter
    said_more = any(word.lower() not in _FILLER for word in _words(rest))
    return rest if said_more or not named else ", ".join(named)


def set_f1(answer: set[str], reference: set[str], synonyms: int = 0) -> float:
    """Return F1 between two non-empty sets; `synonyms` more members of each count as shared."""
    return 2 * (len(answer & reference) + synonyms) / (len(answer) + len(reference))


def yes_or_no(text: str) -> str | None:
    """Return "yes" or "no", the one that stands as a word in `text`; None for both or neither."""
    found = set(re.findall(r"(?<![\w-])(yes|no)(?![\w-])", plain_text(text).lower()))
    return found.pop() if len(found) == 1 else None


def _letter_to_words(text: str, options: Sequence[str]) -> str:
    """Return the words of the option whose letter `text` names where it says neither yes nor no itself, else `text`."""
    letters = choice_letters(text)
    if yes_or_no(text) or len(letters) != 1:
        return text
    position = ord(letters.pop()) - ord("A")
    return options[position] if position < len(options) else text


# --- numbers ----------------------------------------------------------------------------------------------------------


class Number(NamedTuple):
    """An exact value and how many decimals it was written with."""

    value: Fraction
    decimals: int


_MAX_DIGITS, _MAX_EXPONENT = 100, 100  # beyond these a "number" is noise, and exact arithmetic on it has no end
_ENDLESS = 20  # decimals of a fraction like 1/3
_SIGNS = {ord(sign): "-" for sign in "−–﹣"}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_MONEY = "$€£¥₹"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![,\d])|\d+)"
_NUMBER = (
    rf"(?:(?P<sign>[+-])\s*)?(?:(?:US)?[{_MONEY}]\s*(?P<sign2>-)?)?"
    rf"(?:(?:(?P<whole>\d+)\s+)?(?P<ratio>{_DIGITS}\s*/\s*{_DIGITS})(?!\.?\d)"
    rf"|(?P<decimal>{_DIGITS}(?:\.\d*)?|\.\d+)"
    r"(?:[eE](?P<e>[+-]?\d+)|\s*[x×*·]\s*10\s*(?:\^|\*\*)\s*\(?\s*(?P<power>[+-]?\d+)\s*\)?)?)"
)
_AT_START = re.compile(_NUMBER, re.ASCII)
_ANYWHERE = re.compile(rf"(?<![A-Za-z0-9_^.])(?<!\d,){_NUMBER}(?![.,]?\d|\^)", re.ASCII)
# A unit or a sign, or nothing; digits only as the power of a unit: "m2", "s^-1".
_UNIT = re.compile(rf"\s*(?:(?:[^\W\d_]|[{_MONEY}%°‰.,;!?/()\[\]\"'-])(?:\D|(?<=[^\W\d_])\^?-?\d+)*)?")


def parse_number(text: str) -> Number | None:
    """Return the number that `text` is, with a unit or currency sign at most; None for all else, nan and inf too."""
    text = _plain_number(text)
    match = _AT_START.match(text)
    if match is None or not _UNIT.fullmatch(text, match.end()):
        return None
    return _number(match)


def find_number(text: str) -> Number | None:
    """Return the one number in `text`, whatever words stand around it; None for none or for several that differ."""
    number = parse_number(text)
    if number is not None:
        return number
    numbers = [_number(match) for match in _ANYWHERE.finditer(_plain_number(text))]
    if not numbers or None in numbers:
        return None
    values = {number.value for number in numbers}
    return numbers[0] if len(values) == 1 else None


def _plain_number(text: str) -> str:
    """Return `text` with ASCII digits and signs, without spaces between thousands, and LaTeX as plain text."""
    text = without_latex(text.translate(FULL_WIDTH)).translate(_SIGNS)
    text = re.sub("(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))", "", text)  # spaces between thousands
    text = re.sub("[\u00a0\u2009\u202f]", " ", text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^" + match.group().translate(_SUPERSCRIPTS), text)
    around = " \t\r\n*_`\"'()[]"
    if text.count("$") > 1:  # "$5$" is LaTeX, "$5" is money
        around += "$"
    return text.strip(around)


def _number(match: re.Match) -> Number | None:
    """Return the number of a match of _NUMBER; None if it has two signs, too many digits or a denominator of 0."""
    parts = match.groupdict("")
    if parts["sign"] and parts["sign2"]:
        return None
    if len(match.group()) > _MAX_DIGITS:
        return None
    digits = re.sub(r"[\s,]", "", parts["ratio"] or parts["decimal"]).rstrip(".")
    exponent = int(parts["e"] or parts["power"] or 0)
    if abs(exponent) > _MAX_EXPONENT or re.search("/0+$", digits):
        return None
    value = Fraction(parts["whole"] or 0) + Fraction(digits) * Fraction(10) ** exponent  # "1 1/2" is 3/2
    if parts["ratio"]:
        decimals = _decimals_of_fraction(value)
    else:
        decimals = max(0, len(digits.partition(".")[2]) - exponent)
    if "-" in (parts["sign"], parts["sign2"]):
        value = -value
    return Number(value, decimals)


def _decimals_of_fraction(value: Fraction) -> int:
    """Return how many decimals it takes to write `value` exactly, at most _ENDLESS."""
    for decimals in range(_ENDLESS):
        if (value * 10**decimals).denominator == 1:
            return decimals
    return _ENDLESS


def _round_half_up(value: Fraction, decimals: int) -> int:
    """Round `value`, in units of its last decimal, as decimal.ROUND_HALF_UP does: ties go away from zero."""
    scaled = math.floor(abs(value) * 10**decimals + Fraction(1, 2))
    return scaled if value >= 0 else -scaled


def same_number(answer: Number, reference: Number) -> bool:
    """Whether both are equal once rounded to d decimals, d = max(2, the fewer decimals of the two); 0 equals only 0."""
    if answer.value == 0 or reference.value == 0:
        return answer.value == reference.value
    decimals = max(2, min(answer.decimals, reference.decimals))
    return _round_half_up(answer.value, decimals) == _round_half_up(reference.value, decimals)


def relative_accuracy(answer: Number, reference: Number) -> Fraction:
    """Return 1 minus the relative error, floored at 0; for the target 0: 1 if the answer is 0."""
    return 1 - min(Fraction(1), _relative_error(answer, reference))


def mean_relative_accuracy(answer: Number, reference: Number) -> float:
    """Return the share of the thresholds t = 0.50, 0.55 ... 0.95 with a relative error strictly below 1 - t."""
    error = _relative_error(answer, reference)
    passed = 0
    for percent in range(50, 100, 5):
        if error < 1 - Fraction(percent, 100):
            passed += 1
    return passed / 10


def _relative_error(answer: Number, reference: Number) -> Fraction:
    """Return |answer - reference| / |reference|; for the reference 0: 0 if the answer is 0, else 1."""
    if reference.value == 0:
        return Fraction(answer.value != 0)
    return abs(answer.value - reference.value) / abs(reference.value)


# --- words ------------------------------------------------------------------------------------------------------------

# Scripts that put no spaces between words: Han, kana, Thai, Lao, Myanmar, Khmer.
_NO_SPACES = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
)


def ocr_accuracy(answer: str, reference: str) -> float:
    """Return 1 - (edit distance / length of the reference), floored at 0.

    Over words, or over characters where the reference has no spaces and a script that uses none. Case matters.
    """
    if len(reference.split()) == 1 and _NO_SPACES.search(reference):
        said, target = "".join(answer.split()), reference
    else:
        said, target = answer.split(), reference.split()
    return max(0.0, 1 - _edit_distance(said, target) / len(target))


def _edit_distance(said: Sequence[str], target: Sequence[str], substitution: int = 1) -> int:
    """Return what it costs to turn `said` into `target`; an insertion or a deletion costs 1."""
    row = list(range(len(target) + 1))  # the costs for what has been looked at of `said`, to each start of `target`
    for number, item in enumerate(said, 1):
        diagonal = row[0]
        row[0] = number
        for column, wanted in enumerate(target, 1):
            above = row[column]
            replaced = diagonal if item == wanted else diagonal + substitution
            row[column] = min(above + 1, row[column - 1] + 1, replaced)
            diagonal = above
    return row[-1]


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L: F1 of the longest common subsequence of words; in scripts without spaces, of characters."""
    said = _rouge_words(answer)
    target = _rouge_words(reference)
    if not said or not target:
        return float(answer == reference)  # signs only
    total = len(said) + len(target)  # of which all that is deleted or inserted is not in the common subsequence
    return (total - _edit_distance(said, target, substitution=2)) / total


def _rouge_words(text: str) -> list[str]:
    """Return the words of `text`, in scripts without spaces the characters, without regard to case and signs."""
    return re.findall(rf"{_NO_SPACES.pattern}|[^\W_]+?(?={_NO_SPACES.pattern}|[\W_]|$)", _fold(text))


def emotion_words(text: str) -> set[str]:
    """Return the emotion words or phrases of a list with any separator, lower case, without numbering and signs."""
    words = set()
    for piece in re.split(r"[,;/|&+\n、。.:()\[\]]|\band\b|\bor\b", _fold(text)):
        word = re.sub(r"^[\W\d_]+|[\W\d_]+$", "", piece)
        if word:
            words.add(re.sub(r"[\s_-]+", " ", word))
    return words


def _fold(text: str) -> str:
    """Return `text` without regard to case and to how its characters are encoded."""
    return unicodedata.normalize("NFKC", text).casefold()


# --- the table --------------------------------------------------------------------------------------------------------


class ProblemType(NamedTuple):
    """How answers of one type are read, and how two of them, the answer and the reference, are compared.

    `reword`: how an answer is put in other words by the question's options, before it is read.
    """

    parse: Callable[[str], Any]
    score: Callable[[Any, Any], float]
    reword: Callable[[str, Sequence[str]], str] | None = None


PROBLEM_TYPES = {
    "multiple choice": ProblemType(choice_letters, operator.eq, _words_to_letters),
    "emer_ov_mc": ProblemType(choice_letters, set_f1, _words_to_letters),
    "judge": ProblemType(yes_or_no, operator.eq, _letter_to_words),
    "numerical": ProblemType(parse_number, same_number),
    "regression": ProblemType(find_number, relative_accuracy),
    "OCR": ProblemType(str.strip, ocr_accuracy),
    "free-form": ProblemType(str.strip, rouge_l),
    "emer_ov": ProblemType(emotion_words, set_f1),
}
