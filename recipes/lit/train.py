"""Zero-shot classification by locked-image tuning (LiT, arXiv 2111.07991), from a YAML file.

    python recipes/mocov3/train.py --config recipes/mocov3/quickstart.yaml   # an image tower, without labels
    python recipes/lit/train.py --config recipes/lit/quickstart.yaml         # its text tower
    python recipes/lit/train.py --config recipes/lit/quickstart_unlocked.yaml

`--dry-run` prints the plan and stops. The zero-shot table is OUT/zeroshot.json.
"""

from mesa_train.training.lit.config import load
from mesa_train.training.lit.run import describe, plan, prepare
from mesa_train.training.recipe_command import Recipe, script

if __name__ == "__main__":
    script(Recipe("lit", load, prepare, plan, describe, ("top1",)))()
