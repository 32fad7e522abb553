"""Documents say what the rows say, within their length, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

import jactus
from bench import report
from bench.documents import blocks, figures, marks, tables
from bench.documents.marks import BLOCK, CODE, DOCUMENTS, MARK, rewritten
from jactus import JactusError

LENGTHS = {"README.md": 150, "docs/accuracy.md": 220, "docs/cost.md": 200, "docs/kernels.md": 240}
TYPED = ("LOG.md", "CHANGELOG.md", "docs/reproduce-paper.md")  # a log, and the paper's own figures
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SKIPPED = re.compile(r"\]\([^)]*\)|arXiv[\s:]\d+\.\d+|Python \d+\.\d+|https?://\S+")


def text_of(name):
    return Path(name).read_text(encoding="utf-8")


def test_every_file_is_what_the_command_would_write():
    assert [str(file) for file, _ in marks.differences()] == [], "run python -m bench.documents"


def test_a_figure_that_was_changed_by_hand_is_put_right():
    assert (
        rewritten("by <!--=pairs-lead jactus@80% lora-->+7<!--/-->.")
        == "by <!--=pairs-lead jactus@80% lora-->+0.71 ± 0.27<!--/-->."
    )


def test_a_table_is_written_between_its_marks_and_nothing_else_changes():
    text = rewritten("a\n\n<!-- begin: demo -->\nby hand\n<!-- end: demo -->\n\n`<!--=x-->` b")
    assert "by hand" not in text
    assert "| JACTUS 80%" in text
    assert text.startswith("a\n\n<!-- begin: demo -->\n")
    assert text.endswith("<!-- end: demo -->\n\n`<!--=x-->` b")


@pytest.mark.parametrize(
    "text, said",
    [
        ("<!--=nothing-->1<!--/-->", "of kind 'nothing'"),
        ("<!--=lead jactus@80%-->1<!--/-->", "too many or too few"),
        ("<!--=lead jactus@81% lora-->1<!--/-->", "0 rows"),
        ("<!--=lead jactus@80% lore-->1<!--/-->", "nothing under 'lore'"),
        ("<!--=text jactus@80% mean before-->1<!--/-->", "no arrow"),
        ('<!--=ratio "Training step" model=vit-b-->1<!--/-->', "rows"),
        ('<!--=ratio "Training step" colour=red-->1<!--/-->', "colour"),
        ("<!--=lead jactus@80% lora-->1", "not closed"),
        ("<!-- begin: nothing -->\n<!-- end: nothing -->", "no block 'nothing'"),
        ("<!-- begin: demo -->\n<!-- end: text -->", "ends as 'text'"),
        ("<!-- begin: demo -->\n", "not closed"),
    ],
)
def test_a_mark_that_stands_for_nothing_is_refused(text, said):
    with pytest.raises(JactusError, match=said):
        rewritten(text)


def test_a_tables_cells_stand_under_their_headers():
    """A first header may be empty, and must not shift the others."""
    for name in tables.FULL:
        for heading, lines in tables.tables(name).items():
            header = next(x for x in tables.full(name).split(heading, 1)[1].splitlines() if x.startswith("|"))
            assert len(lines[0]) == len(header.strip()[1:-1].split("|")), f"{name}, {heading}"


@pytest.mark.parametrize("name, most", LENGTHS.items())
def test_a_document_is_no_longer_than_its_reader_reads(name, most):
    assert len(text_of(name).splitlines()) <= most


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_mark_begins_no_line_since_markdown_would_take_the_rest_for_html(name):
    wrong = [line for line in text_of(name).splitlines() if re.match(r"\s*(?:[-*>]\s+|\d+\.\s+)?<!--=", line)]
    assert wrong == []


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name not in TYPED])
def test_no_decimal_figure_stands_in_prose_without_a_mark(name):
    text = text_of(name)
    for pattern in (CODE, BLOCK, MARK, SKIPPED):
        text = pattern.sub("", text)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("    "))  # code too
    found = [line for line in text.splitlines() if re.search(r"(?<![\w.])\d+\.\d+", line)]
    assert found == [], "mark it, or put a setting in backticks"


def anchors(name):
    """What GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(name), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_to_files_and_headings(name):
    dead = []
    for target in LINK.findall(CODE.sub("", text_of(name))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = Path(name).parent / path if path else Path(name)
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


def test_a_table_of_pictures_has_what_is_measured(monkeypatch):
    heading = f"### {figures.SHORT['pictures'][1]}\n\n"
    full = heading + report.table(("method", *blocks.PICTURES_COLUMNS), [("lora", *"12345678901")])
    for text, expected in ((full, "| lora "), ("", "No row is measured yet.")):
        monkeypatch.setattr(tables, "full", lambda name, text=text: text)
        tables.tables.cache_clear()
        assert expected in blocks.so_far("pictures", blocks.PICTURES_SHOWN, blocks.PICTURES_COLUMNS)
    tables.tables.cache_clear()


def test_modifiers_take_a_part_of_a_cell():
    whole = figures.figure("perplexity svd-llm+lora@80% wikipedia")
    assert " → " in whole
    after = figures.figure("perplexity svd-llm+lora@80% wikipedia after")
    assert whole.endswith(after)
    assert figures.figure("perplexity svd-llm+lora@80% wikipedia after bare") == after.split(" ± ")[0]
    assert figures.figure("perplexity svd-llm+lora@80% wikipedia after bare .1") == f"{float(after.split()[0]):.1f}"


def test_what_the_documents_name_exists():
    """`jactus.something` in a document is in the package's public interface."""
    if not hasattr(jactus, "Budget"):
        pytest.skip("the documents are of the grouped options")
    named = {
        word
        for name in DOCUMENTS
        if name not in TYPED
        for word in re.findall(r"\bjactus\.([A-Za-z_]+)\(", text_of(name))
    }
    assert {word for word in named if not hasattr(jactus, word)} == set()
