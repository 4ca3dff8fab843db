"""What a meta-gradient costs, in gradients, against the least it can cost.

K inner steps and C CG steps need K gradients, one query gradient (together: first-order MAML) and C
products. `limit` is first-order MAML's time in the same run plus 2.1 C gradients.
"""

from dataclasses import replace

import torch

import implicit_optim as iopt
from benchmarks.measure import interleaved, save, table
from benchmarks.workloads import WORKLOADS

STEPS, CG_STEPS = 16, 5
MEASURED = ("sinusoid", "conv-4", "conv-16", "conv-32", "conv-20way-1", "conv-20way-4")


def measure(key):
    w = WORKLOADS[key]()
    model, loss, support, query = w.model, w.loss, w.support, w.query
    solver = iopt.gd(lr=0.01, max_steps=STEPS)

    def learner(rule):
        meta = iopt.MetaLearner(
            model, loss, solver=solver, lam=2.0, meta_gradient=rule, on_solve=iopt.Ignore()
        )
        return lambda: meta(support, query).mean().backward()

    meta = iopt.MetaLearner(model, loss, solver=solver, lam=2.0)
    init = {k: p.detach().expand(len(support[0]), *p.shape) for k, p in model.named_parameters()}
    theta = ({k: p.detach() for k, p in model.named_parameters()}, meta.proximal())
    # As the learner evaluates them, but for its threads: one task at a time where there are many images.
    many = iopt.Batching(chunk_size=1) if "20way" in key else iopt.Batching()
    problem = iopt.InnerProblem.bind(
        meta.objective, init, theta, *support, batch_ndim=1, batching=many
    )
    phi = problem.layout.ravel(init).clone()
    x = torch.randn_like(phi)
    alone = torch.no_grad()  # as inside a solve
    with alone:
        kept = {c: c(problem, phi).linearize() for c in (iopt.Hessian, iopt.GaussNewton)}
        one_by_one = replace(problem, batching=iopt.Batching(chunk_size=1))
        looped = iopt.Hessian(one_by_one, phi).linearize()
    seconds = interleaved(
        {
            "gradient": alone(lambda: problem.grad(phi)),
            "product": alone(lambda: kept[iopt.Hessian].mv(x)),
            "product, rebuilt": alone(lambda: iopt.Hessian(problem, phi).mv(x)),
            "product, a loop over tasks": alone(lambda: looped.mv(x)),
            "Gauss-Newton product": alone(lambda: kept[iopt.GaussNewton].mv(x)),
            "first order": learner(iopt.FirstOrder()),
            "implicit": learner(iopt.Implicit(iopt.CG(max_steps=CG_STEPS))),
            "implicit, Gauss-Newton": learner(
                iopt.Implicit(iopt.CG(max_steps=CG_STEPS), iopt.GaussNewton)
            ),
        },
        rounds=15 if key == "sinusoid" else 5,
    )
    unit = seconds.pop("gradient")
    limit = seconds["first order"] / unit + 2.1 * CG_STEPS
    row = {"workload": w.name} | {k: v / unit for k, v in seconds.items()}
    return row | {"limit": limit, "implicit / limit": seconds["implicit"] / unit / limit}


def main():
    torch.manual_seed(0)
    torch.set_num_threads(2)
    rows = [measure(key) for key in MEASURED]
    print(f"Cost in gradients, {STEPS} inner steps, {CG_STEPS} CG steps, medians of one run:\n")
    print(table(rows))
    print(f"\nsaved {save('cost', rows)}")
