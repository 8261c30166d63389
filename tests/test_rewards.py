"""Rewards by rule. Expected values are worked out by hand from the table of problem types in docs/data.md."""

import json
import time
from pathlib import Path

import pytest

from hov2.answers import (
    PROBLEM_TYPES,
    answer_text,
    block_text,
    check_reference,
    choice_letters,
    find_number,
    parse_answer,
    parse_number,
    rouge_l,
)
from hov2.rewards import accuracy_reward, format_reward

GOLDEN = json.loads((Path(__file__).parent / "golden" / "reward_cases.json").read_text())["cases"]


def accuracy(problem_type, answer, reference, **keywords):
    return accuracy_reward(
        f"<context>c</context><think>t</think><answer>{answer}</answer>", reference, problem_type, **keywords
    )


@pytest.mark.parametrize("case", GOLDEN, ids=[f"{c['problem_type']}: {c['note'] or 'plain'}" for c in GOLDEN])
def test_golden_cases(case):
    accuracy = accuracy_reward(case["completion"], case["solution"], case["problem_type"])
    assert accuracy == pytest.approx(case["sane_accuracy"], abs=1e-12)
    assert format_reward(case["completion"]) == case["sane_format"]
    assert format_reward(case["completion"], "released") == case["released_format"]


# ---------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize(
    ("text", "strict", "released"),
    [
        ("<context>c</context><think>t</think><answer>B</answer>", 1, 1),
        ("<context>c</context>\n\n<think>t</think> \t<answer>B</answer>\n", 1, 1),
        (" <context>c</context><think>t</think><answer>B</answer>", 1, 0),
        ("<context>c\nd</context><think>t\n\nu</think><answer>B</answer>", 1, 1),
        ("<context>c</context><think>t</think><answer>B</answer> so there", 0, 1),
        ("well <context>c</context><think>t</think><answer>B</answer>", 0, 0),
        ("<context>c</context> and <think>t</think><answer>B</answer>", 0, 0),
        ("<context> </context><think>t</think><answer>B</answer>", 0, 1),
        ("<context>c</context><think></think><answer>B</answer>", 0, 1),
        ("<context>c</context><think>t</think><answer>\n</answer>", 0, 1),
        ("<context>c</context><think>t</think><answer>B</answer><answer>B</answer>", 0, 1),
        ("<context>c</context><context>c</context><think>t</think><answer>B</answer>", 0, 1),
        ("<context>c<think>x</context><think>t</think><answer>B</answer>", 0, 1),
        ("<context>c</context><think>t <answer>A</answer></think><answer>B</answer>", 0, 1),
        ("<context>c</context><think>t</think>", 0, 0),
        ("<context>c</context><answer>B</answer>", 0, 0),
        ("<think>t</think><context>c</context><answer>B</answer>", 0, 0),
        ("<Context>c</Context><think>t</think><answer>B</answer>", 0, 0),
        ("<context >c</context ><think>t</think><answer>B</answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_format(text, strict, released):
    assert (format_reward(text), format_reward(text, "released")) == (strict, released)


# ---------------------------------------------------------------------------------------------- blocks and answers


def test_block_text():
    assert block_text("<context> a man </context>", "context") == "a man"
    assert block_text("</think><think>x</think>y</think>", "think") == "x"
    assert block_text("<think></think>", "think") == ""
    assert block_text("<think>x", "think") is None
    assert block_text("x</think>", "think") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> B </answer>", "B"),
        ("<think>maybe <answer>A</answer></think><answer>B</answer>", "B"),
        ("<think>maybe <answer>A</answer></think>", None),
        ("<answer>B</answer> <answer>B </answer>", "B"),
        ("<answer>B</answer><answer>A</answer>", None),
        ("<answer>A<answer>B</answer>", None),
        ("<answer>B", None),
        ("B</answer>", None),
        ("<Answer>B</Answer>", None),
        ("<answer></answer>", ""),
        ("<think>never closed <answer>B</answer>", "B"),
        ("B", None),
    ],
)
def test_answer_text(text, answer):
    assert answer_text(text) == answer


