"""The networks of the few-shot papers: four conv blocks, and a small perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from implicit_optim.tasks._checks import check_positive


@final
class ConvNet(nn.Module):
    r"""The convolutional network of MAML and iMAML: `blocks` conv blocks and a linear head.

    $$h_{k+1} = \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}_{3 \times 3}(h_k))), \quad
    \mathrm{logits} = W \;\mathrm{flatten}(h_K) + c$$

    Each block halves the image: with a stride of 2 (Omniglot, the default) or with a 2x2 max-pool
    after the ReLU (Mini-ImageNet: `in_channels=3, image_size=84, filters=32, max_pool=True`).
    Batch norm always uses the statistics of the batch it is given and keeps none, so there are no
    buffers, and the network works under `torch.func.functional_call` and `vmap`, in `train()` and
    `eval()` alike. An image's logits therefore depend on the images beside it, as in the papers.

    A last layer of zeros (`zero_head`) starts each task at logits of zero, a loss of log(ways). It
    matters: on Omniglot (5 ways, 1 shot) with a proximal strength of 0.5 the exact Hessian of the
    inner problem met negative curvature in 0.3 % of the tasks, while the usual random last layer
    with the usual strength of 2 met it in most, where conjugate gradients break down.

    Args:
        ways: classes, hence logits.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels.
        filters: channels of every block.
        blocks: number of blocks.
        max_pool: halve with 2x2 max-pooling, rounding sizes down, not with strides, rounding up.
        zero_head: start the weights and biases of the last layer at zero.

    Raises:
        ValueError: if a count is not positive, or pooling leaves nothing of the image.

    Examples:
        >>> import torch
        >>> net = ConvNet(ways=5)
        >>> sum(p.numel() for p in net.parameters()), len(list(net.buffers()))
        (113221, 0)
        >>> logits = net(torch.rand(10, 1, 28, 28))
        >>> logits.shape, logits.abs().max().item()
        (torch.Size([10, 5]), 0.0)

    Source: Rajeswaran et al., "Meta-Learning with Implicit Gradients" (2019), appendix; the blocks
    are those of Vinyals et al., "Matching Networks for One Shot Learning" (2016), section 4.1.
    """

    def __init__(
        self,
        ways: int,
        *,
        in_channels: int = 1,
        image_size: int = 28,
        filters: int = 64,
        blocks: int = 4,
        max_pool: bool = False,
        zero_head: bool = True,
    ) -> None:
        super().__init__()
        check_positive(
            ways=ways,
            in_channels=in_channels,
            image_size=image_size,
            filters=filters,
            blocks=blocks,
        )
        size = image_size
        for _ in range(blocks):
            size = size // 2 if max_pool else (size + 1) // 2
        if size < 1:
            raise ValueError(
                f"Invalid image_size: {image_size} is too small for {blocks} blocks with max_pool "
                f"(give at least {2**blocks}, or fewer blocks)"
            )
        channels = [in_channels] + [filters] * blocks
        self.blocks = nn.Sequential(*(_block(a, b, max_pool) for a, b in pairwise(channels)))
        self.head = nn.Linear(filters * size * size, ways)
        if zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Float[Tensor, "N channels size size"]) -> Float[Tensor, "N ways"]:
        """Give the logits of a batch of images.

        Args:
            x: `[N, in_channels, image_size, image_size]`, in [0, 1].

        Returns:
            Logits `[N, ways]`.
        """
        logits: Tensor = self.head(self.blocks(x).flatten(1))
        return logits


def _block(in_channels: int, out_channels: int, max_pool: bool) -> nn.Sequential:
    layers = [
        nn.Conv2d(in_channels, out_channels, 3, stride=1 if max_pool else 2, padding=1),
        nn.BatchNorm2d(out_channels, track_running_stats=False),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if max_pool else []))


@final
class MLP(nn.Module):
    r"""A multi-layer perceptron: linear layers with an activation between them.

    $$h_{k+1} = \sigma(W_k h_k + b_k), \quad y = W_K h_K + b_K$$

    The default, tanh, has second derivatives everywhere; ReLU has none at its kinks, where
    Hessian products and Newton steps lose their meaning.

    Args:
        in_features: features of an input.
        hidden: width of each hidden layer; the sinusoids use `(40, 40)`.
        out_features: features of an output.
        activation: makes one activation module.

    Raises:
        ValueError: if a width is not positive.

    Examples:
        >>> import torch
        >>> net = MLP(1, (40, 40), 1)
        >>> sum(p.numel() for p in net.parameters()), net(torch.zeros(7, 1)).shape
        (1761, torch.Size([7, 1]))

    Source: Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks"
    (2017), section 5.1 (with ReLU).
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        check_positive(
            in_features=in_features,
            out_features=out_features,
            **{f"hidden[{i}]": width for i, width in enumerate(hidden)},
        )
        widths = [in_features, *hidden]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), activation()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], out_features))

    def forward(
        self, x: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Give the outputs of a batch of inputs.

        Args:
            x: `[*batch, in_features]`.

        Returns:
            `[*batch, out_features]`.
        """
        y: Tensor = self.layers(x)
        return y
