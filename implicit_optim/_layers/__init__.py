"""Layers that stand in for a model's own inside a solve: the same values, cheaper second derivatives."""

from implicit_optim._layers._base import along_cotangents, plainly, recording
from implicit_optim._layers._batch_norm import BATCH_NORMS
from implicit_optim._layers._convolution import CONVOLUTIONS
from implicit_optim._layers._linear import LINEARS

STAND_INS = BATCH_NORMS | CONVOLUTIONS | LINEARS

__all__ = ["STAND_INS", "along_cotangents", "plainly", "recording"]
