"""A table of results: Markdown for reading, csv with every seed's value, a figure."""

import csv
import statistics
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tools.files import write_whole

SHARE = "share of fully supervised"  # a column that is no mIoU, so not drawn
HATCHES = ("", "//", "..", "xx", "\\\\")


@dataclass
class Table:
    """The values of a table in per cent: row -> column -> one value for each seed."""

    rows: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, row: str, column: str, value: float) -> None:
        """Add the value of the next seed."""
        self.rows.setdefault(row, {}).setdefault(column, []).append(value)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for cells in self.rows.values() for column in cells))


def show(values: list[float]) -> str:
    """The mean, with several values followed by their standard deviation."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0


def write_table(
    path: Path, title: str, caption: str, table: Table, seeds: tuple[int, ...], published: dict[str, str]
) -> str:
    """Write <path>.md, .csv and .png -> the Markdown. `published`: row -> what the paper gives for it."""
    columns = table.columns
    text = [f"# {title}", "", caption, "", f"| | {' | '.join(columns)} | paper |", "|---" * (len(columns) + 2) + "|"]
    for row, cells in table.rows.items():
        values = [show(cells.get(column, [])) for column in columns]
        text.append(f"| {row} | {' | '.join(values)} | {published.get(row, 'not published')} |")
    markdown = "\n".join(text) + "\n"
    with write_whole(path.with_suffix(".md")) as temporary:
        temporary.write_text(markdown, encoding="utf-8")
    with write_whole(path.with_suffix(".csv")) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "column", *(f"seed {seed}" for seed in seeds)])
        for row, cells in table.rows.items():
            for column, values_of_seeds in cells.items():
                writer.writerow([row, column, *(f"{value:.3f}" for value in values_of_seeds)])
    _draw(path.with_suffix(".png"), title, table)
    return markdown


def _draw(path: Path, title: str, table: Table) -> None:
    """Grouped bars: one group for each row, one bar for each column, standard deviation as whiskers."""
    from matplotlib.figure import Figure

    columns = [column for column in table.columns if column != SHARE]
    figure = Figure(figsize=(max(6, 1.6 * len(table.rows)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(columns)
    groups = np.arange(len(table.rows))
    for index, column in enumerate(columns):
        values = [cells.get(column, []) for cells in table.rows.values()]
        means = [statistics.mean(seeds or [np.nan]) for seeds in values]
        spreads = [_deviation(seeds) for seeds in values]
        hatch = HATCHES[index % len(HATCHES)]
        axes.bar(groups + index * width, means, width, yerr=spreads, label=column, hatch=hatch)
    names = [textwrap.fill(name, 20) for name in table.rows]
    axes.set_xticks(groups + 0.4 - width / 2, names, fontsize=8)
    axes.set_ylabel("mIoU (%)")
    axes.set_title(title)
    axes.legend(fontsize=8)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
