"""A network of each family of torchvision, in training and eval mode, against plain torch.

They are torchvision's own classes, narrow and shallow where the constructor allows it. The first and
the last norm and the head adapt; everything else of the network is in the way of their gradients.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import implicit_optim as iopt
from untouched import Plain, Remembered, errors, learner, part, settled

pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))

from torchvision import models, ops  # noqa: E402
from torchvision.models import detection, feature_extraction, segmentation  # noqa: E402
from torchvision.models.convnext import CNBlockConfig  # noqa: E402
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig  # noqa: E402
from torchvision.models.mobilenetv3 import InvertedResidualConfig  # noqa: E402
from torchvision.models.regnet import BlockParams  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402
from torchvision.models.vgg import make_layers  # noqa: E402

CLASSES = 3
TASKS = 2


def alexnet():
    """With one matrix for a head: its own three hold fifty million numbers, VGG's a hundred."""
    net = models.AlexNet(CLASSES)
    net.classifier = nn.Sequential(nn.Dropout(), nn.Linear(9216, CLASSES))
    return net


def vgg():
    with torch.device("meta"):
        net = models.VGG(nn.Identity(), CLASSES, init_weights=False)
    net.features = make_layers([4, "M", 8, "M", 8], batch_norm=True)
    net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(2), nn.Linear(32, CLASSES)
    return net


def squeezenet():
    """Behind its last layer is a ReLU: awake in all classes."""
    net = models.squeezenet1_1(num_classes=CLASSES)
    nn.init.constant_(net.classifier[1].bias, 1.0)
    return net


def resnet(block=BasicBlock, layers=(1, 1, 1, 1), **settings):
    return models.ResNet(block, layers, num_classes=CLASSES, **settings)


def mobilenet_v2():
    blocks = [[1, 8, 1, 1], [2, 8, 2, 2], [2, 16, 1, 2]]
    return models.MobileNetV2(CLASSES, inverted_residual_setting=blocks)


def mobilenet_v3():
    block = partial(InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [block(8, 3, 8, 8, True, "RE", stride=2), block(8, 5, 16, 8, True, "HS", stride=1)]
    return models.MobileNetV3(blocks, last_channel=16, num_classes=CLASSES)


def efficientnet():
    blocks = [FusedMBConvConfig(2, 3, 1, 8, 8, 1), MBConvConfig(2, 3, 2, 8, 8, 2)]
    return models.EfficientNet(blocks, dropout=0.2, num_classes=CLASSES)


def regnet():
    blocks = BlockParams.from_init_params(
        depth=3, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25
    )
    return models.RegNet(blocks, num_classes=CLASSES, stem_width=8)


def convnext():
    return models.ConvNeXt(
        [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=CLASSES
    )


def swin(block):
    return models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=[4, 4],
        num_classes=CLASSES,
        block=block[0],
        downsample_layer=block[1],
    )


def maxvit():
    return models.MaxVit(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=4,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.2,
        num_classes=CLASSES,
    )


def vit():
    return models.VisionTransformer(
        image_size=32,
        patch_size=16,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=CLASSES,
    )


def pyramid():
    """What detectors look at: a pyramid of features, from a backbone whose batch norm is frozen."""
    body = resnet(norm_layer=ops.FrozenBatchNorm2d)
    layers = {"layer1": "0", "layer2": "1"}
    return detection.backbone_utils.BackboneWithFPN(body, layers, [64, 128], 4)


def extractor():
    """A network as a graph of torch.fx."""
    return feature_extraction.create_feature_extractor(resnet(), ["layer1", "layer2"])


def lraspp():
    layers = {"1": "low", "2": "high"}
    body = models._utils.IntermediateLayerGetter(mobilenet_v3().features, layers)
    return segmentation.LRASPP(body, 8, 8, CLASSES, inter_channels=8)


def fcn():
    body = resnet(Bottleneck, replace_stride_with_dilation=[False, True, True])
    body = models._utils.IntermediateLayerGetter(body, {"layer1": "out"})
    return segmentation.FCN(body, segmentation.fcn.FCNHead(256, CLASSES))


swin_v1 = (models.swin_transformer.SwinTransformerBlock, models.swin_transformer.PatchMerging)
swin_v2 = (models.swin_transformer.SwinTransformerBlockV2, models.swin_transformer.PatchMergingV2)
classes = {"num_classes": CLASSES}
# The network and the size of its images.
CLASSIFIERS = {
    "alexnet": (alexnet, 63),
    "vgg": (vgg, 16),
    "resnet": (resnet, 32),
    "resnext": (partial(resnet, Bottleneck, groups=4, width_per_group=4), 32),
    "squeezenet": (squeezenet, 32),
    "densenet": (partial(models.DenseNet, 8, (2, 2), 8, **classes), 32),
    "googlenet": (partial(models.GoogLeNet, aux_logits=False, init_weights=True, **classes), 32),
    "shufflenet": (partial(models.ShuffleNetV2, [2, 2, 2], [8, 16, 32, 64, 32], **classes), 32),
    "mobilenet v2": (mobilenet_v2, 32),
    "mobilenet v3": (mobilenet_v3, 32),
    "mnasnet": (partial(models.MNASNet, 0.25, **classes), 32),
    "efficientnet": (efficientnet, 32),
    "regnet": (regnet, 32),
    "convnext": (convnext, 32),
    "vit": (vit, 32),
    "swin": (partial(swin, swin_v1), 32),
    "swin v2": (partial(swin, swin_v2), 32),
    "maxvit": (maxvit, 32),
}
SEGMENTERS = {"lraspp": (lraspp, 32), "fcn": (fcn, 32)}
BODIES = {"feature pyramid": (pyramid, 32), "fx feature extractor": (extractor, 32)}
# torch's own way with one pooled pixel of an image in channels_last; the numbers are right.
AS_STRIDED = "ignore:There is a performance drop.*as_strided_"
pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings(AS_STRIDED)]
NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def few_adapt(net):
    """The first and the last norm and the last layer, or layers where there are no norms."""
    layers = [m for m in net.modules() if next(m.parameters(recurse=False), None) is not None]
    norms = [m for m in layers if isinstance(m, NORMS)]
    net.requires_grad_(False)
    for layer in (*norms[:1], *norms[-1:], layers[-1]):
        layer.requires_grad_(True)
    return net