@pytest.mark.parametrize(
    ("text", "solution", "problem_type", "reward"),
    [
        ("<think>Perhaps B.</think>\nA", "A", "multiple choice", 1),
        ("<think>Perhaps B.</think>\nA", "B", "multiple choice", 0),
        ("<context>B is on the wall.</context><think>C?</think>\n\nThe answer is A.", "A", "multiple choice", 1),
        ("<think>maybe <answer>B</answer></think>A", "A", "multiple choice", 1),
        ("Perhaps B.</think>\nA", "A", "multiple choice", 1),  # the prompt opened the block
        ("A\n<think>B would be worse.</think>", "A", "multiple choice", 1),
        ("<think>Perhaps B.</think>", "B", "multiple choice", 1),  # nothing else was said: the whole text
        ("<think>A.</think>\nA or B", "A", "multiple choice", 0),
        ("<think>Yes? No?</think>Yes", "Yes", "judge", 1),
        ("<think>Yes.</think>No", "Yes", "judge", 0),
        ("<context>2 men</context><think>3 - 1</think>\n\\(4\\)", "4", "numerical", 1),
        ("<think>4</think>\n5", "4", "numerical", 0),
        ("<think>10 or 20</think>about 10", "10", "regression", 1),
        ("<think>It says GO.</think>STOP", "STOP", "OCR", 1),
    ],
)
def test_an_answer_without_tags_stands_outside_the_other_blocks_in_evaluation(text, solution, problem_type, reward):
    assert accuracy_reward(text, solution, problem_type, evaluation=True) == reward
    assert accuracy_reward(text, solution, problem_type) == 0.0


def test_no_answer_block_is_zero_in_training_and_its_untagged_text_in_evaluation():
    for text in ("The answer is B.", "B. A man", "<answer>B", "B"):
        assert accuracy_reward(text, "B", "multiple choice") == 0.0
        assert accuracy_reward(text, "B", "multiple choice", evaluation=True) == 1.0
    assert accuracy_reward("", "B", "multiple choice", evaluation=True) == 0.0
    empty = "<answer></answer> B"  # it answered: nothing
    assert accuracy_reward(empty, "B", "multiple choice", evaluation=True) == 0.0
    both = "<answer>A</answer><answer>B</answer>"
    assert accuracy_reward(both, "B", "multiple choice", evaluation=True) == 0.0


