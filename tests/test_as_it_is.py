"""The user's own module is called as it is: whatever it does beside calling layers by attribute.

Every kind under every meta-gradient, with its predictions, against plain torch (`plainly.py`).
"""

import contextlib
import threading
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import implicit_optim as iopt
from plainly import (
    LOOP,
    VMAP,
    Kind,
    Perceptron,
    assert_equal,
    by_module,
    check,
    every_rule,
    images,
    learner,
    of_library,
    one_gradient,
    over,
    patched,
    sequential,
    snapshot,
    vectors,
)

pytestmark = pytest.mark.usefixtures("double")


# -- the same perceptron, written in ways of its own (findings, part 1, rows 1 to 3, 7 and 10) -------

PERCEPTRONS = {}


def forward(name, **attributes):
    """Register a perceptron with this `forward`, and with attributes made of itself."""

    def register(function):
        def make():
            m = type("Own", (Perceptron,), {"forward": function})()
            for key, of_model in attributes.items():
                setattr(m, key, of_model(m))
            return m

        PERCEPTRONS[name] = Kind(make, sequential)

    return register


@forward("list of layers", layers=lambda m: [m.a, torch.tanh, m.b])
def _(self, x):
    for layer in self.layers:
        x = layer(x)
    return x


@forward("bound methods", go=lambda m: m.hidden, last=lambda m: m.b.forward)
def _(self, x):
    return self.last(self.go(x))


@forward("a lambda", f=lambda m: lambda x: m.a(x).tanh())
def _(self, x):
    return self.b(self.f(x))


@forward("by class", scales=lambda m: {m.a: 1.0})
def _(self, x):
    scale = self.scales.get(self.a, 3.0) if type(self.a) is nn.Linear else 2.0
    return self.b((scale * self.a(x)).tanh())


@forward("keywords")
def _(self, x):
    return self.b(input=F.linear(input=x, weight=self.a.weight, bias=self.a.bias).tanh())


@forward("by name")
def _(self, x):
    own = dict(self.named_parameters())
    *_, last = self.children()
    return last(F.linear(x, own["a.weight"], own["a.bias"]).tanh())


@forward("patches for a moment")
def _(self, x):
    """As libraries do that capture features."""
    kept, own = [], self.a.forward
    self.a.forward = lambda x: kept.append(own(x)) or kept[-1]
    try:
        self.a(x)
    finally:
        del self.a.forward
    return self.b(kept[0].tanh())


@forward("hooks for a moment")
def _(self, x):
    kept = []
    with self.a.register_forward_hook(lambda m, args, out: kept.append(out)):
        self.a(x)
    return self.b(sum(kept).tanh())


class Uncopyable(Perceptron):
    """Can be neither copied nor made without its word."""

    def __new__(cls, *args):
        assert args == ("as it was asked for",)
        return super().__new__(cls)

    def __init__(self, word):
        super().__init__()

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot be copied")


class Extracted(nn.Module):
    """A head on torchvision's graph of a body."""

    def __init__(self):
        super().__init__()
        vision = pytest.importorskip("torchvision.models.feature_extraction")
        body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.ReLU())
        self.body, self.b = vision.create_feature_extractor(body, {"1": "h"}), nn.Linear(4, 1)

    def forward(self, x):
        return self.b(self.body(x)["h"])


def patched_layer():
    m = Perceptron()
    m.a.forward = types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias), m.a)
    return m


def compiled_in_place():
    m = Perceptron()
    m.compile(backend="eager")
    return m


def with_accelerate():
    hooks = pytest.importorskip("accelerate.hooks")
    m = Perceptron()
    hooks.add_hook_to_module(m, hooks.ModelHook())
    hooks.add_hook_to_module(m.a, hooks.ModelHook())
    return m


def with_block(make):
    block, head = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".torch.jit.\w+. is deprecated")
        return nn.Sequential(make(block), head)


def lazy():
    m = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(1))
    m(torch.zeros(1, 3))
    return m


def compiled(m):
    return torch.compile(m, backend="eager")


