"""The learner in the loops that people have: Accelerate, Lightning, and what torch itself brings.

Each time the oracle is a plain loop, or the formula by hand.
"""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import implicit_optim as iopt
from implicit_optim.tasks import MLP, sinusoids

ROOT = Path(__file__).resolve().parent.parent
STEPS, LR, CLIP, DECAY = 6, 0.02, 0.1, 0.5

pytestmark = pytest.mark.usefixtures("double")


def learner(**settings):
    torch.manual_seed(0)
    rule = iopt.Implicit(iopt.CG(max_steps=5), curvature=iopt.GaussNewton)
    solver = iopt.newton_cg(max_steps=3, curvature=iopt.GaussNewton)
    settings = {"lam": iopt.Proximal(0.5, learned=True), "meta_gradient": rule} | settings
    return iopt.MetaLearner(MLP(1, (6,), 1), F.mse_loss, solver=solver, **settings)


def episodes(steps=STEPS):
    return sinusoids(tasks=3, shots=5, queries=5, seed=7, steps=steps)


def training(meta):
    opt = torch.optim.Adam(meta.parameters(), lr=LR)
    return opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)


def plain(steps=STEPS, micro=1):
    """A loop by hand; `micro` episodes are one meta-step."""
    meta = learner()
    opt, schedule = training(meta)
    stream = episodes()
    for _ in range(steps // micro):
        opt.zero_grad()
        losses = torch.stack([meta(*stream.sample()).mean() for _ in range(micro)])
        losses.mean().backward()
        assert torch.nn.utils.clip_grad_norm_(meta.parameters(), CLIP) > CLIP
        opt.step()
        schedule.step()
    return meta


def same(ours, theirs, atol=0.0):
    one, two = ours.state_dict(), theirs.state_dict()
    assert one.keys() == two.keys()
    worst = max((t - two[name]).abs().max().item() for name, t in one.items())
    assert worst <= atol
    assert (one["proximal.lam"] - learner().proximal.lam).abs() > LR / 2  # it was learned


# -- Accelerate ------------------------------------------------------------------------------------


@pytest.fixture
def accelerate():
    module = pytest.importorskip("accelerate")
    yield module
    module.state.AcceleratorState._reset_state(True)  # one for the whole process
    module.state.GradientState._reset_state()


def test_accelerate_is_a_plain_loop_and_resumes(accelerate, tmp_path):
    """Accumulation, clipping, its scheduler and its checkpoint; the stream of tasks is in it too."""

    def prepared():
        meta = learner()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        parts, stream = accelerator.prepare(meta, *training(meta)), episodes()
        accelerator.register_for_checkpointing(stream)
        return accelerator, parts, stream

    def train(accelerator, parts, stream, until=None):
        meta, opt, schedule = parts
        for step, (support, query) in enumerate(stream, 1):
            with accelerator.accumulate(meta):
                accelerator.backward(meta(support, query).mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(meta.parameters(), CLIP)
                opt.step()
                schedule.step()
                opt.zero_grad()
            if step == until:
                break
        return accelerator.unwrap_model(meta)

    first = prepared()
    train(*first, until=4)
    first[0].save_state(tmp_path)
    second = prepared()
    second[0].load_state(tmp_path)
    same(train(*second), plain(micro=2), atol=1e-12)
    assert second[1][2].get_last_lr() == [pytest.approx(LR * 0.8**3)]


# -- Lightning -------------------------------------------------------------------------------------


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


def module_and_trainer(L, folder, steps):
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.meta = learner()

        def training_step(self, episode, _):
            return self.meta(*episode).mean()

        def validation_step(self, episode, _):
            self.log("error", self.meta(*episode).mean(), batch_size=3)

        def configure_optimizers(self):
            opt, schedule = training(self.meta)
            return [opt], [{"scheduler": schedule, "interval": "step"}]

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_steps": steps, "gradient_clip_val": CLIP, "enable_checkpointing": False}
    return Module(), L.Trainer(accelerator="cpu", default_root_dir=folder, **settings, **quiet)


# Lightning 2.6 builds pytrees as torch 2.15 would rather not have them built.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_lightning_is_a_plain_loop_and_resumes(lightning, tmp_path):
    """Automatic optimisation, clipping by the trainer, its checkpoint; the stream is the loader."""
    module, trainer = module_and_trainer(lightning, tmp_path, steps=4)
    trainer.fit(module, episodes(), episodes(steps=1))
    same(module.meta, plain(steps=4), atol=1e-12)
    trainer.save_checkpoint(tmp_path / "run.ckpt")

    module, trainer = module_and_trainer(lightning, tmp_path, steps=STEPS)
    trainer.fit(module, episodes(), episodes(steps=1), ckpt_path=tmp_path / "run.ckpt")
    same(module.meta, plain(), atol=1e-12)

    # Validation is in inference mode, where adapting differentiates all the same.
    (result,) = trainer.validate(module, episodes(steps=1), verbose=False)
    expected = module.meta(*episodes().sample()).mean().item()
    assert result["error"] == pytest.approx(expected, rel=1e-12)


# -- torch's own -----------------------------------------------------------------------------------


def test_micro_batches_of_tasks_accumulate_to_one_batch():
    """Six tasks as four and two: sums over tasks, divided by all of them."""
    meta = learner()
    episode = sinusoids(tasks=6, shots=5, queries=5).sample()
    whole = torch.autograd.grad(meta(*episode).mean(), list(meta.parameters()))
    for some in (slice(0, 4), slice(4, 6)):
        part = [[t[some] for t in batch] for batch in episode]
        (meta(*part).sum() / 6).backward()
    for p, expected in zip(meta.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-14)


def test_an_average_of_the_learner_adapts_and_a_run_with_all_of_it_resumes(tmp_path):
    """Exponential moving average, loss scaling, scheduler, stream: saved, and read as weights only."""

    def start():
        meta = learner()
        opt, schedule = training(meta)
        average = AveragedModel(meta, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        run = {"meta": meta, "opt": opt, "schedule": schedule, "average": average}
        return run | {"scaler": scaler, "stream": episodes()}

    def train(run, steps, seen):
        meta, scaler = run["meta"], run["scaler"]
        for _, episode in zip(range(steps), run["stream"], strict=False):
            run["opt"].zero_grad()
            scaler.scale(meta(*episode).mean()).backward()
            scaler.unscale_(run["opt"])
            torch.nn.utils.clip_grad_norm_(meta.parameters(), CLIP)
            scaler.step(run["opt"])
            scaler.update()
            run["schedule"].step()
            run["average"].update_parameters(meta)
            seen.append([p.detach().clone() for p in meta.parameters()])

    first, seen = start(), []
    train(first, 3, seen)
    torch.save({name: part.state_dict() for name, part in first.items()}, tmp_path / "run.pt")
    second = start()
    for name, state in torch.load(tmp_path / "run.pt", weights_only=True).items():
        second[name].load_state_dict(state)
    train(second, STEPS - 3, seen)

    same(second["meta"], plain())  # scaling by a power of two is exact
    assert second["scaler"].get_scale() == 2.0**13  # it grew every second step
    # By hand: the first is the average, then each takes half of what is new.
    average = seen[0]
    for step in seen[1:]:
        average = [DECAY * a + (1 - DECAY) * p for a, p in zip(average, step, strict=True)]
    by_hand = learner()
    with torch.no_grad():
        for p, a in zip(by_hand.parameters(), average, strict=True):
            p.copy_(a)
    averaged, (support, query) = second["average"].module, episodes().sample()
    phi, expected = averaged.adapt(support), by_hand.adapt(support)
    for name in phi:
        torch.testing.assert_close(phi[name], expected[name], rtol=1e-12, atol=1e-13)
    losses = second["average"](support, query)
    torch.testing.assert_close(losses, by_hand(support, query), rtol=1e-12, atol=1e-13)
    assert (losses - second["meta"](support, query)).abs().max() > 1e-4  # not the last iterate


def test_a_loss_scaler_skips_a_step_with_a_bad_task():
    meta = learner(on_solve=iopt.Ignore())
    opt, _ = training(meta)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in meta.parameters()]
    (x, y), query = episodes().sample()
    y[1, 0] = torch.nan
    scaler.scale(meta((x, y), query).mean()).backward()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(p, b) for p, b in zip(meta.parameters(), before, strict=True))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_another_learner(how):
    """After a call, so that it has a report; what the copy learns the original does not."""
    meta, episode = learner(), episodes().sample()
    before = meta(*episode)  # its graph is alive
    other = copy.deepcopy(meta) if how == "deepcopy" else pickle.loads(pickle.dumps(meta))
    assert str(other.report()) == str(meta.report()) and "3 of 3" in str(other.report())
    opt, _ = training(other)
    other(*episode).mean().backward()
    opt.step()
    assert all(p.grad is None for p in meta.parameters())
    assert torch.equal(meta(*episode), before)
    assert (other(*episode) - before).abs().max() > 1e-3


@pytest.mark.parametrize("learned", [True, False])
def test_a_learner_changes_its_dtype_as_a_whole(learned):
    torch.set_default_dtype(torch.float32)
    meta = learner(lam=iopt.Proximal(0.3, learned=learned))
    episode = episodes().sample()
    assert meta(*episode).dtype == torch.float32
    meta.to(torch.float64)
    torch.set_default_dtype(torch.float64)
    other = learner(lam=iopt.Proximal(0.3, learned=learned))
    other.load_state_dict(meta.state_dict())
    twice = [tuple(t.double() for t in batch) for batch in episode]
    losses = meta(*twice)
    losses.mean().backward()
    assert losses.dtype == torch.float64 and torch.equal(losses, other(*twice))
    assert all(p.grad.dtype == torch.float64 for p in meta.parameters())
    assert meta.proximal().dtype == torch.float64


# -- the page --------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["accelerate", "lightning"])
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_the_page_runs(library, request, tmp_path, monkeypatch):
    """Its blocks for libraries that need not be here; test_docs.py runs the others."""
    request.getfixturevalue(library)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "launchers.md").read_text(encoding="utf-8")
    setup = re.search(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE).group(1)
    (block,) = re.findall(rf"^```py\n((?:from|import) {library}.*?)^```", page, re.DOTALL | re.M)
    names = {}
    exec(setup, names)
    exec(block, names)
    if library == "accelerate":
        assert names["accelerator"].step % 2 == 0 and names["schedule"].get_last_lr()[0] < 1e-6
        assert names["phi"]["layers.0.weight"].shape == (8, 16, 1)
    else:
        assert names["trainer"].global_step == 20
        assert 0 < names["trainer"].callback_metrics["error"] < 25
