"""ConvNet and MLP against hand-computed counts and a forward pass written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from implicit_optim.tasks import MLP, ConvNet

OMNIGLOT = {"ways": 5}
MINI_IMAGENET = {"ways": 5, "in_channels": 3, "image_size": 84, "filters": 32, "max_pool": True}


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts():
    # conv: in * out * 9 + out; batch norm: 2 * out; head: pixels * out * ways + ways
    blocks = (9 * 64 + 64) + 3 * (64 * 64 * 9 + 64) + 4 * 2 * 64
    assert count(ConvNet(**OMNIGLOT)) == blocks + (2 * 2 * 64 * 5 + 5) == 113_221
    blocks = (3 * 9 * 32 + 32) + 3 * (32 * 32 * 9 + 32) + 4 * 2 * 32
    assert count(ConvNet(**MINI_IMAGENET)) == blocks + (5 * 5 * 32 * 5 + 5) == 32_901


@pytest.mark.parametrize("settings", [OMNIGLOT, MINI_IMAGENET])
def test_forward_is_the_formula(settings):
    torch.manual_seed(0)
    net = ConvNet(**settings, zero_head=False).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    size, channels = settings.get("image_size", 28), settings.get("in_channels", 1)
    x = torch.rand(6, channels, size, size, dtype=torch.float64)
    pool = settings.get("max_pool", False)
    weights = list(net.parameters())
    h = x
    for i in range(0, 16, 4):
        weight, bias, scale, shift = weights[i : i + 4]
        h = F.conv2d(h, weight, bias, stride=1 if pool else 2, padding=1)
        mean = h.mean((0, 2, 3), keepdim=True)
        var = ((h - mean) ** 2).mean((0, 2, 3), keepdim=True)
        h = (h - mean) / (var + 1e-5).sqrt() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        h = h.clamp(min=0)
        if pool:
            side = h.shape[-1] // 2
            h = h[..., : 2 * side, : 2 * side]
            h = h.reshape(*h.shape[:2], side, 2, side, 2).amax((3, 5))
    expected = h.reshape(6, -1) @ weights[16].T + weights[17]
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)


def test_batch_norm_keeps_nothing():
    torch.manual_seed(0)
    net = ConvNet(5, zero_head=False)
    x = torch.rand(8, 1, 28, 28)
    assert list(net.buffers()) == []
    before = net.train()(x)
    net(100 * torch.rand(8, 1, 28, 28))
    assert torch.equal(net.eval()(x), before)


def test_zero_head_starts_at_chance_and_the_default_head_does_not():
    x, y = torch.rand(10, 1, 28, 28), torch.arange(5).repeat(2)
    assert F.cross_entropy(ConvNet(5)(x), y).item() == pytest.approx(1.6094379)  # log 5
    assert ConvNet(5, zero_head=False)(x).abs().max() > 1e-3


@pytest.mark.parametrize("max_pool", [False, True])
def test_gradients_of_tasks_under_vmap_are_those_of_a_loop(max_pool):
    torch.manual_seed(0)
    net = ConvNet(3, image_size=16, filters=4, max_pool=max_pool, zero_head=False).double()
    tasks, n = 3, 6
    phi = {k: torch.randn(tasks, *p.shape, dtype=torch.float64) for k, p in net.named_parameters()}
    x = torch.rand(tasks, n, 1, 16, 16, dtype=torch.float64)
    y = torch.randint(3, (tasks, n))

    def loss(p, x, y):
        return F.cross_entropy(functional_call(net, p, (x,)), y)

    together = vmap(grad(loss))(phi, x, y)
    for t in range(tasks):
        net.load_state_dict({name: value[t] for name, value in phi.items()})
        net.zero_grad()
        F.cross_entropy(net(x[t]), y[t]).backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(together[name][t], p.grad, rtol=1e-9, atol=1e-10)


def test_meta_device_gives_shapes_without_memory():
    with torch.device("meta"):
        net = ConvNet(**MINI_IMAGENET)
        logits = net(torch.empty(4, 3, 84, 84))
    assert logits.is_meta and logits.shape == (4, 5)
    assert count(net) == 32_901


def test_odd_sizes_round_up_with_strides_and_down_with_pooling():
    assert ConvNet(5, image_size=84, blocks=4).head.in_features == 64 * 6 * 6
    assert ConvNet(5, image_size=84, blocks=4, max_pool=True).head.in_features == 64 * 5 * 5
    assert ConvNet(5, image_size=1).head.in_features == 64
    with pytest.raises(ValueError, match="Invalid image_size: 15 .* at least 16"):
        ConvNet(5, image_size=15, max_pool=True)


@pytest.mark.parametrize("name", ["ways", "in_channels", "image_size", "filters", "blocks"])
def test_bad_counts_are_named(name):
    with pytest.raises(ValueError, match=f"Invalid {name}: 0"):
        ConvNet(**({"ways": 5} | {name: 0}))


def test_mlp_is_the_formula():
    torch.manual_seed(0)
    net = MLP(2, (4, 3), 1).double()
    x = torch.randn(5, 7, 2, dtype=torch.float64)
    w1, b1, w2, b2, w3, b3 = net.parameters()
    expected = ((x @ w1.T + b1).tanh() @ w2.T + b2).tanh() @ w3.T + b3
    torch.testing.assert_close(net(x), expected)
    assert count(MLP(1, (40, 40), 1)) == 80 + 1640 + 41


def test_mlp_activation_and_no_hidden_layer():
    net = MLP(1, (8,), 1, activation=torch.nn.ReLU)
    assert [type(layer) for layer in net.layers][1] is torch.nn.ReLU
    assert count(MLP(3, (), 2)) == 8
    with pytest.raises(ValueError, match=r"Invalid hidden\[1\]: 0"):
        MLP(1, (8, 0), 1)
