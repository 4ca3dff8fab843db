"""Meta-training on few-shot images and what comes of it: the runs behind tables 2 and 3.

A run killed at any moment goes on where it was when the same command is given again, and ends with the
same bits on a CPU with the same number of threads.
"""

import copy
import json
import math
import os
import time
import warnings
from dataclasses import asdict, dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import implicit_optim as iopt
from benchmarks.measure import machine
from implicit_optim.tasks import Episodes

DAMPING = 1.0  # of the solve alone, not of the inner problem
CURVATURES = {
    "hessian": iopt.Hessian,
    "gauss-newton": iopt.GaussNewton,
    "safeguarded": iopt.SafeguardedHessian,
    "fisher": iopt.EmpiricalFisher,
    "damped": lambda problem, phi: iopt.Hessian(problem, phi) + DAMPING,
}
METHODS = {
    "imaml-gd": "iMAML, GD",
    "imaml-hf": "iMAML, Hessian-free",
    "maml": "MAML",
    "fomaml": "first-order MAML",
    "reptile": "Reptile",
}
NEWTON_STEPS, NEWTON_CG_STEPS = 3, 5  # Hessian-free: the paper's repeats and CG steps a direction
TEST_QUERIES = 15  # of a class
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run, but for data, device and number of threads."""

    method: str
    way: int
    shot: int
    train_shot: int  # support examples of a class while meta-training
    queries: int
    lam: float
    inner_lr: float
    inner_steps: int
    cg_steps: int
    curvature: str
    zero_head: bool
    tasks: int
    steps: int
    meta_lr: float
    cycles: int  # of meta_lr, by a cosine to 0; 0: constant
    validate_every: int
    test_tasks: int
    seed: int

    @property
    def title(self):
        return f"{self.way}-way {self.shot}-shot, {METHODS[self.method]}"


def comparison(args, steps, validate_every):
    """Settings of table 2, for short runs beside each other: 5-way 1-shot, lam = 0.5."""
    return Settings(
        method="imaml-gd",
        way=5,
        shot=1,
        train_shot=1,
        queries=15,
        lam=0.5,
        inner_lr=0.1,
        inner_steps=16,
        cg_steps=5,
        curvature="hessian",
        zero_head=True,
        tasks=args.tasks,
        steps=steps,
        meta_lr=1e-3,
        cycles=0,
        validate_every=validate_every,
        test_tasks=args.test_tasks,
        seed=0,
    )


def learner(model, s, on_solve=None):
    """The five methods: each is one or two arguments of `MetaLearner`."""
    curvature = CURVATURES[s.curvature]
    solver = iopt.gd(lr=s.inner_lr, max_steps=s.inner_steps)
    if s.method == "imaml-hf":
        solver = iopt.newton_cg(
            max_steps=NEWTON_STEPS,
            linear_solver=iopt.CG(max_steps=NEWTON_CG_STEPS),
            curvature=curvature,
        )
    rules = {
        "maml": iopt.Unrolled(),
        "fomaml": iopt.FirstOrder(),
        "reptile": iopt.Reptile(),
    }
    implicit = iopt.Implicit(iopt.CG(max_steps=s.cg_steps), curvature)
    return iopt.MetaLearner(
        model,
        F.cross_entropy,
        solver=solver,
        lam=s.lam,
        meta_gradient=rules.get(s.method, implicit),
        on_solve=on_solve or iopt.Ignore(),
        running_stats=iopt.RunningStats.PER_TASK if _tracks(model) else None,
    )


def _tracks(model):
    return any(getattr(m, "track_running_stats", False) for m in model.modules())


def normalised_by_support(model):
    """The same network, whose batch norm sees the support set and no query image."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.track_running_stats = True
            layer.running_mean = torch.zeros_like(layer.weight)
            layer.running_var = torch.ones_like(layer.weight)
    return model


def accuracy(model, s, images, tasks, seed, bar=None, solver=None):
    """Accuracy in % on the query sets of held-out classes: mean and half-width of its 95 % interval.

    The inner problem and its solver are those of the training, unless another solver is given. A task
    whose predictions are not finite is wrong from end to end, and is warned of.
    """
    meta, hits, whole = learner(model, s), [], []
    meta.solver = solver or meta.solver
    shape = {"ways": s.way, "shots": s.shot, "queries": TEST_QUERIES}
    size = min(20, tasks)
    for support, (x, y) in Episodes(
        images, tasks=size, seed=seed, steps=math.ceil(tasks / size), **shape
    ):
        with torch.no_grad():
            logits = meta.predict(meta.adapt(support), x)
        finite = logits.isfinite().all(-1)
        whole.append(finite.all(-1))
        hits.append(((logits.argmax(-1) == y) & finite).float().mean(-1))
        if bar is not None:
            bar.update(size)
    lost = (~torch.cat(whole)[:tasks]).sum().item()
    if lost:
        warnings.warn(
            f"{lost} tasks have predictions that are not finite, counted as wrong: the inner solver "
            "diverged there; lower --inner-lr",
            stacklevel=2,
        )
    hits = 100 * torch.cat(hits)[:tasks]
    return hits.mean().item(), 1.96 * hits.std().item() / math.sqrt(len(hits))


class Diverged(SystemExit):
    """A loss is not finite; it ends the command with advice."""


