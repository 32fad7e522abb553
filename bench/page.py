"""The page of a run: the record of one on MiniLM and film reviews, and a picture of the page made from it.

python -m bench.page record    # two minutes on one core; writes tests/files/run/jactus-run.json
python -m bench.page picture   # writes docs/pictures/page.png; needs Chromium and the `test` extra
"""

import argparse
import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

import jactus
from jactus.app import page
from jactus.app.record import Layer, Point, Run, Score, Stage, Swept, Version

from .browser import browser
from .data import movies
from .models import MeanPooledClassifier, minilm
from .report import environment
from .training import Encoded, accuracy, batches, encode, latency, logits

RECORD = Path("tests/files/run")
PICTURE = Path("docs/pictures/page.png")
BUDGETS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
ROWS, CALIBRATION, VALIDATION, EPOCHS, BATCH, EVERY = 3000, 1000, 1000, 2, 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("record", "picture"))
    if parser.parse_args().part == "record":
        torch.set_num_threads(1)
        RECORD.mkdir(parents=True, exist_ok=True)
        run().save(RECORD)
    else:
        picture(PICTURE)


def run(budget: float = 0.8, seed: int = 0) -> Run:
    """The method, stage by stage, and what each left behind."""
    torch.manual_seed(seed)
    stages: list[Stage] = []
    said: list[str] = []

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        stages.append(Stage(name, round(time.perf_counter() - started, 2)))

    task = movies()
    model, tokenizer = minilm(2)
    training, validation = encode(tokenizer, task.train)[:ROWS], encode(tokenizer, task.validation)[:VALIDATION]
    scores = []

    def score(of: str, candidate: nn.Module) -> None:
        found, labels = logits(candidate, validation), torch.tensor(validation.labels)
        loss = float(nn.functional.cross_entropy(found, labels))
        scores.append(Score(of, float((found.argmax(1) == labels).double().mean()), loss))

    with stage("fit head"):
        jactus.fit_head(model, batches(training, 64), progress=False)
    score("dense", model)
    with stage("calibrate"), messages(said):
        statistics = jactus.calibrate(model, batches(training[:CALIBRATION], BATCH, seed=seed), progress=False)
    with stage("plan"):
        plan = jactus.plan(model, statistics, progress=False).at(budget)
    small = copy.deepcopy(model)
    with stage("compress"):
        jactus.compress(small, plan)
    score("compressed", small)
    rate = jactus.learning_rate(small)
    with stage("train"):
        points = train(small, training, validation, rate, seed)
    score("trained", small)
    sizes = [version("dense", model), version("training", small)]
    with stage("fold and save"):
        folder = Path("out/page")
        jactus.save_pretrained(jactus.fold(small.eval()), folder)
    reloaded = MeanPooledClassifier.from_pretrained(folder)
    score("reloaded", reloaded)
    sizes.append(version("deployed", reloaded, trainable=0))
    sizes = in_turns(sizes, {"dense": model, "deployed": reloaded}, validation)
    facts = environment(seed)
    machine = facts.pop("machine")
    others = sizes[0].parameters - plan.dense_parameters
    return Run(
        command="python -m bench.page record",
        base="all-MiniLM-L6-v2",
        task="text classification",
        metric="accuracy",
        data={"path": "movies", "columns": {"text": "text", "label": "label"}, "classes": task.labels}
        | {"rows": {"train": len(training), "validation": len(validation)}, "calibration rows": CALIBRATION},
        config=plan.config.to_dict(),
        recipe={"learning rate": rate, "epochs": EPOCHS, "batch size": BATCH, "optimizer": "AdamW, no weight decay"}
        | {"schedule": "6% warm-up, then linear to 0", "longest text, in tokens": 64},
        seed=seed,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine,
        versions={name: value for name, value in facts.items() if name != "seed"},
        predicted=plan.predicted_loss,
        stages=stages,
        scores=scores,
        sizes=sizes,
        training=points,
        layers=[layer(plan, name) for name in plan.layers],
        sweep=[
            Swept(b, others + plan.at(b).folded_parameters, float(f"{plan.at(b).predicted_loss:.4g}")) for b in BUDGETS
        ],
        checks=said,
    )


@contextmanager
def messages(said: list[str]) -> Iterator[None]:
    """Collect what the package's checks report."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, listener = logging.getLogger("jactus"), Listener()
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)


def version(of: str, model: nn.Module, trainable: int | None = None) -> Version:
    """What a form takes, but for time."""
    size = jactus.size(model)
    return Version(of, size.stored, size.trainable if trainable is None else trainable, size.stored_bytes)


def in_turns(
    sizes: list[Version], models: dict[str, nn.Module], validation: Encoded, rounds: int = 15
) -> list[Version]:
    """With the median milliseconds of a batch in each model, in turns so that what disturbs one disturbs all."""
    batch = next(iter(batches(validation, BATCH, seed=0)))
    taken = [{of: latency(model, batch, repeats=1, warmup=1) for of, model in models.items()} for _ in range(rounds)]
    medians = {of: round(1e3 * median(each[of] for each in taken), 2) for of in models}
    return [replace(each, milliseconds=medians.get(each.of)) for each in sizes]


def train(model: nn.Module, training: Encoded, validation: Encoded, rate: float, seed: int) -> list[Point]:
    """AdamW with warm-up and linear decay; the loss every few steps, accuracy on validation rows twice an epoch."""
    order = [batch for epoch in range(EPOCHS) for batch in batches(training, BATCH, seed=seed + epoch)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    warm = round(0.06 * len(order))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (len(order) - i) / (len(order) - warm))
    )
    points, losses = [], []
    model.train()
    for step, inputs in enumerate(order, 1):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % EVERY == 0 or step == len(order):
            measured = step % (3 * EVERY) == 0 or step == len(order)
            found = accuracy(model, validation) if measured else None
            model.train()
            points.append(Point(step, round(step * EPOCHS / len(order), 3), round(sum(losses) / len(losses), 5), found))
            losses = []
    model.eval()
    return points


def layer(plan: jactus.Plan, name: str) -> Layer:
    """A layer of the plan, its spectrum thinned out to some forty directions, closer together where it is steep."""
    planned, rank = plan.layers[name], plan.ranks[name]
    energies = planned.energies.numpy()
    at = sorted({int(i) for i in np.geomspace(1, len(energies), 40).round()} | {len(energies)})
    cut = len(energies) if rank is None else planned.weight_rank(rank, plan.config)
    at = sorted({*at, max(cut, 1)})
    return Layer(name, planned.m, planned.n, rank, cut, at, [float(f"{energies[i - 1]:.4g}") for i in at])


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
