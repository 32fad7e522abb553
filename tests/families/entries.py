"""All entries of the lane by name, and how to run one."""

import time

import transformers

from .check import Result, check
from .discover import discovered
from .kinds import KINDS
from .media import candidates
from .tiny import build, model_class, tiny_config

CLASSES_OF = {"QUESTION_ANSWERING": 2, "NEXT_SENTENCE_PREDICTION": 2}


def names() -> list[str]:
    """TASK:model_type of what was discovered, then kind:name of the special inputs."""
    return [f"{task}:{model_type}" for task, model_type in discovered()] + [f"kind:{name}" for name in KINDS]


def run(name: str) -> Result:
    """Run one entry in this process."""
    quiet()
    start = time.monotonic()
    task, _, model_type = name.partition(":")
    if task == "kind":
        result = KINDS[model_type]()
        result.name = name
    else:
        try:
            cls = model_class(task, model_type)
            model = build(cls, tiny_config(model_type, num_labels=CLASSES_OF.get(task, 3)))
        except Exception as e:
            result = Result(
                name, "", "not tried", f"cannot be made tiny: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
            )
        else:
            result = check(name, model, candidates(task, model))
    result.seconds = time.monotonic() - start
    return result


def quiet() -> None:
    import logging
    import warnings

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("jactus").setLevel(logging.ERROR)