MADE = {
    "patched forward": patched,
    "patched layer": patched_layer,
    "compiled in place": compiled_in_place,
    "torch.compile": lambda: compiled(Perceptron()),
    "compiled block": lambda: with_block(compiled),
    "accelerate hook": with_accelerate,
    "uncopyable": lambda: Uncopyable("as it was asked for"),
    "fx": lambda: fx.symbolic_trace(Perceptron()),
    "feature extractor": Extracted,
    "scripted": lambda: with_block(torch.jit.script),
    "traced": lambda: with_block(lambda m: torch.jit.trace(m, torch.randn(2, 3))),
    "lazy": lazy,
}
PERCEPTRONS |= {name: Kind(make, sequential) for name, make in MADE.items()}


@every_rule
@over(PERCEPTRONS)
def test_a_perceptron_in_its_own_way(kind, rule):
    check(kind, rule)


@pytest.mark.parametrize("rule", ["implicit", "unrolled"])
@over(PERCEPTRONS, "a lambda", "torch.compile", "fx", "scripted", "traced", "hooks for a moment")
def test_one_by_one_too(kind, rule):
    check(kind, rule, batching=LOOP)


class HooksOnce(Perceptron):
    """Registers hooks at the first call and says so in a flag, as transformers does."""

    def __init__(self):
        super().__init__()
        self.kept, self.installed = [], False

    def forward(self, x):
        if not self.installed:
            self.a.register_forward_hook(lambda m, args, out: self.kept.append(out))
            self.installed = True
        self.kept.clear()
        self.a(x)
        return self.b(sum(self.kept).tanh())


def test_hooks_that_a_model_installs_once():
    model = HooksOnce()
    support, query = vectors()
    meta = learner(model)
    accounts = [of_library(meta, support, query) for _ in range(3)]
    theirs = Kind(Perceptron).account("implicit", model, (support, query))
    for ours in accounts:
        assert_equal(ours, theirs)
    assert len(model.a._forward_hooks) == 1


@every_rule
@pytest.mark.parametrize("batching", [VMAP, LOOP], ids=["vmap", "loop"])
def test_the_module_is_what_it_was_after_an_error(batching, rule):
    model, (support, query) = Perceptron(), vectors()
    before, _alive = snapshot(model)
    output = model(query[0])
    for n in range(1, 30):
        calls = []

        def fail(m, args, out, calls=calls, n=n):
            calls.append(None)
            if len(calls) == n:
                raise ArithmeticError("on purpose")

        with model.b.register_forward_hook(fail), contextlib.suppress(ArithmeticError):
            meta = learner(model, rule=rule, batching=batching, on_solve=iopt.Ignore())
            one_gradient(meta, support, query)
        model.zero_grad()
        assert snapshot(model)[0] == before and torch.equal(model(query[0]), output)
        if len(calls) < n:
            return
    raise AssertionError("a meta-step has fewer calls than that")


# -- convolutions ------------------------------------------------------------------------------------


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 1)

    def forward(self, x):
        return self.last(self.conv(x).tanh().mean((-2, -1)))


class PatchedConv(Images):
    """A layer whose inner method is another one."""

    def __init__(self):
        super().__init__()
        self.conv._conv_forward = lambda x, w, b: F.conv2d(2 * x, w, b, padding=1)


class Ordered(Images):
    """Asks in two ways whether the image lies in order; and has another word for x."""

    def forward(self, x):
        h = self.conv(input=x)
        try:
            h.view(len(h), -1)
        except RuntimeError:
            h = 2 * h
        return self.last((h if h.stride(-1) == 1 else 3 * h).tanh().mean((-2, -1)))


IMAGES = {
    kind.__name__: Kind(kind, data=lambda: images(2)) for kind in (Images, PatchedConv, Ordered)
}


@every_rule
@over(IMAGES)
def test_convolutions(kind, rule):
    check(kind, rule)


class Stores(Images):
    """A hook keeps the features, which `forward` then reads; and who called."""

    def __init__(self):
        super().__init__()
        self.store, self.callers = {}, set()
        self.conv.register_forward_hook(lambda m, args, out: self.store.__setitem__("f", out))

    def forward(self, x):
        self.callers.add(threading.get_ident())
        self.conv(x)
        return self.last(self.store["f"].tanh().mean((-2, -1)))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rule", ["implicit", "unrolled"])
