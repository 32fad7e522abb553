"""Tables in the documents: rows and columns of the full ones, or several side by side."""

import csv
import functools
import re
from collections.abc import Callable, Sequence

from .. import report
from ..accuracy.tasks import PICTURES
from ..questions import SETS
from . import families
from .figures import SHORT, demo_of, matching, span
from .tables import RESULTS, Line, one_line, one_table, tables

COMPILED = RESULTS / "kernels-static-triton-3.8.0.csv"


def selected(name: str, heading: str, methods: Sequence[str], columns: Sequence[str]) -> str:
    """Some rows and columns of a full table."""
    lines = one_table(name, heading)
    chosen = [one_line(lines, method) for method in methods]
    first = next(iter(lines[0]))
    return report.table((first, *columns), [[line[first], *(line[c] for c in columns)] for line in chosen])


NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "dora": "DoRA",
    "jactus": "JACTUS",
    "svd-llm+lora": "SVD-LLM, then LoRA",
}
HEADLINE = ("full", "lora", "dora", "jactus 80%", "svd-llm+lora 80%", "jactus 50%", "jactus 35%", "svd-llm+lora 35%")


def headline() -> str:
    """The README's one table: text, images, questions and language side by side."""
    kinds = "text", "pictures", "questions", "perplexity"
    text, images, questions, language = (one_table("accuracy.md", SHORT[kind][1]) for kind in kinds)

    def at(lines: list[Line], method: str, column: str) -> str:
        line = next((x for x in lines if next(iter(x.values())) == method), {})
        return line.get(column, "–").split(" → ")[-1].replace(" (1 seed)", " ¹")

    found = []
    for method in HEADLINE:
        name, _, budget = method.partition(" ")
        scores = (at(text, method, "mean"), at(text, method, "− LoRA, paired"), at(images, method, "mean"))
        size = (at(text, method, "deployed"), at(text, method, "trainable"))
        others = (at(questions, method, "mean"), at(language, method, "wikipedia"))
        found.append((f"{NAMES[name]} {budget}".strip(), *scores, *others, *size))
    header = (
        "method",
        "text, %",
        "− LoRA",
        "images, %",
        "questions, %",
        "perplexity (less is better)",
        "deployed",
        "trains",
    )
    return report.table(header, found)


TEXT_SHOWN = (
    "full", "full[linears]", "lora", "dora", "pissa", "corda", "eva", "eigentune",
    "jactus 80%", "svd-llm+lora 80%", "jactus 50%", "svd-llm+lora 50%", "jactus 35%", "svd-llm+lora 35%", "svd-llm-compact+lora 35%", "asvd+lora 35%", "fwsvd+lora 35%", "svd+lora 35%", "cersa 35%",
)  # fmt: skip
TEXT_COLUMNS = (
    "sarcasm",
    "movies",
    "newsgroups",
    "mean",
    "− LoRA, paired",
    "untrained",
    "deployed",
    "in training",
    "trainable",
)
PICTURES_SHOWN = ("full", "lora", "dora", "jactus 80%", "jactus[union_share=0.1] 80%", "svd-llm+lora 80%", "jactus 50%")
PICTURES_COLUMNS = (*PICTURES, "mean", "− LoRA, paired", "untrained", "deployed", "trainable")
LANGUAGE_SHOWN = ("full", "lora", "jactus 80%", "jactus[draws=0] 80%", "svd-llm+lora 80%", "jactus 50%",
                  "jactus[draws=0] 50%", "svd-llm+lora 50%")  # fmt: skip
LANGUAGE_COLUMNS = ("wikipedia", "openwebtext", "wikipedia-long", "deployed", "in training", "trainable")


QUESTIONS_SHOWN = ("full", "lora", "dora", "rslora", "hira", "jactus 80%", "svd-llm+lora 80%", "jactus 50%", "svd-llm+lora 50%",
                   "svd-llm-compact+lora 50%")  # fmt: skip


def so_far(kind: str, shown: Sequence[str], columns: Sequence[str]) -> str:
    """Some rows and columns of a full table of which not all is measured yet."""
    name, heading = SHORT[kind]
    if not any(heading in title for title in tables(name)):
        return "No row is measured yet."
    there = {next(iter(line.values())) for line in one_table(name, heading)}
    return selected(name, heading, [method for method in shown if method in there], columns)


