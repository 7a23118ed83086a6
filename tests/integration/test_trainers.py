"""What else meets the same hooks: PEFT, averaged models, torch.func, offloading and users' own hooks, and
the training loops of transformers, timm and Lightning."""

import contextlib
import copy
import warnings

import numpy
import pytest
import timm
import torch
from integration_models import (
    BOUND,
    EIGHT,
    POLICIES,
    Net,
    batch,
    distance,
    gradients,
    saved_bytes,
    step,
)
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import mesa_train
from mesa_train.engine.wrap import report_of

PRESETS = pytest.mark.parametrize("preset", POLICIES)


def small_vit(**changes):
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **{**settings, **changes})


def images(rows=4, seed=0):
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# --- PEFT ---


def lora(preset=None, when="after"):
    from peft import LoraConfig, get_peft_model

    model = Net(drop=0.0)
    if when == "before" and preset:
        mesa_train.wrap(model, POLICIES[preset])
    torch.manual_seed(1)
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules=["qkv", "fc1"], init_lora_weights=False)
    )
    if when == "after" and preset:
        mesa_train.wrap(model, POLICIES[preset])
    return model


@PRESETS
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.compatibility("PEFT", "LoRA, wrapped {when}")
def test_lora(when, preset):
    pytest.importorskip("peft")
    plain, found = step(lora(), batch()), step(lora(preset, when), batch())
    assert torch.equal(found[1], plain[1])
    assert distance(found[2], plain[2]) <= BOUND[preset]
    assert found[0] < plain[0]
    model = lora(preset, when)
    assert all(("lora" in n) == p.requires_grad for n, p in model.named_parameters())


@pytest.mark.compatibility("PEFT", "LoRA: frozen weights keep no input")
def test_loras_frozen_weights_keep_no_input():
    """Bytes by operand: what full training keeps for the frozen Linears' weight gradients is gone, but
    for the inputs that the adapters beside them read too."""
    pytest.importorskip("peft")
    model = lora("mesa8")
    model(batch())
    tokens, width = 4 * 16, 32
    kept = {}
    for (module, operator, operand, _), (_, size) in report_of(model).rows.items():
        kept[module.rpartition("base_model.model.")[2], operator, operand] = size
    block = {k: v for k, v in kept.items() if k[0].startswith("blocks.1")}
    assert block["blocks.1.norm1", "layer_norm", "normalized"] == tokens * (width + 4)
    frozen = [k for k in block if k[1] == "linear" and "lora" not in k[0]]
    assert not frozen
    adapters = {k: v for k, v in block.items() if k[1] == "linear"}
    # lora_A shares the norm's codes; lora_B keeps codes of its four columns, and their scale.
    assert adapters == {
        (f"blocks.1.{name}.lora_{part}.default", "linear", "input"): size
        for name in ("qkv", "fc1")
        for part, size in (("A", 0), ("B", tokens * 8))
    }


# --- averaged models ---


@pytest.mark.compatibility("Averaged models", "ModelEmaV3, AveragedModel")
def test_model_ema_of_timm_and_torch():
    from timm.utils import ModelEmaV3
    from torch.optim.swa_utils import AveragedModel

    model = mesa_train.wrap(Net(drop=0.0), EIGHT)
    averages = [ModelEmaV3(model, decay=0.5), AveragedModel(model)]
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, batch())
    optimizer.step()
    averages[0].update(model)
    averages[1].update_parameters(model)
    now = model.state_dict()
    expected = 0.5 * start["head.weight"] + 0.5 * now["head.weight"]
    torch.testing.assert_close(averages[0].module.head.weight, expected)
    assert torch.equal(averages[1].module.head.weight, now["head.weight"])
    for average in averages:
        assert list(average.module.state_dict()) == list(now)
        with torch.no_grad():
            assert average.module(batch()).isfinite().all()


# --- torch.func ---


