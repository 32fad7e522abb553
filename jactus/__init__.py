"""JACTUS: make a pretrained transformer smaller and task-adapted in one step.

A room for each step of the method, from the ground up; each folder's docstring says where to begin:

    options, config    everything that can be chosen
    model/             which layers are targets; the low-rank layers that take their place
    checkpoints/       files: what is written, and how from_pretrained reads it back
    calibration/       step 1: covariances of every layer from a few batches
    planning/          steps 2 to 4: directions, their union, a rank for every layer
    compression/       steps 5 and 6: put the factors in, choose what trains, fold, merge
    export/            a model in forms that need no jactus
    pipeline           the one line, `adapt`; report, app/ (the command line): on top of all
"""

from jactus_kernels import JactusError

from .calibration.head import fit_head
from .calibration.passes import calibrate
from .calibration.statistics import Statistics
from .checkpoints.checkpoint import load_cores, save_cores, save_pretrained
from .compression.coordinates import learning_rate
from .compression.surgery import compress, fold, merge
from .compression.tasks import Tasks
from .compression.trainable import mark_trainable, parameter_groups
from .config import JactusConfig
from .export.exporter import can_export, export_model
from .model.lowrank import CoreLinear, FoldedLinear
from .options import Allocation, Budget, Core
from .pipeline import adapt
from .planning.planner import plan
from .planning.plans import Plan
from .report import rank_map, size, spectra

__version__ = "0.1.0"
__all__ = [
    "Allocation",
    "Budget",
    "Core",
    "CoreLinear",
    "FoldedLinear",
    "JactusConfig",
    "JactusError",
    "Plan",
    "Statistics",
    "Tasks",
    "adapt",
    "calibrate",
    "can_export",
    "compress",
    "export_model",
    "fit_head",
    "fold",
    "learning_rate",
    "load_cores",
    "mark_trainable",
    "merge",
    "parameter_groups",
    "plan",
    "rank_map",
    "save_cores",
    "save_pretrained",
    "size",
    "spectra",
]
