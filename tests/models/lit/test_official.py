"""Loading the authors' checkpoint files: what is read, and what is refused."""

import pickle

import pytest
import timm
import torch

from mesa_train.models.lit.official import load_official, read_official


def create(**options):
    return timm.create_model("litv2_tiny", num_classes=10, **options)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.fixture
def yacs_file(tmp_path):
    yacs = pytest.importorskip("yacs.config")
    config = yacs.CfgNode({"MODEL": {"TYPE": "litv2", "DEPTHS": [1, 1]}, "LR": 0.1})
    config.freeze()
    model = create()
    state = {"model": model.state_dict(), "optimizer": {"state": {}}, "config": config, "epoch": 3}
    torch.save(state, tmp_path / "trainer.pth")
    return model, tmp_path / "trainer.pth"


@pytest.mark.parametrize("nested", [True, False])
def test_both_layouts_load(tmp_path, nested):
    model, other = create(), create(img_size=64)
    weights = model.state_dict()
    torch.save({"model": weights, "epoch": 299} if nested else weights, tmp_path / "w.pth")
    load_official(other, tmp_path / "w.pth")
    assert all(torch.equal(v, weights[k]) for k, v in other.state_dict().items())


def test_a_trainers_configuration_is_refused_with_a_remedy_or_allowed(yacs_file):
    model, path = yacs_file
    other = create()
    with pytest.raises(ValueError, match=r"trainer\.pth has its trainer's .*allow_config=True"):
        load_official(other, path)
    load_official(other, path, allow_config=True)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("allow_config", [False, True])
def test_code_is_never_run(tmp_path, capsys, allow_config):
    torch.save({"model": create().state_dict(), "extra": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="which are not loaded"):
        read_official(tmp_path / "evil.pth", allow_config=allow_config)
    assert capsys.readouterr().out == ""


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "text.pth").write_text("not a checkpoint at all")
    (tmp_path / "list.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "numbers.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    for name in ("text", "list", "numbers", "pickle"):
        with pytest.raises(ValueError, match=f"{name}.pth"):
            read_official(tmp_path / f"{name}.pth")


def test_another_model_is_named_and_nothing_changes(tmp_path):
    torch.save(create(alpha=1.0).state_dict(), tmp_path / "w.pth")
    model = create()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing: layers\.2\.blocks\.0\.attn\.h_qkv\.weight"):
        load_official(model, tmp_path / "w.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_head_of_other_classes_can_stay_behind(tmp_path):
    torch.save(create().state_dict(), tmp_path / "w.pth")
    model = timm.create_model("litv2_tiny", num_classes=5)
    with pytest.raises(ValueError, match=r"head\.weight \(10, 256\) for \(5, 256\)"):
        load_official(model, tmp_path / "w.pth")
    load_official(model, tmp_path / "w.pth", head=False)
    assert model.head.weight.shape == (5, 256)
