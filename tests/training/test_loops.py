"""Loops as people write them: with a budget of nothing they train as before, with a budget the loss rises."""

import copy
import gc
import pickle
import random
from typing import Any

import numpy
import pytest
import torch
import torchattacks
from pytorch_metric_learning import losses
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint
from written_loops import LABELS, REFUSED, SHAPES, Shape, images, net

from pml_adversarial import AdversarialLoss, AdversarialMiner, CaptureError, ReplayError, hookimpl

NOTHING = {"eps": 1e-6, "steps": 1, "keep_clean": False}
SOMETHING = {"eps": 0.1, "steps": 3}


_OF_TORCH = pytest.mark.filterwarnings(  # that a hook of all modules is there, and what dynamo asks of any tensor
    "ignore:Using .torch.compile.module.. when there are global hooks", "ignore:The .grad attribute of a Tensor"
)


def shapes(every=1, **wanted):
    """All shapes of which this is true; all but every n-th are slow."""
    chosen = [name for name, found in SHAPES.items() if all(getattr(found, key) == v for key, v in wanted.items())]
    return [
        pytest.param(
            name,
            id=name,
            marks=[_OF_TORCH] * SHAPES[name].compiles + [pytest.mark.slow] * (SHAPES[name].slow or number % every > 0),
        )
        for number, name in enumerate(chosen)
    ]


@pytest.fixture
def shape(name, request):
    if SHAPES[name].single:
        request.getfixturevalue("single")
    return SHAPES[name]


class Noted:
    """A loss or a miner in a loop, which looks at modules, and at what their hooks keep, before and after each call."""

    def __init__(self, wrapped, loop):
        self.wrapped, self.loop, self.records = wrapped, loop, []

    def __call__(self, *args, inputs=None, **kwargs):
        if not isinstance(self.wrapped, AdversarialLoss | AdversarialMiner):
            return self.wrapped(*args, **kwargs)
        given = {} if inputs is None else {"inputs": inputs}
        before, kept = attributes_of(self.loop.holds), self.loop.kept()
        found = self.wrapped(*args, **kwargs, **given)
        assert attributes_of(self.loop.holds) == before
        assert [*map(id, self.loop.kept())] == [*map(id, kept)]
        self.records.append(self.wrapped.records)
        return found


class Run:
    """A loop with its losses, plain or wrapped."""

    def __init__(self, shape, named=True, **options):
        torch.manual_seed(0)
        self.loop = shape.build()
        plain = [make() for make in self.loop.losses]
        self.parameters = [p for m in (self.loop.holds, *plain) for p in m.parameters() if p.requires_grad]
        miner = [] if self.loop.miner is None else [self.loop.miner()]
        if options:
            model = self.loop.holds if self.loop.model is None else self.loop.model
            model = model if named else None
            options = {"warmup": 0, "guard": False, "seed": 0, **shape.options, **options}
            plain = [AdversarialLoss(loss, model, **options) for loss in plain]
            if shape.wraps_miner:
                miner = [AdversarialMiner(m, model, eps=options["eps"], seed=0) for m in miner]
        self.losses = plain
        self.tools = [Noted(tool, self.loop) for tool in (*plain, *miner)]

    def step(self, seed=None):
        """The value and the gradient of one step, with random numbers of this seed, or the coming ones."""
        if seed is not None:
            torch.manual_seed(seed)
        for parameter in self.parameters:
            parameter.grad = None
        value = self.loop.step(*self.tools)
        value.backward()
        return value.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]

    @property
    def records(self):
        return [records for tool in self.tools for records in tool.records]


def attributes_of(holds):
    """What modules and parameters hold, by identity. Numbers in buffers may move, as BatchNorm's do."""
    found: dict[Any, Any] = {p: (id(p.grad), p.requires_grad) for p in holds.parameters()}
    for name, module in holds.named_modules():
        for key, value in vars(module).items():
            items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            found[name, key] = id(value), [(at, id(item)) for at, item in items]
    return found


def assert_close(found, expected, tolerance=1e-3):
    """Within a share of the size of all gradients together."""
    (value, gradients), (plain, expected) = found, expected
    assert float(plain) > 0
    assert abs(float(value - plain)) <= tolerance * abs(float(plain))
    size = torch.stack([g.double().norm() for g in expected]).norm()
    apart = torch.stack([(g.double() - e.double()).norm() for g, e in zip(gradients, expected, strict=True)]).norm()
    assert float(size) > 0
    assert float(apart) <= tolerance * float(size)


def hooks():
    return {name: dict(value) for name, value in vars(nn_module).items() if name.endswith("_hooks")}


