"""What a person sees: lines on stderr while it runs, and one result on stdout."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table


def say(text: str) -> None:
    """A line on stderr."""
    # made anew each time: stderr may have been redirected since
    Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(text)


def table(title: str, *headers: str) -> Table:
    """An empty table; columns after the first are figures."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for place, header in enumerate(headers):
        made.add_column(header, justify="right" if place else "left")
    return made


class Findings(logging.Handler):
    """Keeps what the package says while it works, and shows its warnings."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []
        self.file: Path | None = None

    @contextmanager
    def into(self, file: Path) -> Iterator[None]:
        """Keep what is said meanwhile in `file` too, after what a run that was stopped had said there."""
        self.said = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.file = file
        try:
            yield
        finally:
            self.file = None

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            say(f"note: {text}")
        self.said.append(text)
        if self.file is not None:
            with suppress(OSError), self.file.open("a", encoding="utf-8") as out:  # a full disk stops the run elsewhere
                print(*text.splitlines(), file=out)


@contextmanager
def quiet() -> Iterator[Findings]:
    """Only the result goes to stdout; transformers says errors alone; what the package says is kept."""
    from transformers.utils import logging as transformers_logging

    logger, findings = logging.getLogger("jactus"), Findings()
    level, propagates = logger.level, logger.propagate
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    logger.addHandler(findings)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stdout(sys.stderr):
            yield findings
    finally:
        logger.removeHandler(findings)
        logger.setLevel(level)
        logger.propagate = propagates
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
