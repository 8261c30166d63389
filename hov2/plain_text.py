"""What an answer is without its typography: LaTeX, Markdown, full-width forms (used by answers.py)."""

import re

FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # to ASCII
FULL_WIDTH |= {0x3000: " ", ord("、"): ",", ord("。"): "."}
# What LaTeX writes around answers, numbers and units, and the plain text of it; commands not listed, like \pi, stay.
_LATEX = {
    r"(?<=\d)~(?=[A-Za-z\\])": " ",  # "5~cm"; "~5" is about 5
    r"\{,\}(?:\\!)?": ",",
    r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))": r" \1\2/\3\4 ",
    r"(?:\^\s*\{?\s*)?\\(?:circ|degree|textdegree)(?![A-Za-z])": "°",
    r"\\(?:[fm]?box(?:ed)?|text[a-z]*|math[a-z]+|left|right|displaystyle)(?![A-Za-z])|\\[()\[\]]": " ",
    r"\\[,;: ]|\\q?quad(?![A-Za-z])": "\u2009",  # a thin space may stand between thousands
    r"\\times(?![A-Za-z])": "×",
    r"\\cdot(?![A-Za-z])": "·",
    r"\\mu(?![A-Za-z])": "µ",
    r"\\Omega(?![A-Za-z])": "Ω",
    r"\\([%$#&_])": r"\1",
    r"[{}]": "",
}


def without_latex(text: str) -> str:
    r"""Return `text` without LaTeX's boxes and the like: "12 cm" for "\(\boxed{12\text{ cm}}\)"."""
    for pattern, meaning in _LATEX.items():
        text = re.sub(pattern, meaning, text)
    return text


def plain_text(text: str) -> str:
    """Return `text` without emphasis, quotes around words, bullets and LaTeX.

    Full-width forms become ASCII ones, and "b/c" the word because: it names no letters.
    """
    text = without_latex(text.translate(FULL_WIDTH))
    text = re.sub(r"[*_`$]", " ", text)
    text = re.sub(r"(?<!\w)['\"‘’“”]|['\"‘’“”](?!\w)", " ", text)
    text = re.sub(r"(?<=\s)[Bb]/c\b|\b[Bb]/c(?=\s+(?!and\b|or\b)\w\w)", "because", text)
    return re.sub(r"(?m)^[ \t]*(?:[-–—•·>#]+|\d+[.)])[ \t]+", "", text).strip()
