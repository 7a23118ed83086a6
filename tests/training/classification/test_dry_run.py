"""What a plan predicts of a run's memory."""

from mesa_train.training.classification import dry_run as plan
from mesa_train.training.classification.config import of_dict


def activations(**model):
    config = of_dict(
        {
            "model": {"name": "test_vit"} | model,
            "data": {"source": "digits", "image_size": 64},
            "augment": {"mixup": 0, "cutmix": 0},
            "train": {"global_batch": 8, "micro_batch": 8, "policy": "plain", "precision": "no"},
        }
    )
    return plan.memory(config, 10)["activations"]


def test_a_checkpointed_model_keeps_the_inputs_of_its_blocks():
    kept, checkpointed = activations(), activations(grad_checkpointing=True)
    # A block keeps its input, in float32, of the 16 patches and a class token.
    block = 8 * 17 * 64 * 4
    assert 2 * block <= checkpointed < kept / 2
