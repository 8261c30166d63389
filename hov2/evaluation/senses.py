"""Proof of the senses: what an evaluation loses without the sound, and without the picture, question by question."""

from hov2.evaluation.results import bounds, compare, mean, number, table

VIEWS = {"both": ("video", "audio"), "picture": ("video",), "sound": ("audio",)}  # {what is left: EvalConfig.senses}


def compare_senses(records: dict[str, list[dict]]) -> dict:
    """Return what `records`, {one of VIEWS: those of the same questions}, say of each sense, as it is written to JSON.

    "rows": {problem type or "all": questions, accuracy with both, and for either sense alone its accuracy, the
    difference to both and the 95 % interval of the difference over the questions}. "changed": {a sense alone: how many
    of "pairs" answers are others than with both}.
    """
    kinds = sorted({record["problem_type"] for record in records["both"]})
    rows = {}
    for kind in [*kinds, "all"]:
        of_kind = {}
        for view, of_view in records.items():
            of_kind[view] = [record for record in of_view if kind in (record["problem_type"], "all")]
        rows[kind] = _row(of_kind)
    changed = {}
    pairs = {}
    for view in ("picture", "sound"):
        asked = []
        for before, after in compare(records["both"], records[view])["pairs"]:
            if not before["error"] and not after["error"]:
                asked.append(before["parsed"] != after["parsed"])
        changed[view] = sum(asked)
        pairs[view] = len(asked)
    return {"rows": rows, "changed": changed, "pairs": pairs}


def _row(records: dict[str, list[dict]]) -> dict:
    row = {"questions": len(records["both"]), "both": mean(record["accuracy"] for record in records["both"])}
    for view in ("picture", "sound"):
        found = compare(records["both"], records[view])
        row[view] = {
            "accuracy": mean(record["accuracy"] for record in records[view]),
            "difference": found["difference"],
            "interval": found["interval"],
        }
    return row


def format_senses(found: dict) -> str:
    """Return what `compare_senses` found as a table, with a warning for a sense that changes no answer."""
    header = ["problem type", "questions", "both"]
    for view in ("picture", "sound"):
        header += [f"{view} only", "- both", "95 % interval"]
    rows = [header]
    for kind, row in found["rows"].items():
        cells = [kind, row["questions"], number(row["both"])]
        for view in ("picture", "sound"):
            of_view = row[view]
            cells += [number(of_view["accuracy"]), number(of_view["difference"], "+"), bounds(of_view["interval"], "+")]
        rows.append(cells)
    lines = [table(rows)]
    for view, other in (("picture", "sound"), ("sound", "picture")):
        changed = found["changed"][view]
        lines.append(f"without the {other} {changed} of {found['pairs'][view]} answers are others")
        if changed == 0 and found["pairs"][view]:
            lines.append(
                f"WARNING: leaving the {other} out changes no answer: either it never reaches the model, or the model "
                "makes nothing of it"
            )
    return "\n".join(lines)
