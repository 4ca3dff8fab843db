"""Find wrong labels: a weight for each training example, learned by the implicit gradient.

    python examples/reweighting.py        # prints a table, saves a picture in runs/reweighting

Digits of scikit-learn; 45 % of the training labels are the next digit's (a one is called a two, a nine
a zero). A linear classifier is trained to convergence on the weighted examples; a hundred clean ones
judge it. The solution is a function of the weights, since they are data of the inner problem, and one
linear solve gives the gradient with respect to all of them.
"""

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import gallery
import implicit_optim as iopt

TRAIN, CLEAN, FLIPPED, DECAY, LR = 500, 100, 0.45, 0.01, 0.1
SOLVER = iopt.newton_cg(linear_solver=iopt.CG(max_steps=20), tol=1e-4, max_steps=50)


def objective(phi, decay, weight, x, y):
    """Weighted mean of the losses, and weight decay; only the weights' proportions matter."""
    losses = F.cross_entropy(x @ phi, y, reduction="none")
    return (weight * losses).sum() / weight.sum() + decay / 2 * phi.square().sum()


def fit(weight, x, y, start):
    """The best parameters for these weights, as a function of the weights."""
    decay = torch.tensor(DECAY).double()
    found = iopt.minimize(objective, start, decay, weight.detach(), x, y, solver=SOLVER)
    return iopt.attach(found.value, objective, decay, weight, x, y, on_solve=iopt.Raise())


def data(seed):
    """Training, clean and test examples `(x, y)`, and which training labels are wrong."""
    generator = torch.Generator().manual_seed(seed)
    train, clean, test = (
        (gallery.with_intercept(x), y) for x, y in gallery.digits(generator, TRAIN, CLEAN)
    )
    wrong = torch.rand(TRAIN, generator=generator) < FLIPPED
    return (train[0], torch.where(wrong, (train[1] + 1) % 10, train[1])), clean, test, wrong


def learn(train, clean, steps):
    """One weight in (0, 1) per training example, and the parameters that they give."""
    raw = torch.zeros(TRAIN, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.Adam([raw], lr=LR)
    phi = torch.zeros(65, 10).double()
    bar = tqdm(range(steps), desc="weights", unit="step")
    for _ in bar:
        phi = fit(
            raw.sigmoid(), *train, phi.detach()
        )  # from the last solution: the answer is the same
        loss = F.cross_entropy(clean[0] @ phi, clean[1])
        opt.zero_grad()
        loss.backward()
        opt.step()
        bar.set_postfix_str(f"clean loss {loss.item():.3f}")
    return raw.sigmoid().detach(), phi.detach()


def draw(weight, wrong, path):
    fig, axis = gallery.panels(1, figsize=(7, 3.8))
    bins = torch.linspace(0, 1, 21).tolist()
    parts, labels = (
        [weight[~wrong].tolist(), weight[wrong].tolist()],
        ["right label", "wrong label"],
    )
    axis.hist(parts, bins, color=[gallery.BLUE, gallery.ORANGE], label=labels)
    axis.set(xlabel="learned weight", ylabel="training examples")
    axis.legend(frameon=False)
    gallery.save(fig, path)


def main():
    args = gallery.arguments(__doc__, "reweighting", 60, "steps of the weights")
    train, clean, test, wrong = data(args.seed)
    start = torch.zeros(65, 10).double()
    both = [torch.cat(pair) for pair in zip(train, clean, strict=True)]
    weight, phi = learn(train, clean, args.steps)
    found = {
        "all training examples": fit(torch.ones(TRAIN).double(), *train, start),
        "the clean ones alone": fit(torch.ones(CLEAN).double(), *clean, start),
        "both together": fit(torch.ones(TRAIN + CLEAN).double(), *both, start),
        "learned weights": phi,
        "right labels only": fit((~wrong).double(), *train, start),
    }
    print(f"\nAccuracy in % on {len(test[1])} test digits:\n")
    for name, value in found.items():
        print(f"{name:24}{gallery.accuracy(test[0] @ value, test[1]):6.1f}")
    lowest = weight.argsort()[: int(wrong.sum())]
    print(f"\nWrong labels: {int(wrong.sum())} of {TRAIN}")
    print(f"AUC of the weights as a test for them: {roc_auc_score(~wrong, weight):.3f}")
    print(f"wrong among as many lowest weights: {100 * wrong[lowest].float().mean():.1f} %")
    draw(weight, wrong, args.out / "reweighting.png")


if __name__ == "__main__":
    main()
