"""The scores of an experiment as tables: for the report, as Markdown, as csv and as JSON."""

import csv
from pathlib import Path

from report.summary import Row, Summary, percent
from tools.files import write_json, write_whole

MEASURES = ("miou", "share_of_supervised", "miou_all_classes", "mean_f1", "overall_accuracy", "kappa")
Texts = tuple[list[str], list[list[str]]]  # a table: column titles, rows


def table(summary: Summary) -> Texts:
    """The main table: one row for each folder; the paper's figures stand at the last one and at the bound."""
    paper, every = summary.dataset.paper, len(summary.dataset.left_out_of_mean) > 0
    titles = [
        "stage",
        "split",
        "mIoU",
        "share of supervised",
        *(["paper: mIoU", "paper: share"] if paper else []),
        *([f"mIoU, all {summary.dataset.num_classes} classes"] if every else []),
        "mean F1",
        "overall accuracy",
        "kappa",
        "images",
    ]

    def texts(title: str, split: str, row: Row, published: list[str]) -> list[str]:
        values = [percent(row.get(key)) for key in MEASURES if every or key != "miou_all_classes"]
        return [title, split, *values[:2], *(published if paper else []), *values[2:], str(row["images"])]

    tested = [row for row in summary.rows if row["split"] == "test" and not row["is_bound"]]
    rows = []
    for row in summary.rows:
        published = ["not published"] * 2
        if paper and tested and row is tested[-1]:
            published = [f"{paper['miou']:.2f}", f"{paper['share_of_supervised']:.2f}"]
        elif paper and row["is_bound"] and row["split"] == "test":
            published = [f"{paper['supervised']:.2f} (implied)", "100"]
        notes = [word for word, holds in (("partial", row["partial"]), ("older", row["stale"])) if holds]
        title = row["title"] + (f" ({', '.join(notes)})" if notes else "")
        rows.append(texts(title, row["split"], row, published))
    for split, row in summary.constant.items():
        rows.append(texts(f"every pixel {row['class']}, the most frequent class", split, row, ["–", "–"]))
    return titles, rows


def per_class(summary: Summary) -> Texts:
    """IoU of every class, a row for each class. A left-out class shows its IoU with all classes counted."""
    rows = []
    for k, name in enumerate(summary.dataset.classes):
        left_out = name in summary.dataset.left_out_of_mean
        values = [(row["all_classes"] if left_out else row)["iou"][k] for row in summary.rows]
        rows.append([name + (" (left out of the mean)" if left_out else ""), *map(percent, values)])
    return ["IoU", *(f"{row['title']}, {row['split']}" for row in summary.rows)], rows


def shares(summary: Summary) -> Texts:
    """Share of each class of the labelled pixels, in the truth and in the last folder of each split."""
    last = summary.last.values()
    titles = [name for row in last for name in (f"truth, {row['split']}", f"{row['title']}, {row['split']}")]
    columns = [column for row in last for column in (row["truth_share"], row["predicted_share"])]
    rows = [[name, *(percent(column[k]) for column in columns)] for k, name in enumerate(summary.dataset.classes)]
    return ["share of pixels", *titles], rows


def times(summary: Summary) -> Texts:
    """How long each step took, without the start of its program, which takes some seconds."""
    runs = [(name, run) for name, run in summary.runs.items() if run.finished]
    runs += [(f"{name}, fully supervised", run) for name, run in summary.bound_runs.items() if run.finished]
    rows = [[name, run.device, f"{run.seconds:.0f}"] for name, run in runs]
    return ["made", "device", "seconds"], [*rows, ["all", "", f"{sum(run.seconds for _, run in runs):.0f}"]]


def lines(summary: Summary) -> list[str]:
    """What stands under the table: protocol, classes in the mean, what the paper gives, seed, backbone, stand-ins."""
    left_out = summary.dataset.left_out_of_mean
    without = f"; left out: {', '.join(left_out)}" if left_out else ""
    made = "; ".join(f"{title}: {', '.join(values)}" for title, values in summary.facts.items())
    return [
        f"Protocol of the scores: {summary.protocol}. mIoU and mean F1 over "
        f"{summary.dataset.num_classes - len(left_out)} classes{without}. All in per cent.",
        *([] if summary.dataset.paper else ["The paper gives no figure for this data set."]),
        f"Made with {made}." if made else "How it was made is not recorded.",
    ]


def markdown(summary: Summary) -> str:
    """The tables, and the lines that say what they rest on."""
    parts = [f"{summary.dataset.title}, experiment {summary.experiment}"]
    for texts, (titles, rows) in (
        (2, table(summary)),
        (1, per_class(summary)),
        (1, shares(summary)),
        (2, times(summary)),
    ):
        cells = [[text.replace("|", "\\|") for text in row] for row in [titles, *rows]]
        ruled = [cells[0], ["---" if column < texts else "---:" for column in range(len(titles))], *cells[1:]]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in ruled))
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in [*lines(summary), *summary.warnings])])


def write_scores(folder: Path, summary: Summary) -> None:
    """Write scores.json, scores.md and scores.csv (a row for each label folder; an undefined score is empty)."""
    write_json(folder / "scores.json", summary.content())
    with write_whole(folder / "scores.md") as temporary:
        temporary.write_text(markdown(summary) + "\n", encoding="utf-8")
    single = ("experiment", "stage", "split", "images", "partial", *MEASURES)
    several = ("iou", "f1", "precision", "recall", "support", "truth_share", "predicted_share")
    with write_whole(folder / "scores.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*single, *(f"{score}_{name}" for score in several for name in summary.dataset.classes)])
        for row in summary.rows:
            writer.writerow([*(row[key] for key in single), *(value for score in several for value in row[score])])
