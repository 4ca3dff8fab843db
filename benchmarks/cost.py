"""What a meta-gradient costs, in gradients, against the least it can cost.

K inner steps and C CG steps need K gradients, one query gradient (together: first-order MAML) and C
products. `limit` is first-order MAML's time in the same run plus 2.1 C gradients.
"""

import torch
import torch.nn.functional as F

import implicit_optim as iopt
from benchmarks.measure import interleaved, save, table
from implicit_optim.tasks import MLP, ConvNet, sinusoids

STEPS, CG_STEPS = 16, 5


def sinusoid(tasks):
    support, query = sinusoids(tasks=tasks, shots=10, queries=10).sample()
    return MLP(1, (40, 40), 1), F.mse_loss, support, query


def omniglot(tasks, ways, shots):
    def batch(examples):
        x = torch.rand(tasks, ways * examples, 1, 28, 28)
        return x, torch.arange(ways).repeat_interleave(examples).expand(tasks, -1)

    return ConvNet(ways), F.cross_entropy, batch(shots), batch(15 if ways == 5 else 5)


WORKLOADS = {
    "sinusoid MLP, T = 32": lambda: sinusoid(32),
    "Omniglot conv, 5-way 1-shot, T = 4": lambda: omniglot(4, 5, 1),
    "Omniglot conv, 5-way 1-shot, T = 16": lambda: omniglot(16, 5, 1),
    "Omniglot conv, 20-way 5-shot, T = 1": lambda: omniglot(1, 20, 5),
}


def measure(name):
    model, loss, support, query = WORKLOADS[name]()
    solver = iopt.gd(lr=0.01, max_steps=STEPS)

    def learner(rule):
        meta = iopt.MetaLearner(model, loss, solver=solver, lam=2.0, meta_gradient=rule)
        return lambda: meta(support, query).mean().backward()

    meta = iopt.MetaLearner(model, loss, solver=solver, lam=2.0)
    init = {k: p.detach().expand(len(support[0]), *p.shape) for k, p in model.named_parameters()}
    theta = ({k: p.detach() for k, p in model.named_parameters()}, meta.proximal())
    problem = iopt.InnerProblem.bind(meta.objective, init, theta, *support, batch_ndim=1)
    phi = problem.layout.ravel(init).clone()
    x = torch.randn_like(phi)
    kept = {c: c(problem, phi).linearize() for c in (iopt.Hessian, iopt.GaussNewton)}
    seconds = interleaved(
        {
            "gradient": lambda: problem.grad(phi),
            "product": lambda: kept[iopt.Hessian].mv(x),
            "product, rebuilt": lambda: iopt.Hessian(problem, phi).mv(x),
            "Gauss-Newton product": lambda: kept[iopt.GaussNewton].mv(x),
            "first order": learner(iopt.FirstOrder()),
            "implicit": learner(iopt.Implicit(iopt.CG(max_steps=CG_STEPS))),
            "implicit, Gauss-Newton": learner(
                iopt.Implicit(iopt.CG(max_steps=CG_STEPS), iopt.GaussNewton)
            ),
        }
    )
    unit = seconds.pop("gradient")
    limit = seconds["first order"] / unit + 2.1 * CG_STEPS
    row = {"workload": name} | {k: v / unit for k, v in seconds.items()}
    return row | {"limit": limit, "implicit / limit": seconds["implicit"] / unit / limit}


def main():
    torch.manual_seed(0)
    rows = [measure(name) for name in WORKLOADS]
    print(f"Cost in gradients, {STEPS} inner steps, {CG_STEPS} CG steps, medians of one run:\n")
    print(table(rows))
    print(f"\nsaved {save('cost', rows)}")
