"""Models of this project, registered with timm: `import mesa_train.models` and `timm.create_model`.

Needs timm and torchvision: pip install 'mesa_train[timm]'.
"""

from . import lit as lit
from . import vit22b as vit22b
