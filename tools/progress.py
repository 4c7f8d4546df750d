"""Progress: a bar in a terminal, one line a minute in a log file."""

import sys
from typing import Any

from tqdm import tqdm

LINE_EVERY = 60  # seconds between two lines of a log file


class Progress(tqdm):
    """A tqdm bar that writes whole lines where stderr is no terminal; silent where `shown` is False."""

    def __init__(self, total: int, what: str, unit: str = "image", initial: int = 0, shown: bool = True):
        self.in_terminal = sys.stderr.isatty()
        self.extra = ""
        super().__init__(
            total=total,
            desc=what,
            unit=unit,
            initial=initial,
            disable=not shown,
            file=sys.stderr,
            mininterval=0.1 if self.in_terminal else LINE_EVERY,
            miniters=None if self.in_terminal else 1,
            leave=self.in_terminal,
            delay=0 if self.in_terminal else LINE_EVERY,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:  # tqdm: whether a line was written
        if self.in_terminal:
            return super().display(msg, pos)
        if self.n == self.initial:
            return False
        state = self.format_dict
        rate = state["rate"] or (self.n - self.initial) / max(state["elapsed"], 1e-9)
        left = tqdm.format_interval((state["total"] - self.n) / max(rate, 1e-9))
        extra = f", {self.extra}" if self.extra else ""
        units = f"{self.unit}es" if self.unit.endswith("ch") else f"{self.unit}s"
        what = self.desc.removesuffix(": ")  # tqdm adds the colon when the text is set again
        print(f"{what}: {self.n}/{self.total}, {rate:.3g} {units} a second, {left} left{extra}", file=self.fp)
        self.fp.flush()
        return True

    def note(self, text: str) -> None:
        """Show a short text, such as the loss, behind the figures."""
        self.extra = text
        if self.in_terminal:
            self.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        if not self.in_terminal:
            self.disable = True  # no last line: the step says itself what was made
        super().close()
