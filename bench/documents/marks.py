"""Documents and the marks in them."""

import re
from collections.abc import Iterator
from pathlib import Path

from jactus_kernels import JactusError

from .blocks import BLOCKS
from .figures import figure
from .tables import FULL, RESULTS, full

DOCUMENTS = ("README.md", "LOG.md", "CHANGELOG.md", "CONTRIBUTING.md", *sorted(map(str, Path("docs").rglob("*.md"))))

CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
BLOCK = re.compile(r"(<!-- begin: (\S+) -->\n?).*?(<!-- end: (\S+) -->)", re.DOTALL)
MARK = re.compile(r"<!--=(.*?)-->.*?<!--/-->", re.DOTALL)


def rewritten(text: str) -> str:
    """A document with every table and figure as it should be; what is in code stays as it is.

    Raises JactusError for a block or mark whose name is not known, or which is not closed.
    """
    code: list[str] = []

    def aside(found: re.Match) -> str:
        code.append(found[0])
        return f"\0{len(code) - 1}\0"

    def block(found: re.Match) -> str:
        begin, name, end, closed = found.groups()
        if name != closed:
            raise JactusError(f"a block begins as {name!r} and ends as {closed!r}")
        if name not in BLOCKS:
            raise JactusError(f"there is no block {name!r}, but {sorted(BLOCKS)}")
        return f"{begin}\n{BLOCKS[name]()}\n\n{end}"

    text = CODE.sub(aside, text)
    if len(BLOCK.findall(text)) != len(re.findall("<!-- begin:", text)):
        raise JactusError("a block is not closed: <!-- begin: NAME --> … <!-- end: NAME -->")
    text = BLOCK.sub(block, text)
    text = MARK.sub(lambda found: f"<!--={found[1]}-->{figure(found[1])}<!--/-->", text)
    if len(re.findall("<!--=", text)) != len(re.findall("<!--/-->", text)):
        raise JactusError("a mark is not closed: <!--=NAME-->value<!--/-->")
    return re.sub("\0(\\d+)\0", lambda found: code[int(found[1])], text)


def differences() -> Iterator[tuple[Path, str]]:
    """Every file that is not as it should be, and how it should be."""
    wanted = {RESULTS / name: full(name) for name in FULL}
    wanted |= {Path(name): rewritten(Path(name).read_text(encoding="utf-8")) for name in DOCUMENTS}
    for file, text in wanted.items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            yield file, text
