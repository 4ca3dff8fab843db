"""An inner problem that is larger than one device: phi, and every vector of a solve, in shards.

    torchrun --nproc-per-node 2 examples/sharded.py

First a linear model with its features spread over the processes, one DTensor: `minimize` and `attach`
take it as it is. Then a network whose layers are DTensors: each process lays its parts of all layers end
to end, and conjugate gradients run on what that makes, the shards of one vector. Nobody ever holds a
whole vector; what travels in CG itself are its dot products.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import implicit_optim as iopt

FEATURES, EXAMPLES, HIDDEN, LAM = 4000, 16, 32, 4.0


def draw(*shape, seed=0):
    """Random numbers, the same on every process."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def ridge(phi, theta, x, y):
    return (x @ phi - y).square().sum() / 2 + theta.exp() * phi.square().sum() / 2


def linear(place, linear_solver):
    """phi, and the gradient of an outer loss in the log weight decay; `place` shards a tensor."""
    x, asked = (place(draw(EXAMPLES, FEATURES, seed=i) / FEATURES**0.5, 1) for i in (1, 2))
    y, target = (place(draw(EXAMPLES, seed=i), None) for i in (3, 4))
    theta = place(torch.tensor(-1.0, dtype=torch.float64), None).requires_grad_()
    start = place(torch.zeros(FEATURES, dtype=torch.float64), 0)
    solver = iopt.newton_cg(tol=1e-11, linear_solver=iopt.CG(rtol=1e-12))
    phi = iopt.minimize(ridge, start, theta, x, y, solver=solver).value
    phi = iopt.attach(phi, ridge, theta, x, y, linear_solver=linear_solver)
    (asked @ phi - target).square().sum().backward()
    return phi.detach(), theta.grad


def curvature(layers, x, y):
    """Loss of a network with tanh, as a function of the products of its damped Hessian."""
    layers = [layer.detach().requires_grad_() for layer in layers]
    hidden, out = layers
    loss = F.mse_loss(torch.tanh(x @ hidden.mT) @ out, y)
    slopes = torch.autograd.grad(loss, layers, create_graph=True)

    def product(along):
        bent = torch.autograd.grad(slopes, layers, along, retain_graph=True)
        return [b + LAM * a for b, a in zip(bent, along, strict=True)]

    return product


def local(tensor):
    """This process's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor, part):
    """The tensor of which this is this process's part, placed like another."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements)


def network(place):
    """`(H + LAM)^-1 b` for the Hessian in all parameters of a network, as a list like its layers."""
    x, y = place(draw(EXAMPLES, 8, seed=5), None), place(draw(EXAMPLES, seed=6), None)
    layers = [place(draw(HIDDEN, 8, seed=7) / 3, 0), place(draw(HIDDEN, seed=8) / 6, 0)]
    b = [place(draw(HIDDEN, 8, seed=9), 0), place(draw(HIDDEN, seed=10), 0)]
    product = curvature(layers, x, y)

    def flat(parts):
        return like(parts[0], torch.cat([local(p).reshape(-1) for p in parts]))

    def unflat(vector):
        pieces = zip(local(vector).split([local(p).numel() for p in layers]), layers, strict=True)
        return [like(p, v.view_as(local(p))) for v, p in pieces]

    A = iopt.Linearized(lambda v: flat(product(unflat(v))), lambda r: r / LAM)
    solution = iopt.CG(rtol=1e-12).solve(A, flat(b))
    assert local(solution.status) == iopt.Status.SUCCESS, solution.summary()
    return unflat(solution.value)


def whole(tensor, dim):
    return tensor


def sharded(mesh):
    """`place` for a mesh: along a dimension, or the same on every process."""

    def place(tensor, dim):
        return distribute_tensor(tensor, mesh, [Replicate() if dim is None else Shard(dim)])

    return place


def main():
    dist.init_process_group()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = sharded(dist.init_device_mesh(device, (dist.get_world_size(),)))
    phi, slope = linear(place, iopt.CG(rtol=1e-12))
    layers = network(place)
    found = [phi.full_tensor(), slope.full_tensor(), *(layer.full_tensor() for layer in layers)]
    if dist.get_rank() == 0:
        reference = [*linear(whole, iopt.CG(rtol=1e-12)), *network(whole)]
        worst = max((a.cpu() - b).abs().max() for a, b in zip(found, reference, strict=True))
        print(f"each process holds {phi.to_local().numel()} of {phi.numel()} numbers of a vector")
        print(f"largest difference from one process: {worst:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