# A default as JactusConfig has it, and what was tried instead with that setting's name in the rows.
TRIED = {
    '`metric="fisher"`': {
        "input": "metric=input",
        "gradient": "metric=gradient",
        "plain SVD": "metric=identity,union=weight,coordinates=orthonormal",
    },
    "`damping=0.01`": {"0.001": "damping=0.001", "0.1": "damping=0.1"},
    '`union=("weight", "gradient")`': {
        "covariance": "union=weight+covariance",
        "both": "union=weight+covariance+gradient",
    },
    "a tenth for the task": {"0": "union_share=0", "0.25": "union_share=0.25"},
    "`Core(width=1)`": {"2": "core_width=2.0", "2, and no share": "core_width=2.0,union_share=0"},
    "`Core(trainable_rank=None)`": {"32": "trainable_rank=32"},
    '`allocation="global"`': {"uniform": "allocation=uniform", "cores of uniform's size": "cores=uniform"},
    "`Allocation(uniform_part=0.5)`": {"0": "rank_floor=0.0", "0.8": "rank_floor=0.8"},
    '`trainable_extras=("head",)`': {
        "biases": "trainable_extras=head+bias",
        "biases, norms": "trainable_extras=head+bias+LayerNorm",
    },
    "2,000 calibration rows": {"64": "calibration=64", "512": "calibration=512"},
    "a fitted head": {"random": "head=random"},
}


def defaults() -> str:
    """What each default was compared with: the change of the trained score, paired; alternatives in their order."""
    lines = {
        budget: {x["setting"]: x for x in one_table("pairs/accuracy.md", f"at a time, {budget}: acc")}
        for budget in ("80%", "35%")
    }

    def change(budget: str, setting: str, column: str) -> str:
        text = lines[budget].get(f"jactus[{setting}]", {}).get(column, "–")
        found = re.findall(r"\(([+-][^)]*)\)", text)
        return found[-1] if found else text if re.match("[+-]", text) else "–"

    def together(settings: Sequence[str], budget: str, *columns: str) -> str:
        each = [" / ".join(change(budget, setting, column) for column in columns) for setting in settings]
        each = ["–" if set(text) <= set("–/ ") else text for text in each]
        return "–" if set(each) == {"–"} else "; ".join(each)

    both = ("mean difference", "on validation rows")
    places = (("80%", "newsgroups, trained"), ("35%", "newsgroups, trained"), ("35%", "movies, trained"),
              ("80%", *both), ("35%", *both))  # fmt: skip
    found = [
        (default, "; ".join(tried), *(together(list(tried.values()), *place) for place in places))
        for default, tried in TRIED.items()
    ]
    header = (
        "default",
        "instead",
        "newsgroups, 80%",
        "newsgroups, 35%",
        "movies, 35%",
        "all three tasks, 80%",
        "all three tasks, 35%",
    )
    return report.table(header, found)


COSTS = (
    ("training step", "Training step", "lora"),
    ("training step", "Training step", "dora"),
    ("training step", "Training step", "full"),
    ("folded, whole sequences", "Prefill", "dense"),
    ("folded, one token", "Decode", "dense"),
)
SUBJECTS = (("ViT-B's blocks", "vit-b", "4 × 197"), ("the same, 64 images", "vit-b", "64 × 197"),
            ("a Llama-7B block", "llama-7b", "2 × 128"))  # fmt: skip


def costs() -> str:
    """Time over that of what one would use instead, at 80% / 50% of the deployed size: two threads."""
    found = []
    for what, measure, against in COSTS:
        for dtype in ("float32", "bfloat16"):
            cells = []
            for _, model, batch in SUBJECTS:
                sized = "1 × 128" if measure == "Decode" else batch
                place = (f"model={model}", f"dtype={dtype}", "threads=2", f"batch={sized}", f"against={against}")
                pair = [matching("cost.md", measure, (*place, f"budget={budget}")) for budget in ("80%", "50%")]
                cells.append(" / ".join(lines[0]["ratio"].split()[0] for lines in pair) if all(pair) else "–")
            if set(cells) == {"–"}:
                continue
            where = ("threads=2", f"against={against}", "budget=80%")
            floor = span(measure, *where, column="floor") if against != "dora" else "–"
            found.append((what, against, dtype, *cells, floor))
    return report.table(("", "against", "dtype", *(name for name, _, _ in SUBJECTS), "counted, 80%"), found)


def h100_costs() -> str:
    """The same on an H100, for what was measured there."""
    found = []
    for line in one_table("h100/cost.md", "Training step"):
        if line["budget"] == "80%":
            place = "/".join(line[name] for name in ("model", "dtype", "threads", "batch"))
            half = one_line(one_table("h100/cost.md", "Training step"), f"{place}/50%/{line['against']}")
            found.append(
                (
                    line["model"],
                    line["dtype"],
                    line["batch"],
                    line["against"],
                    line["ratio"],
                    half["ratio"],
                    line["floor"],
                )
            )
    return report.table(("model", "dtype", "batch", "against", "80%", "50%", "counted, 80%"), found)


