"""JACTUS: make a pretrained transformer smaller and task-adapted in one step."""

from jactus_kernels import JactusError

from .adapt import adapt
from .calibration import calibrate
from .checkpoint import load_cores, save_cores, save_pretrained
from .config import JactusConfig
from .coordinates import learning_rate
from .heads import fit_head
from .layers import CoreLinear, FoldedLinear
from .plan import Plan
from .planning import plan
from .report import rank_map, size, spectra
from .statistics import Statistics
from .surgery import compress, fold, merge
from .training import mark_trainable, parameter_groups

__version__ = "0.1.0"
__all__ = [
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
