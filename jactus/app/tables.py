"""Files of rows as columns: CSV, TSV, JSON, JSONL, Parquet, plain text, or a name for the `datasets` library."""

import json
import warnings
from pathlib import Path
from typing import Any

from jactus_kernels import JactusError

from .guess import Columns

READ = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt")
VALIDATION = ("validation", "valid", "val", "dev", "test")


def read(data: str) -> tuple[Columns, Columns | None, str]:
    """The columns of the training rows, of the validation rows where the data has them apart, and how it was read.

    Missing values are None. Raises JactusError for what cannot be read, with the row, and what to install.
    """
    path = Path(data)
    if path.suffix.lower() not in READ and not path.exists():
        return _from_datasets(data)
    if not path.is_file():
        raise JactusError(f"there is no file {data}")
    return {**from_file(path)}, None, _how(path)


def from_file(path: Path) -> Columns:
    """The columns of one file. Raises JactusError as `read`."""
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            columns = _separated(path, "," if kind == ".csv" else "\t")
        elif kind in (".json", ".jsonl", ".ndjson"):
            columns = _json(path, lines=kind != ".json")
        elif kind == ".parquet":
            columns = _parquet(path)
        elif kind == ".txt":
            columns = {"text": list(_documents(path)[0])}
        else:
            raise JactusError(f"{path} ends in {kind or 'nothing'}; what can be read ends in {', '.join(READ)}")
    except UnicodeDecodeError as e:
        raise JactusError(f"{path} is not text in UTF-8 ({e}); save it so") from e
    except OSError as e:
        raise JactusError(f"{path} cannot be read: {e}") from e
    if not columns or not next(iter(columns.values())):
        raise JactusError(f"{path} has no rows")
    return columns


def _how(path: Path) -> str:
    if path.suffix.lower() != ".txt":
        return path.suffix.lower().lstrip(".").upper()
    return "plain text, a document " + ("between blank lines" if _documents(path)[1] else "a line (no blank lines)")


def _documents(path: Path) -> tuple[list[str], bool]:
    """The documents of a text file, and whether blank lines part them."""
    whole = path.read_text(encoding="utf-8").replace("\r\n", "\n").strip("\n")
    parts = [part.strip() for part in whole.split("\n\n")]
    if len([part for part in parts if part]) > 1:
        return [part for part in parts if part], True
    return [line for line in whole.split("\n") if line], False


def needs(name: str, what: str) -> Any:
    """An optional library. Raises JactusError saying what to install."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise JactusError(f'{what} needs {name}, which is not installed: pip install "jactus-kernels[fit]"') from e


def _separated(path: Path, by: str) -> Columns:
    pandas = needs("pandas", f"reading {path.name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # of cells that would be left out
        try:
            # as written: pandas would take the word NA for nothing at all
            frame = pandas.read_csv(path, sep=by, dtype=str, na_filter=False, index_col=False, encoding="utf-8-sig")
        except (pandas.errors.ParserError, pandas.errors.ParserWarning, pandas.errors.EmptyDataError) as e:
            raise JactusError(
                f"{path} is not a table with a header and as many cells in each row: {' '.join(str(e).split())}"
            ) from e
    return {str(name): [v or None for v in frame[name].tolist()] for name in frame.columns}


def _json(path: Path, lines: bool) -> Columns:
    written = path.read_text(encoding="utf-8-sig")
    rows: Any = []
    number = 0
    try:
        if lines:
            for number, line in enumerate(written.splitlines(), 1):  # noqa: B007 (read where one is not JSON)
                if line.strip():
                    rows.append(json.loads(line))
        else:
            rows = json.loads(written)
    except ValueError as e:
        where = f", line {number}," if lines else ""
        raise JactusError(f"{path}{where} is not JSON: {e}") from e
    if not isinstance(rows, list):
        raise JactusError(f"{path} holds a {type(rows).__name__}; a list of objects is needed, one a row")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise JactusError(f"{path}, row {number} is a {type(row).__name__}; an object is needed")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _parquet(path: Path) -> Columns:
    pandas = needs("pandas", f"reading {path.name}")
    needs("pyarrow", f"reading {path.name}")
    try:
        return _plain(pandas.read_parquet(path))
    except (ValueError, OSError) as e:
        raise JactusError(f"{path} is not a Parquet file that can be read: {e}") from e


def _plain(frame: Any) -> Columns:
    whole = frame.astype(object).where(frame.notna(), None)
    return {str(name): whole[name].tolist() for name in frame.columns}


def _from_datasets(name: str) -> tuple[Columns, Columns | None, str]:
    try:
        import datasets
    except ImportError as e:
        raise JactusError(
            f"there is no file or folder {name}; if it is a data set of the hub, pip install datasets to read it by name"
        ) from e
    try:
        parts = datasets.load_dataset(name)
    except Exception as e:
        raise JactusError(f"{name} is neither a file or folder nor a data set that is found: {e}") from e
    if "train" not in parts:
        raise JactusError(f"the data set {name} has the splits {', '.join(parts)}; one called train is needed")
    held_out = next((split for split in VALIDATION if split in parts), None)
    train = _split(datasets, parts["train"])
    return train, _split(datasets, parts[held_out]) if held_out else None, f"data set {name}"


def _split(datasets: Any, part: Any) -> Columns:
    columns: Columns = {column: list(part[column]) for column in part.column_names}
    for column, feature in part.features.items():
        if isinstance(feature, datasets.ClassLabel):  # -1 is how the library writes that there is none
            columns[column] = [feature.names[v] if v is not None and v >= 0 else None for v in columns[column]]
    return columns