# ---------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("B", "B"), ("b", "B"), ("B.", "B"), ("(B)", "B"), ("B)", "B"), ("[B]", "B"), ("**B**", "B"), ("Ｂ", "B"),
        ("（Ｂ）", "B"),
        ("B. A man", "B"), ("b. a man", "B"), ("B) A man", "B"), ("(B) A man", "B"), ("(B)A man", "B"),
        ("B: A man", "B"),
        ("B - A man", "B"), ("B.A man", "B"), ("**B.** A man", "B"), ('"B. sad"', "B"), ("$\\boxed{\\text{B}}$", "B"),
        ("A", "A"), ("a", "A"), ("A.", "A"), ("A. man", "A"), ("(a) man", "A"), ("A, the man", "A"),
        ("The answer is B", "B"), ("The answer is B.", "B"), ("the answer is (b)", "B"), ("Answer: B", "B"),
        ("My answer is A", "A"),
        ("The correct answer is option (B).", "B"), ("The answer is A because he smiles", "A"),
        ("I choose C, he is sad", "C"),
        ("So the answer should be b.", "B"), ("Option B: he smiles", "B"), ("I think it is B", "B"), ("It's B.", "B"),
        ("答案是B", "B"), ("选B。", "B"),
        ("A or B", "AB"), ("A and C", "AC"), ("A, C", "AC"), ("C,A", "AC"), ("A/B", "AB"), ("A & B", "AB"),
        ("A、C", "AC"), ("AC", "AC"),
        ("A or C, I can't say", "AC"), ("A. happy, C. sad", "AC"), ("A. happy\nC. sad", "AC"),
        ("a) happy; c) sad", "AC"),
        ("The answer is A. No, the answer is B", "AB"), ("B. The answer is A", "AB"), ("It is B or C", "BC"),
        # letters that choose nothing
        ("A man is sad", ""), ("A man", ""), ("a man", ""), ("The answer is a man", ""), ("The answer is A man", ""),
        ("I think so", ""), ("nothing", ""), ("", ""), ("...", ""), ("BAD news", ""), ("T-shirt", ""),
        ("U.S. army", ""), ("I'd say", ""),
        ("The answer is not B", ""), ("It isn't B", ""), ("Neither A nor B", ""), ("B is not the answer", ""),
        # letters inside an option's words
        ("B. Vitamin A", "B"), ("B. Vitamin C.", "B"), ("B. Take vitamin C. It helps", "B"),
        ("B. Washington D.C.", "B"),
        ("D. Both A and B", "D"), ("E. Neither A nor B", "E"), ("B. e.g. a dog", "B"),
        ("B. A man, a plan", "B"),
        ("B. He moved to plan C", "B"),
    ],
)  # fmt: skip
def test_choice_letters(text, letters):
    assert choice_letters(text) == set(letters)


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        # an option's words may hold a negation
        ("B\nNo, he is not happy.", "B"), ("- B. He is not happy.", "B"), ("B is correct: she isn't angry.", "B"),
        ("(B)\nHe never smiles", "B"), ("**B**\n\nHe isn't happy", "B"), ("* B) Not happy", "B"),
        ("1. B. Not happy", "B"),
        ("B – he doesn't smile", "B"), ("B (he is not happy)", "B"), ("B because he isn't happy", "B"),
        ("B He is not happy", "B"), ("Option B\nHe is not happy", "B"), ("I think it's B. He is not happy.", "B"),
        ("B is the best choice, since neither smiles", "B"), ("- A. not happy\n- C. never sad", "AC"),
        # what is refused is not chosen
        ("not A but B", "B"), ("It isn't A, it's B", "B"), ("B, not A", "B"), ("A is wrong, B is right", "B"),
        ("I would not choose A; B fits", "B"), ("The answer is B. Option A is wrong", "B"), ("B rather than A", "B"),
        ("B is wrong", ""), ("Option B is wrong.", ""), ("option A doesn't fit", ""), ("It cannot be B", ""),
        ("I don't think it's B", ""), ("Don't pick A", ""), ("B isn't right because he smiles", ""),
        ("anything but B", ""), ("None of A, B or C", ""), ("not A or B", ""), ("A and B are both incorrect", ""),
        # the letter A and the article
        ("option A fits best", "A"), ("Option A: a man", "A"), ("A fits best", "A"), ("A seems right", "A"),
        ("A since he smiles", "A"), ("A He smiles", "A"), ("I'd go with A here", "A"),
        ("Choice A matches the video", "A"),
        ("A, B/c he told a joke.", "A"), ("A b/c he told a joke", "A"), ("C, b/c a man left", "C"),
        ("C\nA Black man enters.", "C"), ("A\nA Black man enters.", "A"), ("C. A Black man enters.", "C"),
        ("A Black man enters.", ""), ("A fitting end", ""), ("the best option is a man", ""),
        ("B/c he told a joke", ""),
        ("N/A (wrong clip)", ""), ("N/A", ""), ("n/a", ""), ("Answer: N/A", ""), ("A/C", "AC"),
        ("\\(B\\)", "B"), ("\\boxed{\\text{B. He isn't happy}}", "B"), ("$\\mathrm{(B)}$", "B"),
    ],
)  # fmt: skip
def test_letters_beside_negations_and_articles(text, letters):
    assert choice_letters(text) == set(letters)


MEN = ("A. Vitamin C", "B. a man", "C. not a man", "D. Both A and B")


