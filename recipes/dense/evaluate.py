"""Evaluation of a run's best weights, a safetensors file or an official checkpoint.

python recipes/dense/evaluate.py --run runs/dense_quickstart --pictures 8
python recipes/dense/evaluate.py --config recipes/dense/retinanet_s_1x.yaml --weights retinanet_s.pth
"""

from mesa_train.training.dense.command import evaluation

if __name__ == "__main__":
    evaluation()()
