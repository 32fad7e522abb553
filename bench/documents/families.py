"""What the conformance lane found (`make families` writes `bench/results/families.csv`): counts, and a table of refusals."""

import csv
import functools
import re
from collections import defaultdict
from dataclasses import dataclass

from jactus_kernels import JactusError

from .. import report
from .tables import RESULTS

FILE = RESULTS / "families.csv"
# The kinds of refusals, by what their messages say; the first that is found names it.
REFUSALS = (
    ("weights of experts in one tensor", r"fused expert weights|three-dimensional weight"),
    (
        "a layer whose weight is read by another module, or whose forward is gone around",
        "not used by its forward alone",
    ),
    ("padding that cannot be told from tokens", "cannot be told from padding|attention mask is"),
    ("a loss that is no sum over examples", "no sum and no mean|cannot be cut into examples|another at a second call"),
    ("layers that the loss does not use", "was never called|no gradient reached|and the loss depends on"),
    ("no linear layers to compress", "no module of"),
    ("linear layers of a kind of their own", "not a plain Linear|shares its weight|also reachable as"),
    ("layers that no signal reaches", "no signal reached this layer"),
    ("inputs overwritten in place", "overwrites the layer's input"),
)


@dataclass(frozen=True)
class Entry:
    """One architecture and task, or one special input, and what became of it."""

    name: str
    kind: str
    result: str
    reason: str
    notes: str

    @property
    def family(self) -> str:
        """The model type."""
        return self.name.partition(":")[2]


@functools.cache
def entries() -> list[Entry]:
    """The rows of the last run. Raises JactusError where it was never run."""
    if not FILE.exists():
        raise JactusError(f"{FILE} is not there; run make families")
    with FILE.open(newline="", encoding="utf-8") as file:
        return [Entry(**row) for row in csv.DictReader(file)]


def counted(what: str) -> str:
    """'tried', 'exact', 'refused' or 'types': how many."""
    of = [e for e in entries() if not e.name.startswith("kind:")]
    tried = [e for e in of if e.result != "not tried"]
    if what == "types":
        return str(len({e.family for e in tried}))
    if what == "tried":
        return str(len(tried))
    if what == "exact types":
        refused = {e.family for e in tried if e.result != "exact"}
        return str(len({e.family for e in tried} - refused))
    return str(sum(e.result == what for e in of))


def refusals() -> str:
    """For each kind of refusal how many entries it is of, and which model types; in most the rest was judged, and exact."""
    by_kind: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries():
        if entry.result == "refused" and not entry.name.startswith("kind:"):
            named = (kind for kind, pattern in REFUSALS if re.search(pattern, entry.reason))
            by_kind[next(named, "other reasons")].append(entry)
    found = []
    for kind, of in sorted(by_kind.items(), key=lambda pair: -len(pair[1])):
        rest = sum("all steps" in e.notes for e in of)
        types = sorted({e.family for e in of})
        shown = ", ".join(types[:12]) + (f" and {len(types) - 12} more" if len(types) > 12 else "")
        found.append((kind, str(len(of)), str(rest), shown))
    return report.table(("refused", "entries", "exact without those layers", "model types"), found)


def exact() -> str:
    """The model types of which every entry is exact."""
    tried = [e for e in entries() if e.result != "not tried" and not e.name.startswith("kind:")]
    some = {e.family for e in tried if e.result != "exact"}
    return "Exact in every entry: " + ", ".join(sorted({e.family for e in tried} - some)) + "."


def block() -> str:
    """The part of docs/limits.md that the lane writes."""
    sentence = (
        f"`make families` runs {counted('tried')} architectures and tasks of {counted('types')} model types of the installed "
        f"transformers, made tiny, from calibration to a merged model, against an independent computation in float64: "
        f"{counted('exact')} are exact in every step, {counted('refused')} are refused in some layer or input by name, and none "
        f"is wrong. [All of them](../{FILE.with_suffix('.md').as_posix()})."
    )
    return "\n\n".join([sentence, refusals(), exact()])