@pytest.mark.parametrize(
    ("answer", "letters"),
    [
        ("Vitamin C", "A"), ("vitamin c.", "A"), ("The answer is: Vitamin C", "A"), ("A man", "B"), ("not a man", "C"),
        ("Both A and B", "D"), ("B. a man", "B"), ("C\nNot a man", "C"), ("Vitamin C, a man", "AB"), ("C", "C"),
        ("Option C, because of a man", "C"), ("A, b/c Vitamin C helps", "A"),
        ("a woman", ""), ("not Vitamin C", ""), ("a man with a hat", ""), ("Vitamins", ""),
    ],
)  # fmt: skip
def test_words_of_an_option_are_its_letter(answer, letters):
    assert parse_answer(answer, "multiple choice", MEN) == set(letters)
    assert parse_answer(answer, "emer_ov_mc", MEN) == set(letters)


def test_multiple_choice_needs_the_same_set():
    assert accuracy("multiple choice", "B. A man", "<answer>B</answer>") == 1.0
    assert accuracy("multiple choice", "A man is sad", "A") == 0.0
    assert accuracy("multiple choice", "A or B", "B") == 0.0
    assert accuracy("multiple choice", "C and A", "A,C") == 1.0
    assert accuracy("multiple choice", "A", "A,C") == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("C;A", "A,C", 1), ("a c", "A,C", 1), ("A,A,C", "A,C", 1), ("A. happy, C. sad", "A,C", 1),
        ("A. happy C. sad", "A,C", 2 / 3),
        ("CA", "A,C", 1), ("A|C", "A,C", 1), ("(A)(C)", "A,C", 1), ("A", "A,C", 2 / 3), ("A,B", "A,C", 1 / 2),
        ("B", "A,C", 0),
        ("A,B,C,D,E,F", "A,C,E,F", 0.8), ("A happy man", "A,C", 0), ("all", "A,C", 0),
    ],
)  # fmt: skip
def test_emer_ov_mc(answer, reference, f1):
    assert accuracy("emer_ov_mc", answer, reference) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        ("Yes", "yes", 1), ("**No**", "No", 1), ("Yes, he lies.", "Yes", 1), ("NO!", "No", 1), ("Ｙｅｓ", "Yes", 1),
        ("No", "Yes", 0), ("yes or no", "No", 0), ("Yes/No", "Yes", 0), ("nothing", "No", 0), ("cannot tell", "No", 0),
        ("yesterday", "Yes", 0), ("No-one knows", "No", 0), ("", "No", 0),
    ],
)  # fmt: skip
def test_judge_type(answer, reference, reward):
    assert accuracy("judge", answer, reference) == reward


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        ("A", "Yes", 1), ("B", "No", 1), ("(a)", "Yes", 1), ("The answer is B", "No", 1), ("A. Yes", "Yes", 1),
        ("A", "A", 1), ("Yes", "A", 1), ("b", "B", 1), ("B. No, he does not", "No", 1),
        ("B", "Yes", 0), ("A", "B", 0), ("C", "Yes", 0), ("A or B", "Yes", 0), ("not A", "Yes", 0), ("N/A", "Yes", 0),
    ],
)  # fmt: skip
def test_yes_or_no_asked_as_options(answer, reference, reward):
    options = ["A. Yes", "B. No"]
    assert accuracy("judge", answer, reference, options=options) == reward


