"""Each model of the families: exact outputs, small gradient errors, and the order of what is saved.

`scripts/bench/sweep_families.py` measures the same models in more detail. The quick ones here take
less than about two seconds each on one core.
"""

import family_models
import pytest
import sweep_families
import torch

from mesa_train.engine import native
from mesa_train.engine.intercept import CompressionMode

# The models by source. Collecting the tests must not import the libraries.
MODELS = {
    "encoders": (
        "DINOv2",
        "DINOv2 with registers",
        "DINOv3 ViT",
        "SigLIP 2 (NaFlex)",
        "ViT-MAE pre-training",
        "BEiT",
        "I-JEPA",
        "Hiera",
        "Swin V2",
        "PE / timm wrapper",
    ),
    "video": (
        "VideoMAE classification",
        "VideoMAE pre-training",
        "V-JEPA 2",
        "TimeSformer",
        "ViViT",
    ),
    "dense": (
        "SAM",
        "SAM 2",
        "SAM 2, memory",
        "SAM 3",
        "SegFormer",
        "Mask2Former",
        "EoMT",
        "UperNet with Swin",
        "DPT",
        "Depth Anything",
        "DETR",
        "Deformable DETR",
        "RT-DETR",
        "D-FINE",
        "RF-DETR",
        "YOLOS",
    ),
    "language": (
        "Qwen2.5-VL tower",
        "Qwen3-VL tower",
        "Llama 4 tower",
        "SmolVLM",
        "PaliGemma",
        "LLaVA",
        "Florence-2",
        "CLIP contrastive",
        "SigLIP sigmoid loss",
        "OWLv2",
    ),
    "policies": ("pi0", "SmolVLA-like", "ACT-like"),
    "towers": (
        "open_clip ViT contrastive",
        "open_clip ResNet contrastive",
        "open_clip with timm ViT sigmoid loss",
        "CLIP loss of 1,024 pairs",
        "SigLIP loss of 1,024 pairs",
    ),
    "diffusion": (
        "DiT",
        "PixArt",
        "Stable Diffusion 3",
        "Flux",
        "Wan (video)",
        "Qwen-Image",
        "Sana",
        "U-Net of Stable Diffusion",
        "Autoencoder of Stable Diffusion",
    ),
    "medical": ("SwinUNETR", "UNETR", "DynUNet (nnU-Net)", "SegResNet", "ViT autoencoder 3-D"),
    "detectors": (
        "Faster R-CNN R50-FPN",
        "Mask R-CNN R50-FPN",
        "RetinaNet R50-FPN",
        "FCOS R50-FPN",
        "SSDlite MobileNetV3",
        "DeepLabV3 MobileNetV3",
        "LR-ASPP MobileNetV3",
        "RAFT small",
        "Video Swin-T",
        "R(2+1)D-18",
    ),
    "images": (
        "timm vit_tiny_patch16_224",
        "timm eva02_tiny_patch14_224",
        "timm swin_tiny_patch4_window7_224",
        "timm maxvit_rmlp_pico_rw_256",
        "timm coatnet_nano_rw_224",
        "timm convnext_atto",
        "timm resnet18",
        "timm efficientnet_b0",
        "timm mobilenetv2_100",
        "timm mobilenetv4_conv_small",
        "timm nf_regnet_b0",
        "timm levit_128s",
        "timm fastvit_t8",
        "timm mambaout_femto",
        "timm regnety_002",
    ),
    "sequences": ("CRNN (LSTM and CTC)", "BC-RNN (GRU)", "NaViT (jagged tensors)"),
    "distillation": (
        "DINO multi-crop",
        "iBOT / DINOv2 loss multi-crop",
        "DINO with 65,536 prototypes",
        "iBOT with 65,536 prototypes",
        "SimCLR",
    ),
}
# The models that took more than 1.5 s on one core. The others run in the quick suite.
SLOW = (
    "ACT-like",
    "BC-RNN (GRU)",
    "D-FINE",
    "DINO with 65,536 prototypes",
    "DINOv2",
    "DeepLabV3 MobileNetV3",
    "DiT",
    "DynUNet (nnU-Net)",
    "FCOS R50-FPN",
    "Faster R-CNN R50-FPN",
    "Mask R-CNN R50-FPN",
    "Mask2Former",
    "R(2+1)D-18",
    "RT-DETR",
    "RetinaNet R50-FPN",
    "SAM 3",
    "SSDlite MobileNetV3",
    "SegResNet",
    "SimCLR",
    "SwinUNETR",
    "UNETR",
    "V-JEPA 2",
    "iBOT with 65,536 prototypes",
    "open_clip with timm ViT sigmoid loss",
    "timm coatnet_nano_rw_224",
    "timm efficientnet_b0",
    "timm fastvit_t8",
    "timm levit_128s",
    "timm mambaout_femto",
    "timm maxvit_rmlp_pico_rw_256",
    "timm nf_regnet_b0",
)
QUICK = [name for names in MODELS.values() for name in names if name not in SLOW]
# Saved bytes of the sweep: plain's divided by mesa8's, of models that save little.
SMALL_FACTORS = {
    "NaViT (jagged tensors)": 1.05,
    "timm nf_regnet_b0": 1.9,
    "CRNN (LSTM and CTC)": 2.0,
}


def case_of(name):
    source = next(source for source, names in MODELS.items() if name in names)
    pytest.importorskip(family_models.SOURCES[source])
    cases, missing = family_models.load([source])
    assert not missing
    return cases[name]


def check(name):
    case, row = case_of(name), {}
    torch.manual_seed(0)
    model, inputs = case.make()
    model.train()
    sweep_families.compare_runs(model, inputs, row, sweep_families.RUNS, loss_alone=True)
    assert row["outputs_equal"]
    assert row["lossless_error"] < 1e-5
    assert row["mesa8_error"] < 0.03
    plain, eight, recompute = (
        sweep_families.count(model, inputs, policy).saved_bytes
        for policy in ("plain", "mesa8", "mesa8-recompute")
    )
    assert plain > SMALL_FACTORS.get(name, 2.4) * eight
    assert recompute <= eight


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", QUICK)
def test_a_quick_model(name):
    check(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SLOW)
def test_a_model(name):
    check(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_without_a_compiler():
    """A view of a rebuilt tensor, whose strides are not those of the forward."""
    with native.python_rows(CompressionMode):
        check("SmolVLM")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", family_models.SOURCES)
def test_the_models_of_a_source_are_listed(source):
    pytest.importorskip(family_models.SOURCES[source])
    cases, missing = family_models.load([source])
    assert not missing
    made_in = {
        name: getattr(case.make, "func", case.make).__module__ for name, case in cases.items()
    }
    found = [name for name, module in made_in.items() if module.endswith(f".{source}")]
    assert found == list(MODELS[source])
