"""Rewards by rule: text in, a float out (method.md, "The completion" and "Samples").

`format_reward` judges the shape of a completion, `accuracy_reward` its answer against the reference, by problem type.
Each type has one parser, which reads an answer (None or empty: nothing usable in it), and one scorer.
"""

import math
import operator
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

_STRICT = re.compile(r"<context>(.*?)</context>\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)
# The released pattern; atomic groups, because the first place where each part can end is as good as any later one.
_RELEASED = re.compile(r"<context>(?>.*?</context>\s*<think>)(?>.*?</think>\s*<answer>).*?</answer>", re.DOTALL)

_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANY_TAG = re.compile(r"</?(?:context|think|answer)>")
_ONE_OF_EACH = sorted(f"<{slash}{name}>" for name in ("context", "think", "answer") for slash in ("", "/"))


def format_reward(text, rule="strict"):
    """1.0 if `text` is a context, a think and an answer block, else 0.0.

    "strict": each once, in that order, none blank, nothing but white space between and around. "released": the text
    starts with the three in that order; they may be blank or hold tags, and anything may follow.
    """
    if rule == "released":
        return float(_RELEASED.match(text) is not None)
    match = _STRICT.fullmatch(text.strip()) if sorted(_ANY_TAG.findall(text)) == _ONE_OF_EACH else None
    return float(match is not None and all(inner.strip() for inner in match.groups()))


def block_text(text, tag):
    """What the first `<tag>` block of `text` holds, stripped; None if there is no such block or it is never closed."""
    _, opening, rest = text.partition(f"<{tag}>")
    inner, closing, _ = rest.partition(f"</{tag}>")
    return inner.strip() if opening and closing else None


def answer_text(text):
    """The answer of a completion: what its `<answer>` block outside `<think>` holds, stripped.

    None without such a block, with an unclosed one, or with two that differ.
    """
    blocks = _ANSWER.findall(_THINK.sub("\n", text))
    answers = {block.strip() for block in blocks}
    return answers.pop() if len(answers) == 1 and "<answer>" not in blocks[0] else None


def accuracy_reward(text, solution, problem_type, judge=None, *, evaluation=False):
    """How right the answer of the completion `text` is, in [0, 1]; None if the judge failed to say.

    `solution`: the reference, with or without tags. `judge`: see hov2.judge; it scores free-form answers and pairs
    synonyms of emotion words; without one, free-form is ROUGE-L and words have to be the same. Without an answer the
    reward is 0.0; in `evaluation` the whole text is scored instead, and regression is mean relative accuracy.
    Raises ValueError as `check_reference` does.
    """
    reference = check_reference(solution, problem_type)
    answer = answer_text(text)
    if answer is None and evaluation:
        answer = _ANY_TAG.sub("\n", text).strip()
    parse, score = PROBLEM_TYPES[problem_type]
    parsed = parse(answer) if answer else None
    if not parsed:
        return 0.0
    if judge is not None and problem_type == "free-form":
        return judge.consistency(parsed, reference)
    if judge is not None and problem_type == "emer_ov":
        return judge.synonyms(parsed, reference)
    if evaluation and problem_type == "regression":
        score = mean_relative_accuracy
    return float(score(parsed, reference))


def check_reference(solution, problem_type):
    """The parsed reference answer of `solution`; ValueError for an unknown type or an empty or unusable reference."""
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type {problem_type!r} is not one of {', '.join(map(repr, PROBLEM_TYPES))}")
    answer = answer_text(solution)
    if answer is None and not _ANY_TAG.search(solution):
        answer = solution.strip()
    reference = PROBLEM_TYPES[problem_type][0](answer) if answer else None
    if not reference:
        what = f"{answer!r:.60} is no answer of the type {problem_type!r}" if answer else "no answer in it"
        raise ValueError(f"solution {solution!r:.60}: {what}")
    return reference


# ---------------------------------------------------------------------------------------------- choices

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", ord("、"): ",", ord("。"): "."}


def _plain(text):
    """Without emphasis, quotes around words and LaTeX boxes; full-width forms as ASCII ones."""
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
_CUE = re.compile(r"\b(?:answer|option|choice|choose|select|pick)s?\b(?:[\s:=]|\b(?:is|are|be|would|should|must|the|"
                  r"letter|option|choice|correct|right|most|likely|probably)\b)*", re.IGNORECASE)
_NEGATION = re.compile(r"\b(?:not|neither|nor|never|except)\b|n['’]t\b", re.IGNORECASE)
_FILLER = {"and", "or", "the", "my", "final", "best", "correct", "answer", "answers", "is", "are",
           "option", "options", "choice", "choices", "letter", "letters"}


def choice_letters(text):
    """The set of option letters, upper case, that `text` chooses; empty if none can be told.

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
        rest = text[cue.end() :]
        last = _ALONE.match(rest) or _LAST_SMALL.match(rest)
        chosen |= _letters_at_start(rest) or ({last.group(1).upper()} if last else set())
    if not chosen and not _NEGATION.search(text):
        chosen = set(_ALONE.findall(text))  # "I think B"
    return chosen


def _letters_at_start(text):
    """The letters of a list that `text` starts with ("A or C, I think") or of its labels ("A. sad, C. happy")."""
    start = _RUN.match(text) or _LABEL.match(text)
    if not start:
        return set()
    first = _ALONE.findall(start.group()) if start.re is _RUN else [start.group(1)]
    return {letter.upper() for letter in first + _LISTED.findall(text, start.end())}


def set_f1(answer, reference, synonyms=0):
    """F1 between two non-empty sets; `synonyms` more members of each count as shared."""
    return 2 * (len(answer & reference) + synonyms) / (len(answer) + len(reference))


def yes_or_no(text):
    """ "yes" or "no", the one that stands as a word in `text`; None for both or neither."""
    found = set(re.findall(r"(?<![\w-])(yes|no)(?![\w-])", _plain(text).lower()))
    return found.pop() if len(found) == 1 else None


# ---------------------------------------------------------------------------------------------- numbers


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


def parse_number(text):
    """The number that `text` is, with a unit or currency sign at most; None for anything else, nan and inf too."""
    text = _plain_number(text)
    match = _AT_START.match(text)
    return _number(match) if match and _UNIT.fullmatch(text, match.end()) else None


def find_number(text):
    """The one number in `text`, whatever words stand around it; None for none or for several that differ."""
    if number := parse_number(text):
        return number
    numbers = [_number(match) for match in _ANYWHERE.finditer(_plain_number(text))]
    return numbers[0] if numbers and None not in numbers and len({n.value for n in numbers}) == 1 else None


def _plain_number(text):
    text = text.translate(_FULL_WIDTH).translate(_SIGNS)
    text = re.sub("(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))", "", text)  # spaces between thousands
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^" + match.group().translate(_SUPERSCRIPTS), text)
    text = re.sub(r"\\boxed\s*\{(.*)\}", r"\1", text)
    text = re.sub(r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2", text)
    return text.strip(" \t\r\n*_`\"'()[]" + ("$" if text.count("$") > 1 else ""))  # "$5$" is LaTeX, "$5" is money


def _number(match):
    parts = match.groupdict("")
    if parts["sign"] and parts["sign2"] or len(match.group()) > _MAX_DIGITS:
        return None
    digits = re.sub(r"[\s,]", "", parts["ratio"] or parts["decimal"]).rstrip(".")
    exponent = int(parts["e"] or parts["power"] or 0)
    if abs(exponent) > _MAX_EXPONENT or re.search("/0+$", digits):
        return None
    value = Fraction(digits) * Fraction(10) ** exponent
    decimals = max(0, len(digits.partition(".")[2]) - exponent)
    if parts["ratio"]:
        decimals = next((d for d in range(_ENDLESS) if (value * 10**d).denominator == 1), _ENDLESS)
    return Number(-value if "-" in (parts["sign"], parts["sign2"]) else value, decimals)


def _round_half_up(value, decimals):
    """As decimal.ROUND_HALF_UP: ties go away from zero."""
    scaled = math.floor(abs(value) * 10**decimals + Fraction(1, 2))
    return scaled if value >= 0 else -scaled


def same_number(answer, reference):
    """1 if both are equal once rounded to d decimals, d = max(2, the fewer decimals of the two); 0 equals only 0."""
    if answer.value == 0 or reference.value == 0:
        return answer.value == reference.value
    decimals = max(2, min(answer.decimals, reference.decimals))
    return _round_half_up(answer.value, decimals) == _round_half_up(reference.value, decimals)


def relative_accuracy(answer, reference):
    """1 minus the relative error, floored at 0; for the target 0: 1 if the answer is 0."""
    return 1 - min(Fraction(1), _relative_error(answer, reference))


def mean_relative_accuracy(answer, reference):
    """The share of the thresholds t = 0.50, 0.55 ... 0.95 with a relative error strictly below 1 - t."""
    error = _relative_error(answer, reference)
    return sum(error < 1 - Fraction(t, 100) for t in range(50, 100, 5)) / 10


def _relative_error(answer, reference):
    if reference.value == 0:
        return Fraction(answer.value != 0)
    return abs(answer.value - reference.value) / abs(reference.value)


# ---------------------------------------------------------------------------------------------- words

# Scripts that put no spaces between words: Han, kana, Thai, Lao, Myanmar, Khmer.
_NO_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
                        r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")  # fmt: skip


def ocr_accuracy(answer, reference):
    """1 - (edit distance / length of the reference), floored at 0; over words, or over characters where the reference
    has no spaces and a script that uses none. Case matters."""
    if len(reference.split()) == 1 and _NO_SPACES.search(reference):
        hypothesis, target = "".join(answer.split()), reference
    else:
        hypothesis, target = answer.split(), reference.split()
    return max(0.0, 1 - _edit_distance(hypothesis, target) / len(target))


def _edit_distance(a, b, substitution=1):
    """What it costs to turn `a` into `b`; an insertion or a deletion costs 1."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + substitution * (x != y))
    return row[-1]


def rouge_l(answer, reference):
    """ROUGE-L: F1 of the longest common subsequence of words; in scripts without spaces, of characters."""
    a, b = _rouge_words(answer), _rouge_words(reference)
    if not a or not b:
        return float(answer == reference)  # signs only
    total = len(a) + len(b)  # of which all that is deleted or inserted is not in the common subsequence
    return (total - _edit_distance(a, b, substitution=2)) / total


def _rouge_words(text):
    return re.findall(rf"{_NO_SPACES.pattern}|[^\W_]+?(?={_NO_SPACES.pattern}|[\W_]|$)", _fold(text))


def emotion_words(text):
    """The set of emotion words or phrases in a list with any separator, lower case, without numbering and signs."""
    pieces = re.split(r"[,;/|&+\n、。.:()\[\]]|\band\b|\bor\b", _fold(text))
    words = (re.sub(r"^[\W\d_]+|[\W\d_]+$", "", piece) for piece in pieces)
    return {re.sub(r"[\s_-]+", " ", word) for word in words if word}


def _fold(text):
    return unicodedata.normalize("NFKC", text).casefold()


PROBLEM_TYPES = {  # name: (parser of answer and reference, scorer)
    "multiple choice": (choice_letters, operator.eq),
    "emer_ov_mc": (choice_letters, set_f1),
    "judge": (yes_or_no, operator.eq),
    "numerical": (parse_number, same_number),
    "regression": (find_number, relative_accuracy),
    "OCR": (str.strip, ocr_accuracy),
    "free-form": (str.strip, rouge_l),
    "emer_ov": (emotion_words, set_f1),
}
