"""Sources of tasks: Omniglot, Mini-ImageNet, any images, sinusoids; and the papers' networks.

Knows torch, and torchvision and pillow where they are installed; knows nothing of the rest of
the library, and the rest knows nothing of it.
"""

from implicit_optim.tasks._episodes import Episodes, rotate_classes, split_classes
from implicit_optim.tasks._mini_imagenet import mini_imagenet
from implicit_optim.tasks._networks import MLP, ConvNet
from implicit_optim.tasks._omniglot import omniglot, omniglot_splits
from implicit_optim.tasks._sinusoids import sinusoids
from implicit_optim.tasks._splits import Splits
from implicit_optim.tasks._stream import Batch, Episode, Stream

__all__ = [
    "Batch",
    "ConvNet",
    "Episode",
    "Episodes",
    "MLP",
    "Splits",
    "Stream",
    "mini_imagenet",
    "omniglot",
    "omniglot_splits",
    "rotate_classes",
    "sinusoids",
    "split_classes",
]
