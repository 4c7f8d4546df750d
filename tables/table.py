"""A table of results: Markdown for reading, csv with every seed's value, a figure."""

import csv
import statistics
import textwrap
from pathlib import Path

import numpy as np

from tools.files import write_whole

Lines = dict[str, dict[str, list[float]]]  # row -> column -> one value in per cent for each seed
SHARE = "share of fully supervised"  # a column that is no mIoU, so not drawn
HATCHES = ("", "//", "..", "xx", "\\\\")


def show(values: list[float]) -> str:
    """The mean, with several values followed by their standard deviation."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def write_table(path: Path, title: str, caption: str, lines: Lines, seeds: tuple[int, ...], paper: dict) -> str:
    """Write <path>.md, .csv and .png -> the Markdown. `paper`: row -> what the paper gives for it."""
    columns = list(dict.fromkeys(column for values in lines.values() for column in values))
    text = [f"# {title}", "", caption, "", f"| | {' | '.join(columns)} | paper |", "|---" * (len(columns) + 2) + "|"]
    for name, values in lines.items():
        cells = [show(values.get(column, [])) for column in columns]
        text.append(f"| {name} | " + " | ".join(cells) + f" | {paper.get(name, 'not published')} |")
    markdown = "\n".join(text) + "\n"
    with write_whole(path.with_suffix(".md")) as temporary:
        temporary.write_text(markdown, encoding="utf-8")
    with write_whole(path.with_suffix(".csv")) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "column", *(f"seed {seed}" for seed in seeds)])
        writer.writerows(
            [name, column, *(f"{value:.3f}" for value in found)]
            for name, values in lines.items()
            for column, found in values.items()
        )
    _draw(path.with_suffix(".png"), title, lines, [column for column in columns if column != SHARE])
    return markdown


def _draw(path: Path, title: str, lines: Lines, columns: list[str]) -> None:
    """Grouped bars: one group for each row, one bar for each column, standard deviation as whiskers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 1.6 * len(lines)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(columns)
    for index, column in enumerate(columns):
        found = [values.get(column, []) for values in lines.values()]
        axes.bar(
            np.arange(len(found)) + index * width,
            [statistics.mean(v) if v else np.nan for v in found],
            width,
            yerr=[statistics.stdev(v) if len(v) > 1 else 0 for v in found],
            label=column,
            hatch=HATCHES[index % len(HATCHES)],
        )
    names = [textwrap.fill(name, 20) for name in lines]
    axes.set_xticks(np.arange(len(lines)) + 0.4 - width / 2, names, fontsize=8)
    axes.set_ylabel("mIoU (%)")
    axes.set_title(title)
    axes.legend(fontsize=8)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
