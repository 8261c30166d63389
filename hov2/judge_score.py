"""The score that a judge's words state. What can be read in two ways is no score: a wrong one would teach."""

import re

# A number, with what it is out of: "4", "4.5", "4/5", "4 (out of 5)". Not one of "4th", "4%", "4,5", "1.2.3".
_NUMBER = re.compile(
    r"(?<![\w.,])(\d+(?:\.\d+)?)(?:\s*(?:points?\s*)?\(?(?:/|out of|of)\s*(\d+(?:\.\d+)?))?"
    r"(?![\w%]|[.,]\d)",
    re.IGNORECASE | re.ASCII,
)
_TERMS = r"\d{1,3}(?:\.\d{1,3})?(?:\s*\+\s*\d{1,3}(?:\.\d{1,3})?)++"
_SUM = re.compile(rf"(?<![\w.+])(?<!\+ )(?P<terms>{_TERMS})\s*=\s*(?P<total>\d{{1,3}}(?:\.\d{{1,3}})?)(?![\w+])")
_SUM_BEHIND = re.compile(rf"(?<![\w.])(?P<total>\d{{1,3}}(?:\.\d{{1,3}})?)\s*\((?P<terms>{_TERMS})\)")

# Reasoning ahead of the reply; a template may have opened the block already.
_THINKING = re.compile(
    r"\s*[<\[](?P<tag>(?:\w+:)?(?:think(?:ing)?|thought|reasoning))[>\]].*?[<\[]/(?P=tag)[>\]]",
    re.IGNORECASE | re.DOTALL,
)
_END_OF_THINKING = re.compile(r"(?:(?!<think>).)*</think>", re.DOTALL)

# "1. ", "2) ", "Question 3: " in front of a line, and such a line that ends with its points: "1. Yes (1 point)" or
# "2. 0".
_LABEL = r"^\s*(?:[-•]\s+)?(?:(?:question|criterion|item|q)\s*\d+[.):]|\d+[.)])\s+"
_LISTED = re.compile(rf"{_LABEL}(?=[^\W\d])", re.IGNORECASE)
_POINTS_OF_ITEM = re.compile(rf"{_LABEL}(?:[^\W\d].*?[(:=\s-])?(\d+(?:\.\d+)?)(?:\s*points?)?\W*", re.IGNORECASE)

_ALONE = re.compile(rf"[^\w−-]*{_NUMBER.pattern}[^\w]*", re.IGNORECASE | re.ASCII)
_NAMES = re.compile(r"\b(?:scored?|scores|rating|rated?|grade|points?|pairs?|stars?|total|sum)\b", re.IGNORECASE)
_GIVES = re.compile(
    r"\bI(?: would|['’]d| will|['’]ll)? (?:give|assign|award)\b|\b(?:deserves|earns)\b|\banswer(?: is|:)", re.IGNORECASE
)
_DENIED = re.compile(
    r"(?:\b(?:not|no|cannot|unable|error|than|at least|at most|almost|nearly|up to|between|below|above)\b|n['’]t\b)",
    re.IGNORECASE,
)
_UNUSABLE = re.compile(
    r"[-−]\d|\d\s*\+|^[-−]\s*\d|\?\W*$|\d\s*points?\s+(?:for|because|since)\b"
    r"|\b(?:if|unless|yes|maximum|minimum|max|min|highest|lowest|possible)\b",
    re.IGNORECASE,
)  # negative numbers, ranges, sums, questions, points of one item, conditions, and what could be had
_MAY_FOLLOW = re.compile(r"\W*$|[^\w\s]|\s*(?:points?|pairs?|stars?|out of|because|since|as|for)\b|\s*[A-Z]|\s[^\w]")
# The rubric's own line: "4: nearly all; ...", "4 - nearly all", "4 (nearly all)"; "1: yes" is a point of a list.
_LEVEL = re.compile(
    r"[^\w−-]*(?P<score>\d+(?:\.\d+)?)(?:\s*[-–—]+\s+|\s*:\s*|\s*\()(?P<rest>(?!yes\b|no\b|true\b|false\b)[^\W\d].*)",
    re.IGNORECASE | re.ASCII,
)