@pytest.mark.parametrize("name", shapes())
def test_with_a_budget_of_nothing_it_trains_as_the_plain_loop(shape):
    plain, run = Run(shape), Run(shape, **NOTHING)
    expected = plain.step(seed=1)
    if shape.second_pass:  # copies are embedded in the model's own mode, in a second pass
        expected = plain.step()
    assert_close(run.step(seed=1), expected)
    for records in run.records:
        assert records.num_perturbed > 0
        if not shape.varies:
            assert records.embedding_shift < 1e-4
    found = dict(run.loop.holds.named_buffers())
    for name, buffer in plain.loop.holds.named_buffers():
        torch.testing.assert_close(found[name], buffer, rtol=1e-4, atol=1e-5)


class Seen:
    """A plugin that keeps the perturbed inputs."""

    @hookimpl
    def pml_adversarial_record(self, plan, adversarial):
        self.rows, self.inputs = plan.rows, adversarial.inputs
        return {}


@pytest.mark.parametrize("name", shapes(in_order=True))
def test_with_a_budget_the_loss_is_that_of_the_loop_with_the_perturbed_images(shape):
    seen = Seen()
    plain, run = Run(shape), Run(shape, **SOMETHING, keep_clean=False, plugins=[seen])
    found = run.step(seed=1)
    if shape.second_pass:
        plain.step(seed=1)
    with torch.no_grad():
        plain.loop.x[seen.rows] = seen.inputs.reshape(len(seen.rows), *plain.loop.x.shape[1:])
    assert_close(found, plain.step(seed=None if shape.second_pass else 1), tolerance=1e-4)


@pytest.mark.parametrize("name", shapes())
def test_with_a_budget_the_loss_rises(shape):
    run = Run(shape, **SOMETHING)
    run.step(seed=1)
    for tool in run.tools:
        for records in tool.records:
            assert records.num_perturbed > 0
            assert records.embedding_shift > 1e-3
            if isinstance(tool.wrapped, AdversarialLoss):
                assert records.loss_after > records.loss_before


@pytest.mark.parametrize("name", shapes(every=3, only_named=False))
def test_it_is_the_same_with_and_without_the_model_named(shape):
    named, found = (Run(shape, named, **SOMETHING).step(seed=1) for named in (True, False))
    assert_close(found, named, tolerance=1e-6)


@pytest.mark.parametrize("name", shapes(every=3))
def test_each_step_begins_anew(shape):
    run, fresh = Run(shape, **SOMETHING), Run(shape, **SOMETHING)
    run.step(seed=1)
    torch.optim.SGD(run.parameters, lr=0.05).step()
    fresh.loop.holds.load_state_dict(copy.deepcopy(run.loop.holds.state_dict()))
    for mine, other in zip(fresh.tools, run.tools, strict=True):
        mine.wrapped.load_state_dict(copy.deepcopy(other.wrapped.state_dict()))
    second = run.step(seed=2)
    assert_close(fresh.step(seed=2), second, tolerance=1e-5)
    torch.optim.SGD(run.parameters, lr=0.05).step()
    value, _ = run.step()
    assert value.isfinite()


