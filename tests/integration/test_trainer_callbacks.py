"""The callbacks of transformers' Trainer and of Lightning: wrapped while training, plain in every file."""

import logging
import warnings
from pathlib import Path

import forked
import pytest
import torch
from limits import HUNG_S
from safetensors.torch import load_file
from torch import nn

import mesa_train
from mesa_train import Policy
from mesa_train.engine.wrap import policy_of, report_of

EIGHT = Policy(min_bytes=0)
ROOT = Path(__file__).resolve().parents[2]


class Net(nn.Module):
    """Returns a loss, as the Trainer wants it; no key of its weights is renamed when it is saved."""

    def __init__(self):
        super().__init__()
        self.norm, self.body, self.head = nn.LayerNorm(32), nn.Linear(32, 128), nn.Linear(128, 5)
        self.seen = []

    def forward(self, x, labels):
        logits = self.head(nn.functional.gelu(self.body(self.norm(x))))
        report = report_of(self)
        self.seen.append(None if report is None else {how for *_, how in report.rows})
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data(rows=32):
    draw = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(32, generator=draw), "labels": n % 5} for n in range(rows)]


def trainer(folder, policy, model=None, **settings):
    from transformers import Trainer, TrainingArguments

    from mesa_train.integrations.transformers import MesaTrainCallback

    torch.manual_seed(0)
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 8,
            "max_steps": 4,
            "logging_steps": 1,
            "learning_rate": 0.2,
            "optim": "sgd",
            "use_cpu": True,
            "report_to": [],
            "save_steps": 2,
            "disable_tqdm": True,
            **settings,
        }
    )
    callbacks = [] if policy is None else [MesaTrainCallback(policy)]
    return Trainer(model or Net(), arguments, train_dataset=data(), callbacks=callbacks)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(autouse=True)
def _quiet():
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks' own
        yield


@pytest.mark.slow
@pytest.mark.compatibility("Trainers", "transformers' Trainer, callback")
def test_trainer_saves_plain_weights_and_resumes(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mesa_train")
    plain = trainer(tmp_path / "plain", None)
    plain.train()
    wrapped = trainer(tmp_path / "wrapped", EIGHT, bf16=True)
    wrapped.train()
    model = wrapped.model
    # Coded in every step, those behind the first save and its unwrap_model too.
    assert len(model.seen) == 4
    assert all("rebuilt" in how for how in model.seen[1:])
    assert losses(wrapped) == pytest.approx(losses(plain), rel=0.02)
    assert policy_of(model) is None
    assert [r.getMessage() for r in caplog.records] == ["wrapped Net with 4 modules"]
    saved = [
        load_file(tmp_path / n / "checkpoint-2/model.safetensors") for n in ("plain", "wrapped")
    ]
    assert saved[0].keys() == saved[1].keys() == model.state_dict().keys()
    # The second half again, from the checkpoint, with another policy and with none.
    for policy in ("mesa4", None):
        again = trainer(tmp_path / "again", policy, bf16=True)
        again.train(resume_from_checkpoint=str(tmp_path / "wrapped/checkpoint-2"))
        assert losses(again) == pytest.approx(losses(wrapped), rel=0.02)


@pytest.mark.compatibility("Trainers", "transformers' Trainer, checkpointing with offload")
@pytest.mark.parametrize("offload", [False, True])
def test_trainer_with_activation_checkpointing(tmp_path, offload):
    from transformers import Dinov2Config, Dinov2ForImageClassification, TrainingArguments

    if not hasattr(TrainingArguments, "activation_checkpointing"):
        pytest.skip("this transformers has no checkpointing with offload")

    def run(policy):
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, num_labels=5
        )
        model = Dinov2ForImageClassification(config)
        settings = {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": False, "offload": offload},
            "save_strategy": "no",
            "max_steps": 2,
        }
        made = trainer(tmp_path, policy, model, **settings)
        draw = torch.Generator().manual_seed(0)
        made.train_dataset = [
            {"pixel_values": torch.randn(3, 28, 28, generator=draw), "labels": n % 5}
            for n in range(16)
        ]
        made.train()
        return losses(made)

    policy = Policy(min_bytes=0, checkpoint_inputs=8)
    assert run(policy) == pytest.approx(run(None), rel=0.02)


def test_a_wrapped_model_has_its_policy_again(tmp_path):
    model = mesa_train.wrap(Net(), "mesa4")
    made = trainer(tmp_path, EIGHT, model, max_steps=1, save_strategy="no")
    made.train()
    assert policy_of(model) == mesa_train.PRESETS["mesa4"]


@pytest.mark.parametrize("wrong", ["mesa9", {"bitz": 8}, 3])
def test_a_wrong_policy_is_refused_before_training(wrong):
    from mesa_train.integrations.transformers import MesaTrainCallback

    with pytest.raises((ValueError, TypeError), match=r"unknown|must be"):
        MesaTrainCallback(wrong)


@pytest.mark.slow
@pytest.mark.compatibility("Trainers", "transformers' Trainer, accelerate launch")
def test_trainer_under_accelerate_launch(tmp_path):
    """Two processes on the CPU: the gradient's mean over both, and one line of the first."""
    command = ["-m", "accelerate.commands.launch", "--config_file"]
    command += [ROOT / "recipes/accelerate/cpu_2_processes.yaml"]
    command += [Path(__file__).with_name("callback_worker.py"), tmp_path]
    done = forked.run(command, timeout=HUNG_S)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("wrapped Net with 4 modules") == 1
    plain, wrapped = (
        load_file(tmp_path / n / "checkpoint-2/model.safetensors") for n in ("0", "1")
    )
    assert plain.keys() == wrapped.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(wrapped[name], weight, rtol=0.05, atol=1e-3)


@pytest.mark.compatibility("Trainers", "Lightning, callback")
def test_lightning_callback(tmp_path):
    lightning = pytest.importorskip("lightning")
    from mesa_train.integrations.lightning import MesaTrainCallback

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.seen = []

        def configure_model(self):
            self.net = Net()

        def training_step(self, pair, index):
            loss = self.net(*pair)["loss"]
            self.seen.append(float(loss.detach()))
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.2)

    def run(*callbacks, fails=False):
        torch.manual_seed(0)
        task = Task()
        draw = torch.Generator().manual_seed(0)
        pairs = [(torch.randn(8, 32, generator=draw), torch.arange(8) % 5) for _ in range(4)]
        if fails:
            pairs[1] = (torch.zeros(8, 31), torch.arange(8) % 5)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path / f"{len(callbacks)}{fails}"),
            callbacks=list(callbacks),
        )
        loader = torch.utils.data.DataLoader(pairs, batch_size=None)
        trainer.fit(task, loader)
        return task, trainer

    plain, _ = run()
    wrapped, trainer_of_it = run(MesaTrainCallback(EIGHT))
    assert wrapped.seen == pytest.approx(plain.seen, rel=0.02)
    assert any("rebuilt" in how for how in wrapped.net.seen[-1])
    assert policy_of(wrapped) is None
    file = trainer_of_it.checkpoint_callback.best_model_path
    state = torch.load(file, weights_only=False)["state_dict"]
    assert state.keys() == plain.state_dict().keys()
    callback = MesaTrainCallback(EIGHT)
    with pytest.raises(RuntimeError):
        run(callback, fails=True)
    assert callback.session._model is None
