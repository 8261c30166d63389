"""Draws the figures of walkthrough.md: python docs/figures.py writes docs/figures/*.svg.

The numbers are those of one real group: prompt rl-0081.mp4/emer_ov_mc in step 0 of the toy's stage 2 with seed 0, as
`runs/toy/stage2/rollouts.jsonl` has it after `python -m hov2.toy`. An SVG carries both colour schemes.
"""

from html import escape
from pathlib import Path

WIDTH = 760
LENGTHS = (36, 36, 36, 33, 33, 33, 36, 33)  # tokens of the eight completions
TEXT, VIDEO, AUDIO, PROMPT = "t", "v", "a", 90
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 11px; fill: #59636e }
.mono { font: 12px ui-monospace, monospace } .bold { font-weight: 600 } .mid { text-anchor: middle }
.right { text-anchor: end } .paper { fill: #ffffff } .box { fill: #f3f5f7; stroke: #c4ccd4 }
.line { stroke: #7d8894; fill: none; stroke-width: 1.5 } .thin { stroke: #c4ccd4; fill: none }
.t { fill: #aab4be } .v { fill: #4c8fd6 } .a { fill: #9a6fd0 } .c { fill: #43a377 } .e { fill: #23694a }
.good { fill: #2f7fd0 } .bad { fill: #d9622b } .curve { stroke: #2f7fd0; fill: none; stroke-width: 3 }
.flat { stroke: #d9622b; fill: none; stroke-width: 3 } .dash { stroke-dasharray: 4 4 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9aa5b1 } .paper { fill: #0d1117 } .box { fill: #1a2028; stroke: #3d4650 }
  .line { stroke: #8b949e } .thin { stroke: #3d4650 } .t { fill: #57616c } .e { fill: #8fe0bb }
}
"""


class Figure:
    """A drawing of `height` pixels; every method adds to it."""

    def __init__(self, height):
        self.height, self.parts = height, []

    def rect(self, x, y, width, height, kind, opacity=1.0, radius=3):
        """A filled rectangle; `kind` is a class of STYLE."""
        self.parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'rx="{radius}" fill-opacity="{opacity:.2f}"/>'
        )

    def text(self, x, y, words, kind=""):
        """A line of text that begins at x (or ends or is centred there, by `kind`)."""
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" xml:space="preserve">{escape(words)}</text>')

    def path(self, points, kind="line"):
        """A line through `points`."""
        self.parts.append(f'<path class="{kind}" d="M' + " L".join(f"{x:g} {y:g}" for x, y in points) + '"/>')

    def arrow(self, x1, y1, x2, y2):
        """A line with a head at its end; horizontal or vertical."""
        across, down = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
        self.path([(x1, y1), (x2, y2)])
        self.path(
            [
                (x2 - 6 * across - 4 * down, y2 - 6 * down - 4 * across),
                (x2, y2),
                (x2 - 6 * across + 4 * down, y2 - 6 * down + 4 * across),
            ]
        )

    def box(self, x, y, width, height, *lines):
        """A box with lines of text in its middle, the first one bold."""
        self.rect(x, y, width, height, "box", radius=6)
        top = y + height / 2 - 8 * len(lines) + 12
        for i, line in enumerate(lines):
            self.text(x + width / 2, top + 16 * i, line, "mid small" if i else "mid bold")

    def svg(self):
        """The finished file."""
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
                f"<style>{STYLE}</style>",
                f'<rect class="paper" width="{WIDTH}" height="{self.height}"/>',
                *self.parts,
                "</svg>",
                "",
            ]
        )


def prompts():
    """Eight prompts over two ranks; one of them becomes a row of 90 tokens."""
    f = Figure(300)
    for i in range(8):
        x = 24 + 90 * i + 8 * (i // 4)
        f.rect(x, 30, 80, 34, "box", radius=6)
        f.text(x + 40, 52, f"prompt {i + 1}", "mid bold" if i == 0 else "mid")
    f.text(199, 20, "rank 0 takes 4 whole prompts", "mid small")
    f.text(567, 20, "rank 1 takes 4", "mid small")
    f.arrow(64, 66, 64, 96)
    for i in range(8):
        f.rect(24 + 13 * i, 104, 11, 22, "v", 0.35 + 0.08 * i)
    f.text(24, 144, "8 frames of 56 x 56", "small")
    f.path([(24 + 2 * i, 176 + 9 * (-1) ** i) for i in range(52)])
    f.text(24, 206, "its sound, 45 log-mel frames", "small")
    f.arrow(136, 115, 236, 115)
    f.arrow(136, 176, 236, 176)
    f.box(240, 96, 170, 98, "towers", "frozen, run once a clip", "not once a completion")
    f.arrow(412, 115, 470, 115)
    f.arrow(412, 176, 470, 176)
    f.text(478, 119, "16 video tokens  (16, 128)")
    f.text(478, 180, "11 audio tokens  (11, 128)")
    kinds = TEXT * 16 + VIDEO * 16 + TEXT * 2 + AUDIO * 11 + TEXT * 45
    for i, kind in enumerate(kinds):
        f.rect(24 + 7.9 * i, 230, 6.9, 24, kind, radius=1)
    for x, kind, words in ((24, TEXT, "words"), (104, VIDEO, "video"), (184, AUDIO, "sound")):
        f.rect(x, 270, 10, 10, kind)
        f.text(x + 15, 280, words, "small")
    f.text(735, 280, "one prompt: 90 tokens, ids (90,), positions (3, 90)", "small right")
    return f


def rollout():
    """One prefill, eight completions that end when they like."""
    f = Figure(300)
    f.rect(24, 60, 180, 190, "t", 0.45)
    f.text(114, 135, "prompt", "mid bold")
    f.text(114, 155, "90 tokens, computed once", "mid small")
    f.text(114, 171, "keys and values kept once", "mid small")
    f.text(24, 40, "prefill", "small")
    f.text(220, 40, "decode: at every step one new token for each row that hasn't ended", "small")
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            f.rect(220 + 12.6 * t, 60 + 24 * row, 11.2, 20, "e" if t == length - 1 else "c", radius=2)
        f.text(735, 75 + 24 * row, str(length), "small right")
    f.rect(220, 268, 10, 10, "e")
    f.text(236, 278, "end of turn; shorter rows are padded: completion_ids (8, 36), completion_mask (8, 36)", "small")
    return f


def judge():
    """What runs at the same time; seconds of the rank to scale, the judge's replies not."""
    f, scale, left = Figure(230), 880, 110
    f.text(24, 58, "this rank", "bold")
    start = left
    for seconds, words in ((0.189, "2 rollout"), (0.162, "4 reference"), (0.318, "6, 7 update")):
        width = seconds * scale
        f.rect(start, 36, width - 4, 36, "box", radius=6)
        f.text(start + width / 2, 59, words, "mid bold")
        start += width + (10 if "4" in words else 0)
    asked = left + 0.189 * scale
    f.text(24, 134, "judge", "bold")
    for i in range(64):
        f.rect(asked + 4 + 7 * (i % 16), 100 + 15 * (i // 16), 5, 11, "a", 0.85, radius=1)
    f.path([(asked, 28), (asked, 190)], "thin dash")
    f.text(asked, 208, "3: all scores are asked for", "mid small")
    here = asked + 0.162 * scale
    f.path([(here, 28), (here, 190)], "thin dash")
    f.text(here + 4, 208, "5: wait for what is still missing", "small")
    f.text(here + 14, 122, "32 completions x 2 judged rewards", "small")
    f.text(here + 14, 140, "= 64 scores, in flight while 4 computes", "small")
    return f


def reference():
    """A group as one row, and who attends to whom."""
    f, x0, y0, p, c = Figure(330), 60, 50, 90, 36
    sizes = [p, c, c, c, c]
    starts = [sum(sizes[:i]) for i in range(5)]
    for i, (start, size) in enumerate(zip(starts, sizes)):
        kind = "c" if i else "t"
        f.rect(x0 + start, y0 - 18, size - 2, 12, kind)
        f.rect(x0 - 18, y0 + start, 12, size - 2, kind)
        f.text(x0 + start + size / 2, y0 - 24, f"{i}" if i else "prompt", "mid small")
        for t in range(0, size, 6):  # query rows: they see the keys up to themselves
            f.rect(x0 + start, y0 + start + t, t + 6, 6, kind, 0.85, radius=0)
        if i:
            f.rect(x0, y0 + start, p, size, "t", 0.4, radius=0)
        f.path([(x0, y0 + start), (x0 + 234, y0 + start)], "thin")
        f.path([(x0 + start, y0), (x0 + start, y0 + 234)], "thin")
    f.path([(x0, y0), (x0 + 234, y0), (x0 + 234, y0 + 234), (x0, y0 + 234), (x0, y0)], "thin")
    f.text(x0 + 117, 306, "keys (4 of the 8 completions drawn)", "mid small")
    lines = (
        ("One row for a group", "bold"),
        ("prompt + 8 completions: 90 + 8 x 36 = 378 tokens", ""),
        ("instead of 8 rows of 90 + 36 = 1008", ""),
        ("", ""),
        ("The prompt attends to itself.", ""),
        ("Each completion attends to the prompt and to its own", ""),
        ("past, never to another completion.", ""),
        ("", ""),
        ("Positions start again after the prompt for each.", ""),
        ("The first token of all 8 is predicted by the prompt's", ""),
        ("last position.", ""),
        ("", ""),
        ("out: ref_logps (8, 36), no gradient", "mono"),
    )
    for i, (words, kind) in enumerate(lines):
        f.text(350, 60 + 18 * i, words, kind)
    return f


def rewards():
    """Four rewards of eight completions, and their sum for the whole."""
    f = Figure(240)
    rows = (
        ("format", [1] * 8),
        ("accuracy", [1, 1, 1, 0.5, 0.5, 0.5, 1, 0.5]),
        ("context", [2 / 3, 1, 2 / 3, 2 / 3, 2 / 3, 1, 2 / 3, 2 / 3]),
        ("logic", [1, 1, 1, 0.8, 0.8, 0.8, 1, 0.8]),
        ("R_full", [2, 2, 2, 1.5, 1.5, 1.5, 2, 1.5]),
    )
    for g in range(8):
        f.text(163 + 66 * g, 28, f"{g + 1}", "mid small")
    for r, (name, values) in enumerate(rows):
        y = 40 + 36 * r + 8 * (r == 4)
        f.text(114, y + 21, name, "right bold")
        for g, value in enumerate(values):
            f.rect(132 + 66 * g, y, 62, 30, "good", 0.15 + 0.55 * (value - 0.4) / 0.6 if r < 4 else 0.5 * value - 0.6)
            f.text(163 + 66 * g, y + 20, f"{value:.2f}", "mid")
        f.text(672, y + 20, ("by rule", "by rule", "by judge", "by judge", "the upper two")[r], "small")
    return f


def advantages():
    """Every token of four completions, tinted by its advantage."""
    f = Figure(352)
    start = "<context|>A| frown|,| a| rising| voice|,| a| %s| wall|.</|context|><|"
    right = (
        "think|>The| rising| voice| and| the| frown| count|:| cold| and| eager|.</|think|><|answer|>B|,C|</|answer|>"
    )
    wrong = "think|>Only| the| frown| counts|:| cold| and| tired|.</|think|><|answer|>B|,D|</|answer|>"
    kinds = (
        ("2", "red", right, "saw the wall, reasoned well, right"),
        ("1", "plain", right, "left the wall out"),
        ("6", "red", wrong, "saw the wall, reasoned badly, half right"),
        ("4", "plain", wrong, "did neither"),
    )
    for row, (number, wall, rest, words) in enumerate(kinds):
        tokens = (start % wall + rest).split("|") + ["<|im_end|>"]
        good = rest is right
        full, context, logic = (0.25 if good else -0.25), (0.25 if wall == "red" else -0.0833), (0.1 if good else -0.1)
        y = 26 + 82 * row
        f.text(24, y, f"{number}: {words}", "bold")
        f.text(
            736,
            y,
            f"context {full + context + logic:+.2f}   think {full + logic:+.2f}   answer {full:+.2f}",
            "mono right",
        )
        x, y = 24, y + 8
        in_think = tokens.index("think", 14)
        ends = (14, tokens.index("><", in_think) + 1)  # tokens through </context>, through </think>
        for i, token in enumerate(tokens):
            value = full + context * (i < ends[0]) + logic * (i < ends[1])
            width = 7.25 * len(token) + 2
            if x + width > 744:
                x, y = 24, y + 26
            f.rect(x, y, width - 1, 22, "good" if value > 0 else "bad", min(0.75, 0.12 + abs(value)))
            f.text(x + 1, y + 15, token, "mono")
            x += width
    return f


def update():
    """Where the clip takes the gradient away, and the way from log-probs to weights."""
    f = Figure(330)
    for left, sign, words in ((60, 1, "A > 0: make it likelier"), (430, -1, "A < 0: make it rarer")):

        def at(ratio, value, left=left):
            return left + 250 * (ratio - 0.5), 150 - 75 * value

        f.text(left, 24, words, "bold")
        f.path([at(0.5, 0), at(1.6, 0)])
        f.path([at(0.5, -1.65), at(0.5, 1.45)])
        bound = 1 + 0.2 * sign
        moving, flat = (
            ([(0.5, 0.5), (1.2, 1.2)], [(1.2, 1.2), (1.6, 1.2)])
            if sign > 0
            else ([(0.8, -0.8), (1.6, -1.6)], [(0.5, -0.8), (0.8, -0.8)])
        )
        f.path([at(*point) for point in moving], "curve")
        f.path([at(*point) for point in flat], "flat")
        f.path([at(bound, -1.6), at(bound, 1.4)], "thin dash")
        f.text(at(bound, 0)[0], 42, f"{bound:g}", "mid small")
        f.text(at(1.0, 0)[0], 166 if sign > 0 else 142, "1", "mid small")
        f.text(at(1.6, 0)[0] + 4, 154, "ratio", "small")
        where = at(1.42, 1.2) if sign > 0 else at(0.68, -0.8)
        f.text(where[0], where[1] + (-8 if sign > 0 else 20), "no gradient", "mid small")
    f.text(70, 250, "height: min(ratio A, clip(ratio) A), with |A| = 1", "small")
    steps = (
        ("logps (8, 36)", "one forward pass"),
        ("ratio, k3", "per token"),
        ("sum / N", "N: all ranks"),
        ("backward", "gradients"),
        ("clip norm", "to 1.0"),
        ("AdamW", "weights move"),
    )
    for i, lines in enumerate(steps):
        f.box(24 + 121 * i, 284, 104, 40, *lines)
        if i:
            f.arrow(24 + 121 * i - 16, 304, 24 + 121 * i - 2, 304)
    return f


def log():
    """What a step leaves behind."""
    f = Figure(250)
    f.box(24, 84, 130, 76, "step s", "1 ... 7")
    outputs = (
        ("metrics.jsonl", "one line a step: means over all ranks"),
        ("rollouts.jsonl", "each completion, and of its every token: log-prob, ratio, KL, credit"),
        ("checkpoint-N", "every save_steps: weights, optimiser, step; in the background"),
        ("model/", "after the last step: loads with from_pretrained"),
    )
    for i, (name, words) in enumerate(outputs):
        y = 24 + 52 * i
        f.box(230, y, 130, 40, name)
        f.text(372, y + 24, words, "small")
        f.path([(154, 122), (190, 122), (190, y + 20)])
        f.arrow(190, y + 20, 226, y + 20)
    f.path([(89, 160), (89, 226), (40, 226)])
    f.arrow(40, 226, 40, 164)
    f.text(96, 222, "next step", "small")
    return f


FIGURES = {
    "1-prompts": prompts,
    "2-rollout": rollout,
    "3-judge": judge,
    "4-reference": reference,
    "5-rewards": rewards,
    "6-advantages": advantages,
    "7-update": update,
    "8-log": log,
}

if __name__ == "__main__":
    folder = Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (folder / f"{name}.svg").write_text(draw().svg())