@pytest.fixture(scope="module")
def quick_collection():
    """What is there already is not gone through again: that takes half a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collection")
@pytest.mark.parametrize("name", shapes(every=3))
def test_no_hook_of_all_modules_stays(shape):
    gc.collect()
    nn.Identity()(torch.zeros(1))
    before = hooks()
    run = Run(shape, **NOTHING)
    run.step(seed=1)
    del run
    gc.collect()
    nn.Identity()(torch.zeros(1))  # the hook goes with the first call that nobody watches
    assert hooks() == before


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_adversarial_is_refused_and_left_as_it_was(name):
    found = REFUSED[name]
    run = Run(Shape(found.build), **NOTHING)

    def refused(*args, **kwargs):
        before, state = attributes_of(run.loop.holds), copy.deepcopy(run.loop.holds.state_dict())
        with pytest.raises(found.error, match=found.words):
            run.losses[0](*args, **kwargs)
        assert attributes_of(run.loop.holds) == before
        for key, value in run.loop.holds.state_dict().items():
            assert value.equal(state[key])
        raise StopIteration

    with pytest.raises(StopIteration):
        run.loop.step(refused)


@pytest.mark.parametrize("reduced", ["rows", "mean", "reference"])
def test_what_is_kept_of_earlier_steps_is_held_fixed(reduced):
    def trained(wrap):
        torch.manual_seed(0)
        model, x, found = net(), images(), []
        loss, optimizer = wrap(losses.MultiSimilarityLoss()), torch.optim.SGD(model.parameters(), lr=0.5)
        memory, mean = [], torch.zeros(8)
        for _ in range(4):
            optimizer.zero_grad()
            e = model(x)
            rows = torch.cat([e, *memory])
            if reduced == "mean":
                value = loss(e - mean, LABELS)
            elif reduced == "rows":
                value = loss(rows, LABELS.repeat(len(rows) // 8))
            else:
                value = loss(e, LABELS, ref_emb=rows, ref_labels=LABELS.repeat(len(rows) // 8))
            value.backward()
            optimizer.step()
            memory.append(e.detach())
            mean = 0.9 * mean + 0.1 * e.detach().mean(0)
            found.append((value.detach(), [p.grad.clone() for p in model.parameters()]))
            if isinstance(loss, AdversarialLoss):
                assert 0 < loss.num_perturbed <= 16
        return found

    plain = trained(lambda loss: loss)
    for mine, expected in zip(trained(lambda loss: AdversarialLoss(loss, warmup=0, **NOTHING)), plain, strict=True):
        assert_close(mine, expected)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(36, 8)

    def forward(self, x, state):
        return self.cell(x.flatten(1), state)


class Reads(nn.Module):
    """Reads a memory, which it takes after the images, or before them."""

    def __init__(self):
        super().__init__()
        self.net, self.of = net(), nn.Linear(8, 8)

    def forward(self, first, second):
        x, memory = (first, second) if first.ndim == 4 else (second, first)
        return self.net(x) + self.of(memory).mean(0)


def _state_that_is_detached(model, x, loss, state, step):
    e = model(x, state)
    return loss(e, LABELS), e.detach()


def _memory_before_the_images(model, x, loss, state, step):
    e = model(state, x)
    return loss(e, LABELS), e.detach()


def _conditioned_on_its_own_output(model, x, loss, state, step):
    return loss(model(x, model(x, torch.zeros(8, 8)).detach()), LABELS), state


def _queue_that_joins_the_batch(every):
    def batch(model, x, loss, queue, step):
        e = model(x)
        if step % every:
            return e.square().mean(), e.detach()
        return loss(torch.cat([e, queue]), LABELS.repeat(2)), e.detach()

    return batch


KEPT = {
    "state of a recurrent model": (Recurrent, _state_that_is_detached, {}),
    "memory": (Reads, _state_that_is_detached, {}),
    "memory before the images": (Reads, _memory_before_the_images, {"perturb_input": "second"}),
    "its own output": (Reads, _conditioned_on_its_own_output, {}),
    "queue": (net, _queue_that_joins_the_batch(1), {}),
    "queue in every third step": (net, _queue_that_joins_the_batch(3), {}),
}


@pytest.mark.parametrize(("build", "batch", "options"), KEPT.values(), ids=KEPT)
def test_what_was_detached_in_an_earlier_call_is_held_fixed(build, batch, options):
    def trained(wrap):
        torch.manual_seed(0)
        model, state, found = build(), torch.zeros(8, 8), []
        loss, optimizer = wrap(losses.MultiSimilarityLoss()), torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(7):
            optimizer.zero_grad()
            value, state = batch(model, images(step), loss, state, step)
            value.backward()
            optimizer.step()
            found.append((value.detach(), [p.grad.clone() for p in model.parameters()]))
        return found, loss

    plain, _ = trained(lambda loss: loss)
    found, loss = trained(lambda loss: AdversarialLoss(loss, warmup=0, **NOTHING, **options))
    for mine, expected in zip(found, plain, strict=True):
        assert_close(mine, expected)
    assert loss.num_perturbed == 8


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand, lambda: float(torch.rand(()))])
def test_random_numbers_of_any_library_are_drawn_again_to_check_the_loop(draw):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x) * (1 + draw() * self.training)

    model, loss_func = Scaled(), AdversarialLoss(losses.ContrastiveLoss(), warmup=0)
    for _ in range(2):
        loss_func(model(images()), LABELS).backward()
        assert loss_func.num_perturbed == 8


def test_a_check_that_fails_restores_all_random_numbers():
    model = net()
    loss_func = AdversarialLoss(losses.ContrastiveLoss(), warmup=0)
    embeddings = model(images())
    with torch.no_grad():
        model[1].weight.mul_(2)
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with pytest.raises(ReplayError):
        loss_func(embeddings, LABELS)
    after = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert before[2].equal(after[2])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_a_copy_perturbs_what_the_original_does(copied):
    model, x = net(), images()
    options = {"at": model[1], "bounds": (-4, 4), "eps": 0.01, "warmup": 0, "seed": 0, "guard": False}
    loss_func = AdversarialLoss(losses.ContrastiveLoss(), model, **options)
    others = copied({"model": model, "loss": loss_func})
    loss_func(model(x), LABELS)
    others["loss"](others["model"](x), LABELS)
    assert others["loss"].loss_after == pytest.approx(loss_func.loss_after, rel=1e-4)
    alone = copied(loss_func)
    with pytest.raises(CaptureError, match="no Linear that is this one ran"):
        alone(model(x), LABELS)


@pytest.mark.parametrize("make", [losses.ArcFaceLoss, losses.ProxyAnchorLoss, losses.NormalizedSoftmaxLoss])
def test_a_batch_of_one_image_is_perturbed_where_it_is_compared_with_weights(make):
    model = net()
    loss_func = AdversarialLoss(make(4, 8), model, eps=0.1, warmup=0)
    loss_func(model(images(rows=1)), LABELS[:1]).backward()
    assert loss_func.num_perturbed == 1
    assert loss_func.loss_after > loss_func.loss_before


class Conditioned(nn.Module):
    """Its forward leaves something of the images in a layer, which an activation checkpoint computes with."""

    class Layer(nn.Linear):
        condition: torch.Tensor
        last: torch.Tensor

        def forward(self, features):
            self.last = features.detach()
            return features + (super().forward(features) * self.condition).tanh()

    def __init__(self, checkpoints):
        super().__init__()
        self.flatten, self.checkpoints = nn.Sequential(nn.Flatten(), nn.Linear(36, 8)), checkpoints
        self.layer, self.head = self.Layer(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        self.layer.condition = 6 * (x.flatten(1)[:, :8] - 0.5)
        features = self.flatten(x)
        if self.checkpoints is not None:
            return self.head(checkpoint(self.layer, features, **self.checkpoints))
        return self.head(self.layer(features))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_compute_again_with_what_the_same_pass_left(reentrant, chunk):
    def gradients(checkpoints, chunk=None):
        torch.manual_seed(0)
        model = Conditioned(checkpoints)
        other = lambda objective: lambda x, labels: (x + 0.2 * torch.sin(30 * x)).clamp(0, 1)  # noqa: E731
        loss = AdversarialLoss(
            losses.ContrastiveLoss(), model, attack=other, keep_clean=False, guard=False, chunk=chunk
        )
        embeddings = model(images())
        left = model.layer.condition
        value = loss(embeddings, LABELS)
        value.backward()
        assert model.layer.condition is left
        assert len(model.layer.last) == 8
        return value.detach(), [p.grad for p in model.parameters()]

    expected = gradients(None)
    found = gradients({"use_reentrant": reentrant}, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep_clean", [True, False])
@pytest.mark.parametrize("is_leaf", [True, False])
def test_what_made_the_inputs_learns_from_perturbed_rows_too(is_leaf, keep_clean):
    """Learned inputs and prompts: a perturbed row is the row and a constant."""

    def gradient(wrap):
        torch.manual_seed(0)
        model, learned = net(), torch.full((8, 1, 6, 6), 0.01, requires_grad=True)
        x = learned + images().detach() if not is_leaf else (images() + 0.01).requires_grad_()
        return wrap(model, x), (x if is_leaf else learned)

    change = lambda objective: lambda x, labels: (x + 0.1).clamp(0, 1)  # noqa: E731

    def ours(model, x):
        loss = AdversarialLoss(losses.ContrastiveLoss(), model, attack=change, keep_clean=keep_clean, guard=False)
        return loss(model(x), LABELS)

    def by_hand(model, x):
        copies = model(x + ((x + 0.1).clamp(0, 1) - x).detach())
        if not keep_clean:
            return losses.ContrastiveLoss()(copies, LABELS)
        return losses.ContrastiveLoss()(torch.cat([model(x), copies]), LABELS.repeat(2))

    (value, leaf), (expected, its_leaf) = gradient(ours), gradient(by_hand)
    torch.testing.assert_close(value, expected)
    found = [torch.autograd.grad(v, w)[0] for v, w in ((value, leaf), (expected, its_leaf))]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attack", [torchattacks.CW, "backward"])
def test_weights_beside_the_model_have_no_gradient_of_the_attack(attack):
    """Also where the attack calls ``backward``, as CW of torchattacks does."""
    model, scale, weights = net(), torch.ones(8, requires_grad=True), torch.eye(8).requires_grad_()

    def backward(objective):
        def run(x, labels):
            given = x.clone().requires_grad_()
            functional.cross_entropy(objective(given), labels).backward()
            return (x + 0.1 * given.grad.sign()).clamp(0, 1)

        return run

    loss = AdversarialLoss(
        losses.TripletMarginLoss(2.0), model, attack=backward if attack == "backward" else attack, guard=False
    )
    value = loss(functional.linear(model(images()) * scale, weights), LABELS)
    assert scale.grad is weights.grad is None
    value.backward()
    assert scale.grad.any()
    assert weights.grad.any()
