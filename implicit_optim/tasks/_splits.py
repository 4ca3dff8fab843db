"""What a data set in three parts is given as."""

from typing import NamedTuple

from torch import Tensor


class Splits(NamedTuple):
    """The three parts of a data set of images.

    Attributes:
        train: `[classes, examples, *shape]` to meta-train on.
        val: `[classes, examples, *shape]` of other classes, to choose settings by.
        test: `[classes, examples, *shape]` of yet other classes, to report.

    Examples:
        >>> import torch
        >>> Splits(*torch.eye(3)).val
        tensor([0., 1., 0.])
    """

    train: Tensor
    val: Tensor
    test: Tensor
