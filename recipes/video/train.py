"""A temporal probe over frozen features of frames, from a YAML file.

    python recipes/video/train.py --config recipes/video/quickstart.yaml
    python recipes/video/train.py --config recipes/video/quickstart.yaml --set probe.layers=0 \\
        --set train.out=runs/video_mean

`--dry-run` prints the plan and stops.
"""

from mesa_train.training.recipe_command import Recipe, script
from mesa_train.training.video.config import load
from mesa_train.training.video.run import describe, plan, prepare

if __name__ == "__main__":
    script(Recipe("video", load, prepare, plan, describe, ("top1",)))()