def test_a_letter_means_yes_or_no_only_by_the_options():
    assert accuracy("judge", "A", "Yes") == 0.0
    assert accuracy("judge", "A", "No", options=["A. No", "B. Yes"]) == 1.0
    assert accuracy("judge", "A", "Yes", options=["A. No", "B. Yes"]) == 0.0


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        ("42.0", "42", 1), ("42.", "42", 1), ("+42", "42", 1), ("41", "42", 0), ("-42", "42", 0),
        ("3.145", "3.15", 1), ("3.144", "3.15", 0),  # half up to d = 2
        ("-3.145", "-3.15", 1),  # a tie goes away from zero
        ("1.005", "1.01", 1),  # decimal: in binary floats 1.005 rounds down
        ("0.1234", "0.123", 1), ("0.1235", "0.123", 0), ("0.124", "0.123", 0),  # d = 3
        ("3.1416", "3.1", 0), ("3.1", "3.14", 0),  # d = 2, never fewer
        ("0.001", "0.004", 0), ("0.001", "0.0014", 1),  # d = 3
        ("0", "0.0", 1), ("-0", "0", 1), ("0.001", "0", 0), ("0", "0.004", 0),
        ("0.00", "0.004", 0),  # zero only equals zero
        ("1,234", "1234", 1), ("1,234,567.5", "1234567.5", 1), ("1,23", "123", 0), ("1,2345", "12345", 0),
        ("$5", "5", 1), ("5 €", "5", 1), ("-$5", "-5", 1), ("$5$", "5", 1), ("US$5", "5", 1),
        ("5 cm", "5", 1), ("5cm", "5", 1), ("5 m/s^2", "5", 1), ("5 m²", "5", 1), ("25 °C", "25", 1),
        ("5 red apples.", "5", 1),
        ("50%", "50", 1), ("50 %", "50%", 1), ("50%", "0.5", 0),
        ("−5", "-5", 1), ("５", "5", 1), ("**5**", "5", 1), ("\\boxed{5}", "5", 1),
        ("1/2", "0.5", 1), ("0.5", "1/2", 1), ("-3/4", "-0.75", 1), ("1/3", "0.33", 1), ("1/3", "0.333", 1),
        ("1/3", "0.3", 0),
        ("2/6", "1/3", 1), ("\\frac{1}{2}", "0.5", 1), ("1/0", "1", 0),
        ("1e3", "1000", 1), ("1.5e-3", "0.0015", 1), ("5 x 10^3", "5000", 1), ("5×10³", "5000", 1),
        ("5 \\times 10^{3}", "5000", 1),
        ("nan", "5", 0), ("inf", "5", 0), ("five", "5", 0), ("", "5", 0), ("1e999", "5", 0),
        ("5 or 6", "5", 0), ("5-6", "5", 0), ("5–6", "5", 0), ("5 of 10", "5", 0), ("10:30", "10", 0),
        ("1.5.2", "1.5", 0), ("10²", "10", 0),
        ("about 5", "5", 0),
    ],
)  # fmt: skip
def test_numerical(answer, reference, reward):
    assert accuracy("numerical", answer, reference) == reward


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\(3\)", 3), (r"\[3\]", 3), ("\\[\n3\n\\]", 3), ("$3$", 3), ("$$3$$", 3), (r"\boxed{3}", 3),
        (r"\textbf{3}.", 3),
        (r"120^\circ", 120), (r"120^{\circ}\text{C}", 120), (r"12\text{ cm}", 12), (r"12\,\mathrm{cm}^{2}", 12),
        (r"12~\text{cm}", 12), ("$12$ cm", 12), (r"5\ \Omega", 5), (r"50\%", 50), (r"$50\%$", 50), (r"\$5", 5),
        (r"1{,}000", 1000), (r"1{,}000{,}000.5", 1000000.5), (r"1\,000", 1000), (r"\$1{,}000", 1000),
        (r"\tfrac{1}{2}", 0.5), (r"\frac{1}{2}", 0.5), (r"\frac12", 0.5), (r"\boxed{-\dfrac{3}{4}}", -0.75),
        (r"1\frac{1}{2}", 1.5), (r"3.5\times 10^{2}", 350), (r"25 \cdot 10^{-2}", 0.25), (r"\left(-3\right)", -3),
        (r"2\pi", None), (r"3\sqrt{2}", None), (r"\sqrt{2}", None), (r"\approx 3", None), ("~3", None),
        (r"3\pm 1", None),
        (r"5 \times 3", None), (r"\(3\) or \(4\)", None), (r"3\text{ or }4", None), (r"\infty", None), ("2^{3}", None),
        (r"\frac{1}{0}", None), (r"\frac123", None), ("3{,}14", None), ("1{,}00", None), (r"\text{five}", None),
    ],
)  # fmt: skip
def test_numbers_in_latex(text, value):
    number = parse_number(text)
    assert (number and number.value) == value


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        ("10", "10", 1), ("9", "10", 0.9), ("12.5", "10", 0.75), ("25", "10", 0), ("-5", "-4", 0.75), ("4", "-4", 0),
        ("0", "0", 1), ("0.0 m", "0", 1), ("0.1", "0", 0),
        ("about 9 metres", "10", 0.9), ("It is 1,000.", "1000", 1), ("x = -3", "-3", 1), ("roughly 1/2", "0.5", 1),
        ("9 cm (9 cm)", "10", 0.9),
        ("between 9 and 10", "10", 0), ("9-10", "10", 0), ("3,14", "3.14", 0), ("nan", "10", 0), ("inf", "10", 0),
        ("ten", "10", 0),
    ],
)  # fmt: skip
def test_regression(answer, reference, reward):
    assert accuracy("regression", answer, reference) == pytest.approx(reward, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "reference", "mra"),
    # the relative error has to be below 0.5, 0.45 ... 0.05: an error of 0.1 passes eight of the ten
    [("10", "10", 1.0), ("9.5", "10", 0.9), ("9", "10", 0.8), ("8", "10", 0.6), ("5", "10", 0.0), ("5.01", "10", 0.1),
     ("11", "10", 0.8), ("0", "0", 1.0), ("1", "0", 0.0), ("words", "10", 0.0)],
)  # fmt: skip
def test_regression_in_evaluation_is_strict_mean_relative_accuracy(answer, reference, mra):
    assert accuracy("regression", answer, reference, evaluation=True) == mra


