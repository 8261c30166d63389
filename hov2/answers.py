"""Answers: read out of a completion, parsed, and scored against a reference, by type (docs/data.md, "Your own data").

Each type of problem has one parser, which reads an answer (None or empty: nothing usable in it), and one scorer, which
compares two parsed answers: `PROBLEM_TYPES`, at the end.
"""

import math
import operator
import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

TAG = re.compile(r"</?(?:context|think|answer)>")  # any of the six

_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)
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


def parse_answer(answer: str | None, problem_type: str) -> Any:
    """Return an answer as the parser of its problem type reads it; None or empty if there is nothing usable in it."""
    if not answer:
        return None
    return PROBLEM_TYPES[problem_type].parse(answer)


def check_reference(solution: str, problem_type: str) -> Any:
    """Return the parsed reference answer of `solution`, which may have tags or none.

    Raises ValueError for an unknown type or an empty or unusable reference.
    """
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type {problem_type!r} is not one of {', '.join(map(repr, PROBLEM_TYPES))}")
    answer = answer_text(solution)
    if answer is None and not TAG.search(solution):
        answer = solution.strip()
    if not answer:
        raise ValueError(f"solution {solution!r:.60}: no answer in it")
    reference = parse_answer(answer, problem_type)
    if not reference:
        raise ValueError(f"solution {solution!r:.60}: {answer!r:.60} is no answer of the type {problem_type!r}")
    return reference


# --- choices ----------------------------------------------------------------------------------------------------------

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # to ASCII
_FULL_WIDTH |= {0x3000: " ", ord("、"): ",", ord("。"): "."}


def _plain(text: str) -> str:
    """Return `text` without emphasis, quotes around words and LaTeX boxes, and full-width forms as ASCII ones."""
    text = text.translate(_FULL_WIDTH)
    text = re.sub(r"\\(?:boxed|text|textbf|mathrm|mathbf)\b|[*_`{}$]", " ", text)
    return re.sub(r"(?<!\w)['\"‘’“”]|['\"‘’“”](?!\w)", " ", text).strip()


# A capital that stands alone and is not the article: "A man" has none, "A or B", "A because" and "A." have one.
_CAPITAL = r"(?:[B-HJ-Z]|A(?!\s+(?!(?:and|or|nor|is|was|because|since|as|but)\b)[a-z]))(?![\w'’-]|\.\w)"
_ALONE = re.compile(rf"(?<![A-Za-z0-9'’.-])({_CAPITAL})", re.ASCII)
# A letter that names an option: "B. sad", "b) sad", "(B) sad", "B: sad", "B - sad"; not the D of "D.C.".
_LABEL = re.compile(r"\s*[\[(]?([A-Za-z])(?:[\])]|\s*[.:,;)](?!\w\.)|\s+[-–—]\s)", re.ASCII)
# The later ones of a list: "A. sad, C. happy".
_LISTED = re.compile(r"(?:[,;/&\n]|\band\b)\s*[\[(]?([A-Za-z])[\])]?\s*[.:)](?=\s+\w|\w\w)", re.ASCII)
# A list of letters, each with brackets or none: "A or C", "(B), [D]".
_ITEM = rf"\s*[\[(]?{_CAPITAL}[\])]?"
_RUN = re.compile(rf"{_ITEM}(?:(?:\s*(?:[,;/&+]|\band\b|\bor\b))+{_ITEM})+", re.ASCII)
_LAST_SMALL = re.compile(r"\s*([a-z])\s*$", re.ASCII)
_CUE = re.compile(
    r"\b(?:answer|option|choice|choose|select|pick)s?\b"
    r"(?:[\s:=]|\b(?:is|are|be|would|should|must|the|letter|option|choice|correct|right|most|likely|probably)\b)*",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"\b(?:not|neither|nor|never|except)\b|n['’]t\b", re.IGNORECASE)
# fmt: off
_FILLER = {
    "and", "or", "the", "my", "final", "best", "correct", "answer", "answers",
    "is", "are", "option", "options", "choice", "choices", "letter", "letters",
}
# fmt: on


