"""The scores of an experiment as tables: for the report, as Markdown, as csv and as JSON."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from report.summary import Row, Summary, percent
from tools.dataset import Dataset
from tools.files import write_json, write_whole


@dataclass(frozen=True)
class Column:
    """A column of a table. A row is a dict: the text of a cell is `show` of the row's value of `key`."""

    title: str
    key: str
    show: Callable[[Any], str] = percent
    style: Literal["text", "number", "headline"] = "number"  # the headline stands in bold
    in_page: bool = True  # and in scores.md

    def cell(self, row: Row) -> str:
        return self.show(row.get(self.key))


@dataclass(frozen=True)
class Table:
    """Columns and rows; a row with a true value of "faint" stands in grey."""

    columns: list[Column]
    rows: list[Row]


def score_columns(dataset: Dataset) -> list[Column]:
    """The columns of the main table in the page and in scores.md; scores.csv has those in per cent, as fractions.

    To add a score of `ConfusionMatrix.scores` to all three, add a line.
    """
    return [
        Column("stage", "name", str, "text"),
        Column("split", "split", str, "text"),
        Column("mIoU", "miou", style="headline"),
        Column("share of supervised", "share_of_supervised"),
        Column("paper: mIoU", "paper_miou", str, in_page=bool(dataset.paper)),
        Column("paper: share", "paper_share", str, in_page=bool(dataset.paper)),
        Column(f"mIoU, all {dataset.num_classes} classes", "miou_all_classes", in_page=bool(dataset.left_out_of_mean)),
        Column("mean F1", "mean_f1"),
        Column("overall accuracy", "overall_accuracy"),
        Column("kappa", "kappa"),
        Column("images", "images", str),
    ]


def score_table(summary: Summary) -> Table:
    """The main table, a row for each scored stage; the paper's figures stand at the last one and at the bound.

    Below them, in grey, what one class everywhere would reach.
    """
    paper = summary.dataset.paper
    rows = []
    for row in summary.rows:
        published = {"paper_miou": "not published", "paper_share": "not published"}
        if paper and row["split"] == "test" and row["is_bound"]:
            published = {"paper_miou": f"{paper['supervised']:.2f} (implied)", "paper_share": "100"}
        elif paper and row is summary.last.get("test"):
            published = {"paper_miou": f"{paper['miou']:.2f}", "paper_share": f"{paper['share_of_supervised']:.2f}"}
        marks = [word for word, holds in (("partial", row["partial"]), ("older", row["stale"])) if holds]
        name = f"{row['title']} ({', '.join(marks)})" if marks else row["title"]
        rows.append(row | published | {"name": name})
    for split, row in summary.constant.items():
        name = f"every pixel {row['class']}, the most frequent class"
        rows.append(row | {"name": name, "split": split, "paper_miou": "–", "paper_share": "–", "faint": True})
    return Table([column for column in score_columns(summary.dataset) if column.in_page], rows)


def class_table(summary: Summary) -> Table:
    """IoU of every class in each scored stage."""
    columns = {f"{row['title']}, {row['split']}": summary.class_ious(row) for row in summary.rows}
    return _by_class("IoU", summary.class_titles, columns)


def share_table(summary: Summary) -> Table:
    """Share of each class of the labelled pixels, in the truth and in the last stage of each split."""
    columns = {}
    for split, row in summary.last.items():
        columns[f"truth, {split}"] = row["truth_share"]
        columns[f"{row['title']}, {split}"] = row["predicted_share"]
    return _by_class("share of pixels", summary.dataset.classes, columns)


def _by_class(title: str, classes: Sequence[str], columns: dict[str, list[float | None]]) -> Table:
    """A row for each class; `columns`: title -> a value for each class."""
    rows = []
    for k, name in enumerate(classes):
        rows.append({title: name} | {column: values[k] for column, values in columns.items()})
    return Table([Column(title, title, str, "text"), *(Column(column, column) for column in columns)], rows)


def time_table(summary: Summary) -> Table:
    """How long each step took, without the start of its program, which takes some seconds."""
    runs = summary.runs | {f"{name}, fully supervised": run for name, run in summary.bound_runs.items()}
    finished = {name: run for name, run in runs.items() if run.finished}
    rows: list[Row] = [{"name": name, "device": run.device, "seconds": run.seconds} for name, run in finished.items()]
    rows.append({"name": "all", "device": "", "seconds": sum(run.seconds for run in finished.values())})
    columns = [Column("made", "name", str, "text"), Column("device", "device", str, "text")]
    return Table([*columns, Column("seconds", "seconds", "{:.0f}".format)], rows)


def notes(summary: Summary) -> list[str]:
    """What stands under the table: protocol, classes in the mean, what the paper gives, seed, backbone, stand-ins."""
    left_out = summary.dataset.left_out_of_mean
    without = f"; left out: {', '.join(left_out)}" if left_out else ""
    lines = [
        f"Protocol of the scores: {summary.protocol}. mIoU and mean F1 over "
        f"{summary.dataset.num_classes - len(left_out)} classes{without}. All in per cent."
    ]
    if not summary.dataset.paper:
        lines.append("The paper gives no figure for this data set.")
    facts = "; ".join(f"{title}: {', '.join(values)}" for title, values in summary.facts.items())
    lines.append(f"Made with {facts}." if facts else "How it was made is not recorded.")
    return lines


def markdown(summary: Summary) -> str:
    """The tables, and the lines that say what they rest on."""
    parts = [f"{summary.dataset.title}, experiment {summary.name}"]
    parts += [_markdown(make(summary)) for make in (score_table, class_table, share_table, time_table)]
    parts.append("\n".join(f"- {line}" for line in [*notes(summary), *summary.warnings]))
    return "\n\n".join(parts)


def _markdown(table: Table) -> str:
    rules = {"text": "---", "number": "---:", "headline": "---:"}
    lines = [[column.title for column in table.columns], [rules[column.style] for column in table.columns]]
    lines += [[column.cell(row) for column in table.columns] for row in table.rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def write_scores(folder: Path, summary: Summary) -> None:
    """Write scores.json, scores.md and scores.csv (a row for each scored stage; an undefined score is empty)."""
    write_json(folder / "scores.json", summary.content())
    with write_whole(folder / "scores.md") as temporary:
        temporary.write_text(markdown(summary) + "\n", encoding="utf-8")
    facts = ("experiment", "stage", "split", "images", "partial")
    keys = [*facts, *(column.key for column in score_columns(summary.dataset) if column.show is percent)]
    of_classes = ("iou", "f1", "precision", "recall", "support", "truth_share", "predicted_share")
    titles = keys + [f"{score}_{name}" for score in of_classes for name in summary.dataset.classes]
    with write_whole(folder / "scores.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(titles)
        for row in summary.rows:
            values = [row[key] for key in keys]
            for score in of_classes:
                values += row[score]
            writer.writerow(values)