_NO_SCORES = re.compile(
    r"\b\d+(?:st|nd|rd|th|s|%)|\b(?:question|step|scene|part|speaker|person|man|woman)s? \d+\b", re.IGNORECASE
)
# Words behind a number that don't say what it counts, as "pens" does in "7 pens".
_GO_ON = (
    "or|to|and|out|of|but|points?|pairs?|stars?|is|was|would|might|may|instead|seems|because|since|as|for|in|at|on|"
    "with|too|rather|not|here|overall|then|if"
)
# Behind a number that counts something: "7 pens", "2 of the clues", "4-year-old".
_COUNTS = re.compile(rf"(?:-|\s+of (?:the|its|these|those|all)\b|\s+(?!(?:{_GO_ON})\b)[a-z])")
_SPELT = re.compile(r"\b(?:zero|two|three|four|five)\b(?!\s+\w)", re.IGNORECASE)


def parse_score(reply: str, maximum: int = 5) -> float | None:
    """Return the number from 0 to `maximum` that `reply` states as its score, else None.

    "4", "**4**", "Score: 4", "4/5", "I'd give it a 4.", "4: nearly all", "1 + 1 + 1 + 0 + 1 = 4" are scores; a leading
    closed think block is left out, and other sentences may count things: "The score is 4.\\n\\nMia has 7 pens". None
    for a number out of range, another denominator, two scores that differ, a range, a negative number, a wrong sum,
    markup, and numbers that nothing calls a score.
    """
    thinking = _THINKING.match(reply) or _END_OF_THINKING.match(reply)
    text = reply[thinking.end() :] if thinking else reply
    text = re.sub(r"\\boxed\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"[*_`#$]", "", text)
    text = _SUM_BEHIND.sub(_total, _SUM.sub(_total, text))
    if re.search(r"</?\w", text):
        return None
    found = set()  # scores; None for a sentence that could state one
    points = []
    for line in text.splitlines():
        item = _POINTS_OF_ITEM.fullmatch(line)
        if item:
            points.append(float(item[1]))
            continue
        for sentence in re.split(r"(?<=[.!?])\s+", _LISTED.sub("", line, count=1)):
            found |= _scores_in(sentence, maximum)
    if len(found) != 1 or (points and found != {sum(points)}):
        return None
    return found.pop()


def _total(match: re.Match) -> str:
    """The total of a sum alone, if it is right."""
    terms = [float(term) for term in match["terms"].split("+")]
    return match["total"] if sum(terms) == float(match["total"]) else match[0]


def _scores_in(sentence: str, maximum: int) -> set[float | None]:
    """The score that a sentence states, none, or None where that is in doubt, each as a set."""
    if not re.search(r"\d", sentence):
        return {None} if _SPELT.search(sentence) else set()
    score = _stated(sentence, maximum)
    if score is not None:
        return {score}
    level = _LEVEL.fullmatch(sentence)
    if level and float(level["score"]) <= maximum and not _scores_in(level["rest"], maximum):
        return {float(level["score"])}
    return set() if _only_counts(sentence) else {None}


def _stated(sentence: str, maximum: int) -> float | None:
    """The score that a sentence calls one, or consists of."""
    numbers = list(_NUMBER.finditer(sentence))
    values = {float(number[1]) for number in numbers}
    scales = {float(number[2]) for number in numbers if number[2]}
    if len(values) != 1 or max(values) > maximum or not scales <= {float(maximum)}:
        return None
    if _UNUSABLE.search(sentence) or re.search(r"\d", _NUMBER.sub("", sentence)):
        return None
    if _DENIED.search(sentence[: numbers[-1].start()]):
        return None
    if not all(_MAY_FOLLOW.match(sentence, number.end()) for number in numbers):
        return None
    first = numbers[0]
    given = _GIVES.search(sentence[: first.start()]) and not re.search(r"\w", sentence[first.end() :])
    is_a_score = scales or given or _NAMES.search(sentence) or _ALONE.fullmatch(sentence)
    return values.pop() if is_a_score else None


def _only_counts(sentence: str) -> bool:
    """Whether the numbers in a sentence are about other things than a score."""
    sentence = _NO_SCORES.sub("", sentence)
    numbers = list(_NUMBER.finditer(sentence))
    if _NAMES.search(sentence) or re.search(r"\d", _NUMBER.sub("", sentence)):
        return False
    return all(not number[2] and _COUNTS.match(sentence, number.end()) for number in numbers)
