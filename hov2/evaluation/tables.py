"""A benchmark's evaluation as text: the paper's table with this run's row, what others published, the breakdowns."""

from hov2.evaluation.benchmarks import PUBLISHED, RULES, columns, groups, intent_column
from hov2.evaluation.results import interval, mean, table


def partial(name: str, records: list[dict]) -> str:
    """Return a sentence that says how the number of scored questions differs from the published one; "" if equal."""
    published = PUBLISHED[name]["questions"]
    scored = sum(record["accuracy"] is not None for record in records)
    if scored == published == len(records):
        return ""
    text = f"{PUBLISHED[name]['name']} has {published:,} published questions; this score is over {scored:,}"
    if scored < len(records):
        text += f", {len(records) - scored:,} more have none"
    return text


def render(name: str, records: list[dict]) -> str:
    """Return a text table: scores in % with intervals, numbers of questions, published rows, then the breakdowns."""
    about = PUBLISHED[name]
    found = groups(name, records)
    warning = partial(name, records)
    lines = []
    if warning:
        lines.append(f"WARNING: {warning}: the score is partial.")
    lines.append(f"{about['name']}, accuracy in %, Avg over questions")
    lines.append(_paper_table(about, found["paper"], bool(warning)))
    lines += _sources(about)
    lines += about["notes"]
    if name == "intentbench":
        rules = [intent_column(record)[1] for record in records]
        counts = [f"{rule} ({rules.count(rule)} questions)" for rule in RULES]
        lines.append(f"Columns by: {', '.join(counts)}")
    for title in about["breakdowns"]:
        in_paper = {label for of, label, _ in about["columns"].values() if of == title}
        if not found[title].keys() <= in_paper:
            lines += ["", _breakdown_table(title, found[title])]
    letters = columns(name, records)["letters"]
    strict, count = letters["strict"]
    lenient, _ = letters["lenient"]
    lines.append("")
    lines.append(
        f"letter taken by official rules, {count} multiple choice questions: strict (Daily-Omni's 2025 script for "
        f"Qwen2.5-Omni) {_percent(strict)}, lenient (WorldSense's) {_percent(lenient)}"
    )
    return "\n".join(lines)


def _paper_table(about: dict, found: dict[str, list[dict]], is_partial: bool) -> str:
    """Return the paper's table: this run's rows, a line, the published rows that have its columns."""
    counts = [count for _, _, count in about["columns"].values()]
    rows = [("", *found), ("questions, published", *counts, about["questions"])]
    titles = ["questions", "this run (partial)" if is_partial else "this run", "  95 % from", "  95 % to"]
    cells = [_cells(of_column) for of_column in found.values()]
    for position, title in enumerate(titles):
        rows.append((title, *[of_column[position] for of_column in cells]))
    num_ours = len(rows)
    for source in about["published"]:
        for title, accuracies in source["rows"].items():
            if isinstance(accuracies, list):
                rows.append((title, *[_percent(accuracy, 1, about["digits"]) for accuracy in accuracies]))
    lines = table(rows).splitlines()
    lines.insert(num_ours, "-" * len(lines[0]))
    return "\n".join(lines)


def _sources(about: dict) -> list[str]:
    """Return lines that say where the table's published rows are from, and who published which Avg alone."""
    of_table = []
    totals = []
    for source in about["published"]:
        name = f"{source['source']} ({source['date'] or 'date not known'})"
        alone = [f"{title} {score:g}" for title, score in source["rows"].items() if not isinstance(score, list)]
        if len(alone) < len(source["rows"]):
            of_table.append(name)
        if alone:
            totals.append(f"  {name}: {', '.join(alone)}")
    return [f"published rows: {'; '.join(of_table)}", "Avg alone is published by", *totals]


def _breakdown_table(title: str, found: dict[str, list[dict]]) -> str:
    """Return the table of one breakdown, a row a label."""
    rows = [[f"by {title}", "questions", "accuracy", "95 % from", "to"]]
    for label, of_label in found.items():
        rows.append([label, *_cells(of_label)])
    return table(rows)


def _cells(records: list[dict]) -> list:
    """Return how many of the questions have a score, their accuracy in %, and the bounds of its interval."""
    values = [record["accuracy"] for record in records if record["accuracy"] is not None]
    low, high = interval(values) or (None, None)
    return [len(values), _percent(mean(values)), _percent(low), _percent(high)]


def _percent(value: float | None, factor: float = 100, digits: int = 2) -> str:
    return "-" if value is None else f"{factor * value:.{digits}f}"