def demos(name: str, score: str, form: str) -> str:
    """A demo's methods, as it prints them."""
    return report.methods_table([report.Row(**row) for row in demo_of(name)["rows"]], score, form)


def demo_latency() -> str:
    """The main demo's forward passes, as it prints them."""
    measured = demo_of("demo")["latency"]
    return report.table(measured["header"], measured["rows"])


COMPILED_SHOWN = (
    "covariance tma", "covariance wide tma", "covariance tma split", "matmul tma A Bt + bias",
    "chain 64 h, z", "chain 128 h, z", "chain 256 h, z", "chain 256 folded", "pair 64 q, p, gC", "pair 128 q, p, gC", "gram qth",
    "sum of parts", "decode inner xV", "decode outer core 256", "decode outer folded",
)  # fmt: skip


def compiled() -> str:
    """Registers / KB of shared memory / resident blocks of the bfloat16 kernels, by family."""
    with COMPILED.open(newline="", encoding="utf-8") as file:
        facts = {(row["kernel"], row["family"]): row for row in csv.DictReader(file) if row["dtype"] == "bf16"}
    families = list(dict.fromkeys(family for _, family in facts))
    found = []
    for kernel in COMPILED_SHOWN:
        of = [facts.get((kernel, family)) for family in families]
        found.append(
            (
                kernel,
                *("–" if x is None else f"{x['registers']} / {int(x['shared']) // 1024} / {x['blocks']}" for x in of),
            )
        )
    return report.table(("kernel", *families), found)


def llama_sums() -> str:
    """Bytes that calibration of Llama-2-7B sums in float32: arithmetic on its shapes."""
    blocks, width, inner = 32, 4096, 11008
    shapes = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    inputs = blocks * (3 * width**2 + inner**2)  # q, k, v share theirs, and so do gate and up
    outputs = blocks * sum(m * m for m, _ in shapes)
    gradients = blocks * sum(m * n for m, n in shapes)
    kinds = (
        ("Σ_x, one for each distinct input (q, k, v share; gate and up share)", inputs),
        ("Σ_g, one for each layer", outputs),
        ('D, the mean gradients (`union=("weight", "gradient")` with a share only)', gradients),
        ("all", inputs + outputs + gradients),
        ("without directions for the task, the default: of smaller sides", blocks * 11 * width**2),
    )
    return report.table(
        ("", "GB (10⁹ bytes)", "GiB"), [(name, f"{4 * n / 1e9:.1f}", f"{4 * n / 2**30:.1f}") for name, n in kinds]
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "families": families.block,
    "headline": headline,
    "text": functools.partial(so_far, "text", TEXT_SHOWN, TEXT_COLUMNS),
    "pictures": functools.partial(so_far, "pictures", PICTURES_SHOWN, PICTURES_COLUMNS),
    "arc": functools.partial(so_far, "arc", QUESTIONS_SHOWN, ("arc-easy", "deployed", "in training", "trainable")),
    "questions": functools.partial(so_far, "questions", QUESTIONS_SHOWN, (*SETS, "mean", "− LoRA, paired", "untrained")),
    "language": functools.partial(so_far, "perplexity", LANGUAGE_SHOWN, LANGUAGE_COLUMNS),
    "defaults": defaults,
    "costs": costs,
    "h100-costs": h100_costs,
    "demo": functools.partial(demos, "demo", "accuracy", ".4f"),
    "demo-latency": demo_latency,
    "demo-lm": functools.partial(demos, "demo-lm", "perplexity", ".2f"),
    "kernels-forward": lambda: _rendered("kernels-h100.md", "forward"),
    "kernels-training": lambda: _rendered("kernels-h100.md", "training"),
    "kernels-covariance": lambda: _rendered("kernels-h100.md", "covariance"),
    "compiled": compiled,
    "llama-sums": llama_sums,
    "scale": lambda: _paragraph("scale.md", 0),
    "scale-h100": lambda: _paragraph("scale.md", 1),
    "scale-checked": lambda: _paragraph("scale.md", 2),
    "scale-stages": lambda: _paragraph("scale.md", 3),
}  # fmt: skip


def _paragraph(name: str, number: int) -> str:
    """A table of a file that has several, with a line between."""
    return (RESULTS / name).read_text(encoding="utf-8").strip().split("\n\n")[number]


def _rendered(name: str, heading: str) -> str:
    lines = one_table(name, heading)
    return report.table(tuple(lines[0]), [tuple(line.values()) for line in lines])