def test_nothing_runs_in_a_thread_unasked(rule, two_threads):
    large = lambda: images(2, size=51, support=2, query=2)  # noqa: E731  over 10,000 numbers a task
    meta, *_ = check(Kind(Stores, Images, data=large, sets=("store", "callers")), rule)
    assert meta.model.callers == {threading.get_ident()}
    assert torch.get_num_threads() == 2


class Format(Images):
    """Notes how its weight lies, and how the image that comes out of the convolution does."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def forward(self, x):
        h = self.conv(x)
        self.seen.add((self.conv.weight.stride(), h.stride()[-3:]))
        return self.last(h.tanh().mean((-2, -1)))


@every_rule
@pytest.mark.parametrize("batching", [None, VMAP, LOOP], ids=["default", "vmap", "loop"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_the_memory_format_is_the_users(last, batching, rule):
    order = torch.channels_last if last else torch.contiguous_format
    kind = Kind(
        lambda: Format().to(memory_format=order), Images, data=lambda: images(2), sets=("seen",)
    )
    meta, *_ = check(kind, rule, batching=batching)
    strides = {weight for weight, _ in meta.model.seen}
    assert strides == {(18, 1, 6, 2) if last else (18, 9, 3, 1)}
    if not last:
        assert {image for _, image in meta.model.seen} == {(16, 4, 1)}


# -- what goes in ------------------------------------------------------------------------------------


class Masked(Perceptron):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


class AnyWord(Masked):
    def forward(self, **words):
        return super().forward(words["x"], words["mask"])


class OneDictionary(Masked):
    def forward(self, batch):
        return super().forward(batch["x"], batch["mask"])


def masked():
    (x, y), (xq, yq) = vectors()
    mask = lambda x: (torch.rand_like(x) < 0.6).to(x)  # noqa: E731
    return ({"x": x, "mask": mask(x)}, y), ({"x": xq, "mask": mask(xq)}, yq)


def by_words(phi, inputs, of=None):
    """The oracle for all three: positional arguments for `Masked`."""
    return by_module(Masked())(phi, (inputs[0]["x"], inputs[0]["mask"]))


@every_rule
@pytest.mark.parametrize("batching", [None, LOOP], ids=["default", "loop"])
@pytest.mark.parametrize("make", [Masked, AnyWord, OneDictionary])
def test_a_dictionary_is_keywords_where_all_its_keys_are(make, batching, rule):
    check(Kind(make, output=by_words, data=masked), rule, batching=batching)


def test_a_lazy_layer_wants_one_batch_first():
    support, query = vectors()
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)batch through the model"):
        learner(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1)))(support, query)


@every_rule
def test_accelerate_in_half_precision(rule):
    """What it wraps around `forward` rounds; the oracle rounds alike, another order of sums not."""
    accelerate = pytest.importorskip("accelerate")
    torch.set_default_dtype(torch.float32)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        kind = Kind(lambda: accelerator.prepare(Perceptron()))
        near = {"rtol": 0.02, "atol": 0.01}
        check(kind, rule, tolerances=near, on_solve=iopt.Ignore())
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()


def test_an_error_before_a_call_lets_go_of_the_model():
    """A parameter that went away after the objective was made: other threads must not wait for it."""
    model = nn.Linear(2, 1)
    meta = iopt.MetaLearner(model, F.mse_loss, solver=iopt.gd(lr=0.1, max_steps=1))
    predict, phi = meta.objective.predict, {k: p.detach() for k, p in model.named_parameters()}
    weight = model.weight
    del model.weight
    with pytest.raises(KeyError, match="weight"):
        predict(phi, torch.ones(1, 2))
    model.weight = weight
    anchors = []
    thread = threading.Thread(target=lambda: anchors.append(meta.anchor()), daemon=True)
    thread.start()
    thread.join(10)
    assert [list(anchor) for anchor in anchors] == [["weight", "bias"]]
