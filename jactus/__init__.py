"""JACTUS: make a pretrained transformer smaller and task-adapted in one step."""

from jactus_kernels import JactusError

from .calibration.head import fit_head
from .calibration.passes import calibrate
from .calibration.statistics import Statistics
from .checkpoints.checkpoint import load_cores, save_cores, save_pretrained
from .compression.coordinates import learning_rate
from .compression.surgery import compress, fold, merge
from .compression.trainable import mark_trainable, parameter_groups
from .config import JactusConfig
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
    "adapt",
    "calibrate",
    "compress",
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
