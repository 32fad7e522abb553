"""The end of a run: folded, saved, read back and compared; its record, card and page."""

import contextlib
import datetime
import json
import platform
import shlex
import shutil
import time
from pathlib import Path

import torch
import transformers

from jactus_kernels import JactusError

from .. import __version__
from ..checkpoints.checkpoint import save_pretrained
from ..compression.surgery import fold
from ..planning.plans import Plan
from ..report import Size, size
from . import card, page, record, subject
from .console import say
from .fitting import Run, score, the_plan
from .work import DONE

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
POINTS = 60  # of a spectrum, as it is drawn
STAGES = ("head", "calibrate", "plan", "compress", "train")


def finish(run: Run) -> record.Run:
    """Fold, save into OUTPUT, read it back and compare; write the record, the card and the page; take `.work` away.

    Raises JactusError when what was read back is not what was saved.
    """
    started = time.perf_counter()
    output = Path(run.settings.output)
    held_out = run.encoded.held_out()
    training = size(run.model)
    before = subject.logits(run.model, held_out)
    fold(run.model)
    folded = subject.logits(run.model, held_out)
    save_pretrained(run.model, output)
    run.encoded.processor.save_pretrained(output)
    run.model = subject.CLASSES[run.data.found.task].from_pretrained(output, dtype="auto").to(subject.DEVICE).eval()
    found = score(run, "reloaded")
    checks = run.calibration["checks"]
    checks.append(f"folding changed the logits of a validation batch by {_apart(before, folded):.1e} of their size")
    checks.append(_reloaded(folded, subject.logits(run.model, held_out), output))
    # a loss changes by no more than twice what logits do; ten times what one batch showed leaves room for the others
    most = 20 * float((before - folded).abs().max()) + 1e-5
    trained = run.work.stages["train"]["score"]["loss"]
    if not abs(found["loss"] - trained) <= most:
        raise JactusError(
            f"{output} was read back and is another model: its loss on the validation rows is {found['loss']:.6f}, and was "
            f"{trained:.6f} when trained; the stages are kept in {output / '.work'}"
        )
    sizes = _sizes(run, training)
    seconds = {name: run.work.stages[name]["seconds"] for name in STAGES if name in run.work.stages}
    seconds["fold"] = time.perf_counter() - started
    scores = {"dense": "head", "compressed": "compress", "trained": "train"}
    made = the_plan(run)
    described = record.Run(
        command=shlex.join(run.command),
        base=run.settings.model,
        task=run.data.found.task,
        metric="perplexity" if run.data.of_language else "accuracy",
        data=run.data.described(run.settings.data) | ({"prompt": run.encoded.form} if run.encoded.form else {}),
        config=json.loads(json.dumps(made.config.to_dict())),
        recipe=run.settings.recipe() | {"learning_rate": run.work.stages["train"]["rate"]},
        seed=run.settings.seed,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=_machine(),
        versions=_versions(),
        predicted=made.predicted_loss,
        stages=[record.Stage(name, taken) for name, taken in seconds.items()],
        scores=[record.Score(of, **run.work.stages[stage]["score"]) for of, stage in scores.items()]
        + [record.Score("reloaded", **found)],
        sizes=sizes,
        training=[record.Point(**point) for point in run.work.stages["train"]["points"]],
        layers=_layers(made),
        sweep=swept(made),
        checks=checks,
    )
    described.save(output)
    card.write(described, output, type(run.model).__name__)
    page.write(described, output / "report.html")
    if not run.settings.keep_work:
        run.work.clear()
    say(f"all is in {output}: the model, README.md, report.html and {record.FILE}")
    return described


def finished(output: Path, command: list[str]) -> record.Run | None:
    """The run of that command where it was all done and stopped while it took its stages away, which is done now."""
    if not (output / DONE).is_dir() or (found := record.Run.load(output)).command != shlex.join(command):
        return None
    shutil.rmtree(output / DONE)
    say(f"all is in {output} already")
    return found


def swept(plan: Plan) -> list[record.Swept]:
    """What each budget would deploy, of the whole model, and the loss it is predicted to add; those that can be."""
    found = []
    for budget in BUDGETS:
        with contextlib.suppress(JactusError):  # less than the least ranks of these layers cost
            at = plan.at(budget)
            found.append(record.Swept(budget, at.other_parameters + at.folded_parameters, at.predicted_loss))
    return found


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


def _reloaded(wanted: torch.Tensor, got: torch.Tensor, output: Path) -> str:
    """The same layers with the same numbers: only the order of sums could differ, and that by no more than its rounding."""
    apart = _apart(wanted, got)
    if not apart <= 1e-5:
        raise JactusError(
            f"{output} was read back and is another model: the logits of a validation batch differ by {apart:.1e} of their size; "
            f"the stages are kept in {output / '.work'}"
        )
    same = "the very same logits" if torch.equal(wanted, got) else f"the same logits but for {apart:.1e} of their size"
    return (
        f"read back by from_pretrained the model gives {same} on a validation batch, and the same loss on all of them"
    )


def _sizes(run: Run, training: Size) -> list[record.Version]:
    deployed = size(run.model)
    dense = subject.load(run.settings, run.data, run.encoded.processor)
    whole = size(dense)
    slow, fast = subject.milliseconds([dense, run.model], run.encoded.held_out())
    say(f"a batch of validation rows takes {slow:.1f} ms dense and {fast:.1f} ms deployed")
    return [
        record.Version("dense", whole.stored, whole.stored, whole.stored_bytes, slow),
        record.Version("training", training.stored, training.trainable, training.stored_bytes),
        record.Version("deployed", deployed.stored, 0, deployed.stored_bytes, fast),
    ]


def _layers(plan: Plan) -> list[record.Layer]:
    found = []
    for name, layer in plan.layers.items():
        rank, energies = plan.ranks[name], layer.energies
        count = len(energies)
        steps = max(min(POINTS, count) - 1, 1)
        at = sorted({round(count ** (k / steps)) for k in range(steps + 1)})
        cut = count if rank is None else layer.weight_rank(rank, plan.config)
        found.append(record.Layer(name, layer.m, layer.n, rank, cut, at, [float(energies[i - 1]) for i in at]))
    return found


def _machine() -> str:
    device = torch.cuda.get_device_name() if subject.DEVICE == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    return f"{platform.system()} {platform.machine()}, {device}"


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "jactus-kernels": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