def without_randomness(net):
    for module in net.modules():
        if isinstance(module, (nn.Dropout, ops.StochasticDepth)):
            module.p = 0.0
        elif hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    return net


def check(build, size, loss, target, *, training):
    def made():
        torch.manual_seed(1)
        return few_adapt(without_randomness(build().double()))

    net, other = (
        made(),
        made(),
    )  # the oracle's is no copy: a graph of torch.fx loses its mode in one
    images = torch.randn(TASKS, 7, 3, size, size)
    settled(net, [images.flatten(0, 1)]).train(training)
    other.load_state_dict(net.state_dict())
    other.train(training)
    support, query = [
        (x, target(len(x[0]), size).expand(TASKS, *target(len(x[0]), size).shape))
        for x in images.split([4, 3], dim=1)
    ]
    plain = Plain.well_conditioned(other, loss, support)
    policy = iopt.RunningStats.BATCH if training else None
    meta = learner(net, plain, running_stats=policy)
    remembered = Remembered(net, part(support[:-1], 0))
    product, gradient = errors(meta, plain, support, query)
    assert product < 1e-8 and gradient < 1e-8
    assert remembered.changes() == []


MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@MODES
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name, training):
    labels = lambda n, size: torch.arange(n) % CLASSES  # noqa: E731
    check(*CLASSIFIERS[name], F.cross_entropy, labels, training=training)


@MODES
@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmentation(name, training):
    labels = lambda n, size: torch.arange(n * size * size).reshape(n, size, size) % CLASSES  # noqa: E731
    loss = lambda out, y: F.cross_entropy(out["out"], y)  # noqa: E731
    check(*SEGMENTERS[name], loss, labels, training=training)


@MODES
@pytest.mark.parametrize("name", BODIES)
def test_features(name, training):
    nothing = lambda n, size: torch.zeros(n)  # noqa: E731
    loss = lambda out, y: sum(t.square().mean() for t in out.values())  # noqa: E731
    check(*BODIES[name], loss, nothing, training=training)
