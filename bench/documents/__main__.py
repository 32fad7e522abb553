"""Every figure in the documents is written there from the rows it comes from: `python -m bench.documents`.

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`, with NAME of `blocks.BLOCKS`; a figure in prose between
`<!--=KIND WORD WORD-->` and `<!--/-->`, with KIND of `figures.KINDS`. Both marks are invisible once rendered. The figures are
cells of the full tables, which the command writes as well (`tables.FULL`): so a reader finds each of them there, and each of
those in the rows. `--check` writes nothing and says what differs.
"""

import argparse

from .marks import differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file would change")
    args = parser.parse_args()
    changed = list(differences())
    for file, text in changed:
        print(f"{file}: {'differs from its rows' if args.check else 'written'}")
        if not args.check:
            file.write_text(text, encoding="utf-8")
    if args.check and changed:
        raise SystemExit("run python -m bench.documents")


if __name__ == "__main__":
    main()
