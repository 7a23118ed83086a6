"""Models of this project, registered with timm.

Import `mesa_train.models`, then call `timm.create_model`.

They need timm and torchvision: pip install 'mesa_train[timm]'.
"""

from . import attention as attention
from . import dynamicvit as dynamicvit
from . import ecoformer as ecoformer
from . import hvt as hvt
from . import lit as lit
from . import moco as moco
from . import spvit as spvit
from . import vit22b as vit22b