def choice_letters(text: str) -> set[str]:
    """Return the set of option letters, upper case, that `text` chooses; empty if none can be told.

    An English article or a letter inside the option's words is no choice: "B. Vitamin A" is {"B"}, "A man" is empty.
    """
    text = _plain(text)
    words = re.findall(r"[\w'’]+", text)
    letters = {word.upper() for word in words if re.fullmatch("[A-Za-z]", word)}
    if all(word.lower() in _FILLER or word.upper() in letters for word in words):
        return letters  # nothing but letters: "B", "a, c", "(A) (C)", "The answer is A"
    if re.fullmatch("[A-J]{2,}", text) and len(set(text)) == len(text):
        return set(text)  # "AC"
    chosen = _letters_at_start(text)
    for cue in _CUE.finditer(text):
        chosen |= _letters_after_cue(text[cue.end() :])
    if not chosen and not _NEGATION.search(text):
        chosen = set(_ALONE.findall(text))  # "I think B"
    return chosen


def _letters_after_cue(text: str) -> set[str]:
    """Return the letters that `text` starts with where it follows "The answer is" or the like."""
    letters = _letters_at_start(text)
    if letters:
        return letters
    single = _ALONE.match(text) or _LAST_SMALL.match(text)
    return {single.group(1).upper()} if single else set()


def _letters_at_start(text: str) -> set[str]:
    """Return the letters of a list at the start of `text` ("A or C, I think") or of its labels ("A. sad, C. happy")."""
    run = _RUN.match(text)
    label = _LABEL.match(text)
    if run:
        letters = _ALONE.findall(run.group()) + _LISTED.findall(text, run.end())
    elif label:
        letters = [label.group(1)] + _LISTED.findall(text, label.end())
    else:
        letters = []
    return {letter.upper() for letter in letters}


def set_f1(answer: set[str], reference: set[str], synonyms: int = 0) -> float:
    """Return F1 between two non-empty sets; `synonyms` more members of each count as shared."""
    return 2 * (len(answer & reference) + synonyms) / (len(answer) + len(reference))


def yes_or_no(text: str) -> str | None:
    """Return "yes" or "no", the one that stands as a word in `text`; None for both or neither."""
    found = set(re.findall(r"(?<![\w-])(yes|no)(?![\w-])", _plain(text).lower()))
    return found.pop() if len(found) == 1 else None


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
    rf"(?:(?P<ratio>{_DIGITS}\s*/\s*{_DIGITS})(?!\.?\d)"
    rf"|(?P<decimal>{_DIGITS}(?:\.\d*)?|\.\d+)"
    r"(?:[eE](?P<e>[+-]?\d+)|\s*(?:[x×*·]|\\times)\s*10\s*(?:\^|\*\*)\s*[{(]?\s*(?P<power>[+-]?\d+)\s*[})]?)?)"
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
    text = text.translate(_FULL_WIDTH).translate(_SIGNS)
    text = re.sub("(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))", "", text)  # spaces between thousands
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^" + match.group().translate(_SUPERSCRIPTS), text)
    text = re.sub(r"\\boxed\s*\{(.*)\}", r"\1", text)
    text = re.sub(r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2", text)
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
    value = Fraction(digits) * Fraction(10) ** exponent
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
    """How answers of one type are read, and how two of them, the answer and the reference, are compared."""

    parse: Callable[[str], Any]
    score: Callable[[Any, Any], float]


PROBLEM_TYPES = {
    "multiple choice": ProblemType(choice_letters, operator.eq),
    "emer_ov_mc": ProblemType(choice_letters, set_f1),
    "judge": ProblemType(yes_or_no, operator.eq),
    "numerical": ProblemType(parse_number, same_number),
    "regression": ProblemType(find_number, relative_accuracy),
    "OCR": ProblemType(str.strip, ocr_accuracy),
    "free-form": ProblemType(str.strip, rouge_l),
    "emer_ov": ProblemType(emotion_words, set_f1),
}