def test_numbers_that_no_arithmetic_should_touch():
    started = time.perf_counter()
    for text in ("1e999999999", "9" * 50000, "1/" + "7" * 50000, "5 x 10^88888888", "1,000" + ",000" * 9999):
        assert parse_number(text) is None and find_number(f"about {text} m") is None
    assert time.perf_counter() - started < 1


# ---------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        ("STOP AHEAD", "STOP AHEAD", 1), ("STOP", "STOP AHEAD", 0.5), ("STOP A HEAD", "STOP AHEAD", 0),
        ("STOP  AHEAD\n", "STOP AHEAD", 1),
        ("Stop AHEAD", "STOP AHEAD", 0.5), ("one three", "one two three", 2 / 3),
        ("one two three four five six", "one two three", 0),
        ("停止", "停车", 0.5), ("停 车", "停车", 1), ("小心地滑", "小心路滑", 0.75), ("とまれ", "とまる", 2 / 3),
        ("멈춤", "멈춰", 0),  # Korean has spaces: one word, wrong
        ("STOQ", "STOP", 0),  # so has English
    ],
)  # fmt: skip
def test_ocr(answer, reference, reward):
    assert accuracy("OCR", answer, reference) == pytest.approx(reward, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        ("the cat sat", "The cat sat.", 1),
        ("the cat", "the cat sat", 0.8),  # LCS 2; 2 * 2 / (2 + 3)
        ("sat cat the", "the cat sat", 1 / 3),  # LCS 1: the order counts
        ("a dog", "the cat sat", 0),
        ("他很高兴", "他很伤心", 0.5),
        ("他 is happy", "他is happy", 1),
    ],
)
def test_free_form_without_a_judge_is_rouge_l(answer, reference, reward):
    assert accuracy("free-form", answer, reference) == pytest.approx(reward, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("Happy, Sad", "happy,sad", 1), ("sad and happy", "happy, sad", 1), ("1. happy\n2. sad", "happy; sad", 1),
        ("happy", "happy, sad", 2 / 3),
        ("happy, happy", "happy", 1), ("[happy/angry]", "happy, sad", 0.5), ("self conscious", "self-conscious", 1),
        ("joyful", "happy", 0),
    ],
)  # fmt: skip
def test_emer_ov(answer, reference, f1):
    assert accuracy("emer_ov", answer, reference) == pytest.approx(f1, abs=1e-12)


