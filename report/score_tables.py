"""The scores of an experiment as tables: for the report, as Markdown, as csv and as JSON."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from report.summary import Summary, percent, plain
from tools.dataset import Dataset
from tools.files import write_json, write_whole
from tools.review import Review


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, and `cell`, the text of its cell in a row of the table."""

    title: str
    cell: Callable[[Any], str]
    style: Literal["text", "number", "headline"] = "number"  # of its cells; the headline stands in bold
    key: str = (
        ""  # of the value in `Summary.rows` that scores.csv shows in a column of this name; "": not in scores.csv
    )
    shown: bool = True  # in the page and in scores.md


@dataclass(frozen=True)
class Table:
    """Columns and rows. `references`: rows to compare with, which stand in grey below the others."""

    columns: list[Column]
    rows: Sequence[Any]
    references: Sequence[Any] = ()


def score_columns(dataset: Dataset) -> list[Column]:
    """The columns of the main table in the page, in scores.md and in scores.csv: one line for each.

    A cell is made from one of `Summary.rows` with the entries that `score_table` adds.
    """
    return [
        _text("stage", "name"),
        _text("split", "split"),
        _score("mIoU", "miou", style="headline"),
        _score("share of supervised", "share_of_supervised"),
        Column("paper: mIoU", lambda row: row["paper_miou"], shown=bool(dataset.paper)),
        Column("paper: share", lambda row: row["paper_share"], shown=bool(dataset.paper)),
        _score(f"mIoU, all {dataset.num_classes} classes", "miou_all_classes", shown=bool(dataset.left_out_of_mean)),
        _score("mean F1", "mean_f1"),
        _score("overall accuracy", "overall_accuracy"),
        _score("kappa", "kappa"),
        Column("images", lambda row: str(row["images"])),
    ]


def _text(title: str, key: str) -> Column:
    return Column(title, lambda row: row[key], style="text")


def _score(title: str, key: str, **others: Any) -> Column:
    """A score of `Summary.rows`, in per cent; in scores.csv a fraction."""
    return Column(title, lambda row: percent(row.get(key)), key=key, **others)


def score_table(summary: Summary) -> Table:
    """The main table, a row for each scored stage; the paper's figures stand at the last one and at the bound."""
    paper = summary.dataset.paper
    results = [row for row in summary.rows if row["split"] == "test" and not row["is_bound"]]
    rows, references = [], []
    for row in summary.rows:
        published = {"paper_miou": "not published", "paper_share": "not published"}
        if paper and results and row is results[-1]:
            published = {"paper_miou": f"{paper['miou']:.2f}", "paper_share": f"{paper['share_of_supervised']:.2f}"}
        elif paper and row["is_bound"] and row["split"] == "test":
            published = {"paper_miou": f"{paper['supervised']:.2f} (implied)", "paper_share": "100"}
        marks = [word for word, holds in (("partial", row["partial"]), ("older", row["stale"])) if holds]
        name = f"{row['title']} ({', '.join(marks)})" if marks else row["title"]
        rows.append(row | published | {"name": name})
    for split, row in summary.constant.items():
        name = f"every pixel {row['class']}, the most frequent class"
        references.append(row | {"name": name, "split": split, "paper_miou": "–", "paper_share": "–"})
    return Table([column for column in score_columns(summary.dataset) if column.shown], rows, references)


def class_table(summary: Summary) -> Table:
    """IoU of every class in each scored stage; the rows are class ids."""
    columns = [Column("IoU", summary.class_title, style="text")]
    columns += [_of_classes(f"{row['title']}, {row['split']}", summary.class_ious(row)) for row in summary.rows]
    return Table(columns, range(summary.dataset.num_classes))


def share_table(summary: Summary) -> Table:
    """Share of each class of the labelled pixels, in the truth and in the last stage of each split."""
    columns = [Column("share of pixels", lambda k: summary.dataset.classes[k], style="text")]
    for row in summary.last.values():
        columns.append(_of_classes(f"truth, {row['split']}", row["truth_share"]))
        columns.append(_of_classes(f"{row['title']}, {row['split']}", row["predicted_share"]))
    return Table(columns, range(summary.dataset.num_classes))


def _of_classes(title: str, values: Sequence[float | None]) -> Column:
    """A column whose rows are class ids, from the value of each class."""
    return Column(title, lambda k: percent(values[k]))


def time_table(summary: Summary) -> Table:
    """How long each step took, without the start of its program, which takes some seconds."""
    runs = summary.experiment.runs | {f"{name}, fully supervised": run for name, run in summary.bound_runs.items()}
    finished = {name: run for name, run in runs.items() if run.finished}
    rows = [{"name": name, "device": run.device, "seconds": f"{run.seconds:.0f}"} for name, run in finished.items()]
    rows.append({"name": "all", "device": "", "seconds": f"{sum(run.seconds for run in finished.values()):.0f}"})
    seconds = Column("seconds", lambda row: row["seconds"])
    return Table([_text("made", "name"), _text("device", "device"), seconds], rows)


def label_table(review: Review) -> Table:
    """How well the classifier ranks the patches by each class."""
    columns = [
        Column("class", lambda row: row.name, style="text"),
        Column("patches with it", lambda row: str(row.patches)),
        Column("average precision", lambda row: percent(plain(row.average_precision))),
    ]
    return Table(columns, review.classes)


def doubt_table(review: Review) -> Table:
    """The image-level labels that the classifier contradicts most."""
    columns = [
        Column("patch", lambda doubt: doubt.id, style="text"),
        Column("class", lambda doubt: doubt.name, style="text"),
        Column("label", lambda doubt: "present" if doubt.labelled else "absent", style="text"),
        Column("probability", lambda doubt: percent(doubt.probability)),
    ]
    return Table(columns, review.doubts)


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
    parts = [f"{summary.dataset.title}, experiment {summary.experiment.name}"]
    parts += [_markdown(make(summary)) for make in (score_table, class_table, share_table, time_table)]
    parts.append("\n".join(f"- {line}" for line in [*notes(summary), *summary.warnings]))
    return "\n\n".join(parts)


def _markdown(table: Table) -> str:
    rules = {"text": "---", "number": "---:", "headline": "---:"}
    titles = [_escaped(column.title) for column in table.columns]
    lines = [titles, [rules[column.style] for column in table.columns]]
    for row in (*table.rows, *table.references):
        lines.append([_escaped(column.cell(row)) for column in table.columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def write_scores(folder: Path, summary: Summary) -> None:
    """Write scores.json, scores.md and scores.csv (a row for each scored stage; an undefined score is empty)."""
    write_json(folder / "scores.json", summary.content())
    with write_whole(folder / "scores.md") as temporary:
        temporary.write_text(markdown(summary) + "\n", encoding="utf-8")
    facts = ("experiment", "stage", "split", "images", "partial")
    keys = [*facts, *(column.key for column in score_columns(summary.dataset) if column.key)]
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