@pytest.mark.compatibility(
    "torch.func", "functional_call, vmap, grad", note="passes through without compression"
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap's, without us too
def test_torch_func_passes_through():
    from torch.func import functional_call, grad, vmap

    plain, model = Net(drop=0.0), mesa_train.wrap(Net(drop=0.0), EIGHT)
    parameters = {n: p.detach() for n, p in plain.named_parameters()}

    def per_sample(module):
        def loss(p, x):
            return functional_call(module, p, (x[None],)).square().sum()

        return vmap(grad(loss), (None, 0))(parameters, batch())

    found, expected = per_sample(model), per_sample(plain)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


# --- hooks ---


@PRESETS
@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.compatibility("Saved-tensor hooks", "save_on_cpu {where}")
def test_save_on_cpu(where, preset):
    """What goes to the CPU is codes."""
    storages = {}

    class Counting(save_on_cpu):
        def __init__(self):
            super().__init__()
            pack = self.pack_hook

            def counted(tensor):
                if not isinstance(tensor, nn.Parameter):
                    storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
                return pack(tensor)

            self.pack_hook = counted

    def offloaded(block, x):
        with Counting():
            return block(x)

    def run(policy):
        storages.clear()
        model = Net(around=offloaded if where == "inside" else None)
        if policy is not None:
            mesa_train.wrap(model, policy)
        torch.manual_seed(1)
        with Counting() if where == "around" else contextlib.nullcontext():
            loss = model(batch()).square().mean()
        loss.backward()
        return sum(s.nbytes() for s in storages.values()), gradients(model)

    plain, found = run(None), run(POLICIES[preset])
    assert distance(found[1], plain[1]) <= BOUND[preset]
    assert found[0] < plain[0] / (1 if preset == "lossless" else 2)


@pytest.mark.compatibility("Saved-tensor hooks", "a user's own")
def test_saved_tensor_hooks_of_a_user_see_codes_and_may_replace_them():
    """Hooks that keep a tensor in another form, in the order PyTorch defines: the innermost alone."""
    seen = []

    def pack(tensor):
        seen.append(tensor.dtype)
        return tensor.clone()

    model = mesa_train.wrap(Net(drop=0.0), EIGHT)
    with saved_tensors_hooks(pack, lambda t: t):
        loss = model(batch()).square().mean()
    loss.backward()
    assert torch.uint8 in seen
    other = mesa_train.wrap(Net(drop=0.0), EIGHT)
    other(batch()).square().mean().backward()
    assert torch.equal(gradients(model), gradients(other))


@pytest.mark.compatibility("Saved-tensor hooks", "disable_saved_tensors_hooks")
def test_hooks_switched_off():
    """`disable_saved_tensors_hooks` is obeyed: operators with a row work, the fallback stands aside."""
    plain, model = Net(drop=0.0), mesa_train.wrap(Net(drop=0.0), EIGHT)
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        loss = model(batch()).exp().square().mean()
    loss.backward()
    plain(batch()).exp().square().mean().backward()
    assert distance(gradients(model), gradients(plain)) <= BOUND["mesa8"]


# --- loops ---


def losses_of(logs):
    return [row["loss"] for row in logs if "loss" in row]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.compatibility("Trainers", "transformers Trainer")
def test_transformers_trainer(tmp_path, checkpointed):
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    def run(policy):
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            num_labels=5,
        )
        model = ViTForImageClassification(config)
        if policy is not None:
            mesa_train.wrap(model, policy)
        data = [{"pixel_values": images(1, seed)[0], "labels": seed % 5} for seed in range(16)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=3,
            logging_steps=1,
            learning_rate=0.02,
            optim="sgd",
            use_cpu=True,
            bf16=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=checkpointed,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        trainer.save_model(str(tmp_path / "model"))
        return losses_of(trainer.state.log_history)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Trainer's own
        plain = run(None)
        found = run(EIGHT)
        from transformers import ViTForImageClassification as Loaded

        Loaded.from_pretrained(str(tmp_path / "model"))
    assert plain[0] != plain[-1]
    assert found == pytest.approx(plain, rel=0.01)


@pytest.mark.compatibility("Trainers", "a loop like timm's train.py")
def test_a_loop_like_timms():
    """Its pieces: autocast, NativeScaler with clipping, accumulation, EMA, mixup, cosine schedule."""
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3, NativeScaler

    def run(policy):
        model = small_vit(drop_path_rate=0.2)
        if policy is not None:
            mesa_train.wrap(model, policy)
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
        schedule = CosineLRScheduler(optimizer, t_initial=8, t_in_epochs=False)
        scaler, average = NativeScaler("cpu"), ModelEmaV3(model, decay=0.9)
        mixup = Mixup(mixup_alpha=0.8, num_classes=5)
        numpy.random.seed(0)  # noqa: NPY002 (timm draws from it)
        torch.manual_seed(0)
        found = []
        for number in range(4):
            x, y = mixup(images(4, number), torch.arange(4))
            with torch.autocast("cpu", torch.float16):
                loss = SoftTargetCrossEntropy()(model(x), y) / 2
            scaler(
                loss,
                optimizer,
                clip_grad=1.0,
                parameters=model.parameters(),
                need_update=number % 2 == 1,
            )
            if number % 2 == 1:
                optimizer.zero_grad()
                average.update(model)
                schedule.step_update(number)
            found.append(float(loss.detach()))
        return found

    assert run(EIGHT) == pytest.approx(run(None), rel=0.01)


@pytest.mark.compatibility("Trainers", "Lightning")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self, policy):
            super().__init__()
            self.model, self.seen = small_vit(), []
            if policy is not None:
                mesa_train.wrap(self.model, policy)

        def training_step(self, pair, index):
            x, y = pair
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.seen.append(float(loss.detach()))
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(policy):
        task = Task(policy)
        pairs = [(images(4, seed), torch.arange(4)) for seed in range(4)]
        loader = torch.utils.data.DataLoader(pairs, batch_size=None)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            precision="bf16-mixed",
            default_root_dir=str(tmp_path),
        )
        trainer.fit(task, loader)
        return task.seen

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own
        assert run(EIGHT) == pytest.approx(run(None), rel=0.01)


def test_kept_bytes_counts():
    """The byte counter that these tests compare with is no constant."""
    assert saved_bytes(lambda: Net()(batch()))[0] > saved_bytes(lambda: Net()(batch(rows=2)))[0]