class Run:
    """One meta-training: `Run(settings, split, model, folder).finish()`.

    Args:
        settings: what is run.
        split: `Splits` of uint8 or float images, on the device.
        model: the network, on the device; this is what is trained.
        folder: of the checkpoint, the results and the picture.
    """

    def __init__(self, settings, split, model, folder):
        self.s, self.split, self.model, self.folder = settings, split, model, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.failed = []  # share of each meta-step's tasks in which CG met negative curvature
        self.meta = learner(model, settings, self._record).to(split.train.device)
        self.opt = torch.optim.Adam(self.meta.parameters(), lr=settings.meta_lr)
        lasts = settings.steps / settings.cycles if settings.cycles else math.inf
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.opt, lambda step: (1 + math.cos(math.pi * (step / lasts % 1))) / 2
        )
        self.episodes = Episodes(
            split.train,
            ways=settings.way,
            shots=settings.train_shot,
            queries=settings.queries,
            tasks=settings.tasks,
            steps=settings.steps,
            seed=settings.seed,
        )
        self.history = {"loss": [], "truncated": [], "validation": [], "seconds": 0.0}

    def _record(self, name, solution):
        if name == "linear_solve":
            negative = solution.status == iopt.Status.NEGATIVE_CURVATURE.value
            met = solution.stats.get("fallback", negative)
            self.failed.append(met.float().mean())

    # ------------------------------------------------------------------------------ checkpoints

    def _parts(self):
        return {
            "meta": self.meta,
            "opt": self.opt,
            "schedule": self.schedule,
            "episodes": self.episodes,
        }

    def load(self):
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True, map_location=self.split.train.device)
        then, now = state["settings"], asdict(self.s)
        if then != now:
            other = ", ".join(
                f"{k} {then.get(k)} (now {v})" for k, v in now.items() if then.get(k) != v
            )
            raise SystemExit(
                f"{path} is from a run with {other}: choose another --out, or delete it"
            )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.history = state["history"]

    def save(self):
        """Write, then rename: a kill at any moment leaves the old checkpoint or the new one."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"settings": asdict(self.s), "history": self.history}
        path = self.folder / "checkpoint.pt"
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    # --------------------------------------------------------------------------------- training

    def finish(self):
        """Train to the end, evaluate, and return the results; they are also in `results.json`."""
        self.load()
        self._train()
        results = {"settings": asdict(self.s)} | self._evaluate()
        results["minutes"] = self.history["seconds"] / 60
        results |= {"machine": machine() | {"device": str(self.split.train.device)}}
        results |= {k: v for k, v in self.history.items() if k != "seconds"}
        (self.folder / "results.json").write_text(json.dumps(results) + "\n")
        return results

    def _train(self):
        s, history = self.s, self.history
        began = saved = time.monotonic()
        before, step = history["seconds"], len(history["loss"])
        bar = tqdm(
            self.episodes, total=s.steps, initial=step, desc=METHODS[s.method], smoothing=0.05
        )
        for support, query in bar if step < s.steps else ():
            self._step(support, query, step)
            step += 1
            if step % s.validate_every == 0 or step == s.steps:
                reached = accuracy(self.model, s, self.split.val, 100, s.seed + 1)
                history["validation"].append((step, *reached))
                draw(history, s, self.folder / "learning_curve.png")
            bar.set_postfix_str(self._postfix())
            if time.monotonic() - saved >= CHECKPOINT_SECONDS or step == s.steps:
                saved = time.monotonic()
                history["seconds"] = before + saved - began
                self.save()

    def _step(self, support, query, step):
        losses = self.meta(support, query)
        loss = losses.mean()
        self.opt.zero_grad()
        loss.backward()
        if not math.isfinite(loss.item()):
            raise Diverged(
                f"meta-step {step}: the loss of {(~losses.isfinite()).sum()} of {len(losses)} tasks is "
                "not finite; lower --inner-lr or --meta-lr, or raise --lam"
            )
        self.opt.step()
        self.schedule.step()
        self.history["loss"].append(round(loss.item(), 6))
        if self.failed:
            self.history["truncated"].append(round(self.failed.pop().item(), 6))

    def _postfix(self):
        history = self.history
        said = [f"loss {history['loss'][-1]:.3f}"]
        if history["validation"]:
            said.append(f"unseen {history['validation'][-1][1]:.1f} %")
        if recent := history["truncated"][-20:]:
            said.append(f"negative curvature {100 * sum(recent) / len(recent):.0f} %")
        return ", ".join(said)

    def _evaluate(self):
        s, inductive = self.s, normalised_by_support(self.model)
        with tqdm(total=2 * s.test_tasks, desc="test tasks") as bar:
            found = {
                name: accuracy(model, s, self.split.test, s.test_tasks, s.seed + 2, bar)
                for name, model in (("transductive", self.model), ("support only", inductive))
            }
        return {
            name: {"accuracy": mean, "interval_95": half} for name, (mean, half) in found.items()
        }


def draw(history, s, path):
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    steps, values, halves = zip(*history["validation"], strict=True)
    left.errorbar(steps, values, halves, marker="o", ms=3, capsize=2)
    left.set(title=f"{s.title}: accuracy, unseen classes [%]", xlabel="meta-steps")
    window = max(1, len(history["loss"]) // 60)
    for name, label in (("loss", "query loss"), ("truncated", "share with negative curvature")):
        means = [part.mean().item() for part in torch.tensor(history[name]).split(window)]
        right.plot([(i + 0.5) * window for i in range(len(means))], means, label=label)
    right.set(title="training tasks", xlabel="meta-steps")
    right.set_ylim(bottom=0)
    right.legend()
    fig.savefig(path, dpi=150)
    plt.close(fig)
