"""Open-world detection (ORE, arXiv 2103.02603) on the detectors of `mesa_train.models.dense`."""

from .clustering import ContrastiveClustering as ContrastiveClustering
from .clustering import contrastive_clustering_loss as contrastive_clustering_loss
from .detector import OpenWorldRCNN as OpenWorldRCNN
from .detector import fit_energies as fit_energies
from .detector import open_world_rcnn as open_world_rcnn
from .energy import EnergyIdentifier as EnergyIdentifier
from .energy import Weibull as Weibull
from .energy import classify_by_energy as classify_by_energy
from .energy import energy as energy
from .energy import fit_weibull as fit_weibull
from .evaluation import OpenWorldResult as OpenWorldResult
from .evaluation import absolute_open_set_error as absolute_open_set_error
from .evaluation import average_precision as average_precision
from .evaluation import open_world_evaluation as open_world_evaluation
from .evaluation import wilderness_impact as wilderness_impact
from .exemplars import select_exemplars as select_exemplars
from .rules import OpenWorldRules as OpenWorldRules
from .unknowns import auto_label_unknowns as auto_label_unknowns