class FakeJudge:
    def __init__(self, score):
        self.score, self.asked = score, []

    def consistency(self, answer, reference):
        self.asked.append((answer, reference))
        return self.score

    def synonyms(self, answer, reference):
        self.asked.append((answer, reference))
        return self.score


def test_a_judge_scores_free_form_and_emotion_words_only():
    judge = FakeJudge(0.6)
    assert accuracy("free-form", " a cat ", "<answer>the cat</answer>", judge=judge) == 0.6
    assert accuracy("emer_ov", "Happy, sad", "joyful", judge=judge) == 0.6
    assert judge.asked == [("a cat", "the cat"), ({"happy", "sad"}, {"joyful"})]
    assert accuracy("multiple choice", "B", "B", judge=judge) == 1.0
    assert accuracy("free-form", "", "the cat", judge=judge) == 0.0  # no answer, nothing to ask
    assert accuracy_reward("no tags", "the cat", "free-form", judge) == 0.0
    assert len(judge.asked) == 2


def test_a_failed_judge_is_missing_not_zero():
    assert accuracy("free-form", "a cat", "the cat", judge=FakeJudge(None)) is None
    assert accuracy("emer_ov", "happy", "sad", judge=FakeJudge(None)) is None


# ---------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize(
    ("solution", "problem_type", "message"),
    [
        ("<answer>B</answer>", "multiple-choice", "problem_type 'multiple-choice' is not one of 'multiple choice'"),
        ("<answer>B</answer>", "ocr", "is not one of"),
        ("", "multiple choice", "no answer in it"),
        (" \n", "free-form", "no answer in it"),
        ("<answer></answer>", "free-form", "no answer in it"),
        ("<answer>A</answer><answer>B</answer>", "multiple choice", "no answer in it"),
        ("<context>c</context><think>B</think>", "multiple choice", "no answer in it"),
        ("a man", "multiple choice", "'a man' is no answer of the type 'multiple choice'"),
        ("none", "emer_ov_mc", "no answer of the type"),
        ("yes and no", "judge", "no answer of the type"),
        ("five", "numerical", "no answer of the type"),
        ("nan", "regression", "no answer of the type"),
        ("1, 2", "emer_ov", "no answer of the type"),
    ],
)
def test_unusable_references(solution, problem_type, message):
    with pytest.raises(ValueError, match=message):
        check_reference(solution, problem_type)
    with pytest.raises(ValueError, match=message):
        accuracy_reward("<answer>B</answer>", solution, problem_type)


def test_every_type_gives_a_perfect_score_to_its_reference():
    references = {
        "multiple choice": "B", "emer_ov_mc": "A,C", "judge": "No", "numerical": "3.5", "regression": "0",
        "OCR": "STOP", "free-form": "a cat", "emer_ov": "happy",
    }  # fmt: skip
    assert set(references) == set(PROBLEM_TYPES)
    for problem_type, reference in references.items():
        solution = f"<context>c</context><think>t</think><answer>{reference}</answer>"
        assert check_reference(solution, problem_type)
        for evaluation in (False, True):
            assert accuracy_reward(solution, solution, problem_type, evaluation=evaluation) == 1.0


def test_degenerate_completions_take_no_time():
    started = time.perf_counter()
    for text in (
        "</context><think></think>" * 300,
        "<think>" * 1000,
        "A, " * 3000,
        "answer " * 1500,
        "1 " * 5000,
        "(" * 8000,
        "b\n" * 3000,
    ):
        for problem_type, reference in {
            "multiple choice": "B",
            "numerical": "5",
            "regression": "5",
            "emer_ov": "sad",
        }.items():
            accuracy(problem_type, text, reference)
        format_reward("<context>" + text, "released")
    rouge_l("word " * 2000, "word " * 100)
    assert time.perf_counter() - started < 3
