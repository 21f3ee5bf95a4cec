import contextlib
import copy
import random
from functools import partial

import numpy
import pytest
import torch
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory, MultipleLosses
from torch import nn
from torch.nn import functional

from pml_adversarial.training.isolation import depends_on_mode, isolated, own_modules, preserved, random_stream


class Stop(Exception):
    pass


@contextlib.contextmanager
def left_normally(*modules):
    with isolated(*modules):
        yield


@contextlib.contextmanager
def left_by_exception(*modules):
    with contextlib.suppress(Stop), isolated(*modules):
        yield
        raise Stop


both_ways_out = pytest.mark.parametrize("leave", [left_normally, left_by_exception])


def modes(module):
    return {name: m.training for name, m in module.named_modules()}


@both_ways_out
class TestIsolated:
    def test_modes_come_back_per_module(self, moody_model, leave):
        moody_model.train()
        moody_model[1].eval()
        before = modes(moody_model)
        assert len(set(before.values())) == 2
        with leave(moody_model):
            assert not any(modes(moody_model).values())
            moody_model.train()
        assert modes(moody_model) == before

    def test_buffers_come_back_as_the_same_tensors(self, moody_model, images, leave):
        objects = dict(moody_model.named_buffers())
        values = {name: buffer.clone() for name, buffer in objects.items()}
        with leave(moody_model):
            moody_model.train()
            moody_model(images)
            assert not torch.equal(moody_model[1].running_mean, values["1.running_mean"])
        after = dict(moody_model.named_buffers())
        assert all(after[name] is buffer for name, buffer in objects.items())
        assert all(torch.equal(after[name], value) for name, value in values.items())

    def test_buffers_that_were_replaced_or_added(self, leave):
        bn = nn.BatchNorm1d(3)
        original = bn.running_mean
        with leave(bn):
            bn.running_mean = torch.ones(3)
            bn.running_var = None
            bn.register_buffer("new", torch.ones(1))
        assert bn.running_mean is original
        assert set(bn.state_dict()) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}

    def test_buffers_without_a_tensor(self, leave):
        bn = nn.BatchNorm1d(3, track_running_stats=False)
        with leave(bn):
            bn(torch.rand(4, 3))
        assert bn.running_mean is None

    def test_a_graph_that_saved_a_buffer_can_be_walked_backward(self, leave):
        bn = nn.BatchNorm1d(3).eval()
        inputs = torch.rand(4, 3, requires_grad=True)
        output = bn(inputs)
        with leave(bn):
            bn.train()
            bn(torch.rand(4, 3))
        output.sum().backward()
        scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
        torch.testing.assert_close(inputs.grad, scale.expand(4, 3))

    def test_attributes_come_back(self, model, leave):
        model.counter, model.old = 1, "old"
        with leave(model):
            model.counter = 2
            model.new = 3
            del model.old
            model[1].in_features = 99
        assert (model.counter, model.old, model[1].in_features) == (1, "old", 36)
        assert not hasattr(model, "new")

    def test_gradients_come_back_as_the_same_tensors(self, model, images, leave):
        model[1].weight.grad = torch.ones(16, 36)
        original = model[1].weight.grad
        with leave(model):
            model.requires_grad_(True)
            model(images).sum().backward()
            assert model[1].weight.grad is not original
        assert model[1].weight.grad is original
        assert torch.equal(original, torch.ones(16, 36))
        assert model[3].weight.grad is None

    def test_requires_grad_comes_back(self, model, leave):
        model[1].weight.requires_grad_(False)
        with leave(model):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            model.requires_grad_(True)
        expected = {"1.weight": False, "1.bias": True, "3.weight": True, "3.bias": True}
        assert {name: p.requires_grad for name, p in model.named_parameters()} == expected

    def test_a_graph_made_before_still_gives_parameter_gradients(self, model, images, leave):
        model(images).sum().backward()
        expected = model[1].weight.grad
        model.zero_grad()
        output = model(images).sum()
        with leave(model):
            model(images)
        output.backward()
        assert torch.equal(model[1].weight.grad, expected)

    def test_gradient_is_enabled_inside_alone(self, model, leave):
        with torch.no_grad():
            with leave(model):
                assert torch.is_grad_enabled()
            assert not torch.is_grad_enabled()

    def test_shared_and_repeated_modules(self, leave):
        shared = nn.BatchNorm1d(3)
        one, other = nn.Sequential(shared), nn.Sequential(shared)
        original = shared.running_mean
        with leave(one, other, shared):
            one.train()
            other(torch.rand(4, 3))
        assert shared.running_mean is original
        assert torch.equal(original, torch.zeros(3))

    def test_nested(self, moody_model, images, leave):
        buffer = moody_model[1].running_mean
        with leave(moody_model):
            inner_buffer = moody_model[1].running_mean
            with leave(moody_model):
                moody_model.train()
                moody_model(images)
            assert moody_model[1].running_mean is inner_buffer
            assert not moody_model.training
        assert moody_model[1].running_mean is buffer
        assert moody_model.training


def test_an_exception_is_passed_on(model):
    with pytest.raises(Stop), isolated(model):
        raise Stop


def draws():
    return torch.rand(3).tolist(), numpy.random.rand(3).tolist(), [random.random() for _ in range(3)]  # noqa: NPY002


def streamed(seed, step):
    with random_stream(seed, step):
        return draws()


class TestRandomStream:
    @pytest.mark.parametrize("end", [contextlib.nullcontext, partial(contextlib.suppress, Stop)])
    def test_global_generators_come_back(self, end):
        states = torch.get_rng_state(), numpy.random.get_state(), random.getstate()  # noqa: NPY002
        expected = draws()
        torch.set_rng_state(states[0])
        numpy.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        with end(), random_stream(3, 4):
            draws()
            torch.manual_seed(7)
            numpy.random.seed(7)  # noqa: NPY002
            random.seed(7)
            if end is not contextlib.nullcontext:
                raise Stop
        assert draws() == expected

    def test_is_a_function_of_seed_and_step(self):
        first = streamed(3, 4)
        draws()
        assert streamed(3, 4) == first

    @pytest.mark.parametrize("other", [(3, 5), (4, 4), (0, 0), (4, 3)])
    def test_another_seed_or_step_draws_otherwise(self, other):
        assert all(a != b for a, b in zip(streamed(3, 4), streamed(*other), strict=True))

    def test_no_step_repeats_another(self):
        drawn = [streamed(seed, step) for seed in range(4) for step in range(25)]
        assert all(len({str(one[i]) for one in drawn}) == len(drawn) for i in range(3))

    def test_takes_any_seed_that_torch_has(self):
        for seed in (-(2**63), -1, 2**64 - 1):
            assert streamed(seed, 0) == streamed(seed, 0)

    def test_does_not_depend_on_the_global_generators(self):
        torch.manual_seed(1)
        first = streamed(0, 0)
        torch.manual_seed(2)
        assert streamed(0, 0) == first


class UserDropout(nn.Module):
    def forward(self, x):
        return functional.dropout(x, 0.5, self.training)


class InHelper(nn.Module):
    def forward(self, x):
        return self.noisy(x)

    def noisy(self, x):
        return x + torch.randn_like(x) if self.training else x


class InNestedFunction(nn.Module):
    def forward(self, x):
        return (lambda y: functional.dropout(y, training=self.training))(x)


class Inherited(UserDropout):
    pass


class Mixin:
    def noisy(self, x):
        return functional.dropout(x, 0.5, self.training)


class MixinBefore(Mixin, nn.Module):
    def forward(self, x):
        return self.noisy(x)


class MixinAfter(nn.Module, Mixin):
    def forward(self, x):
        return self.noisy(x)


class ModeAsProperty(nn.Module):
    @property
    def rate(self):
        return 0.5 if self.training else 0.0

    def forward(self, x):
        return functional.dropout(x, self.rate)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh())

    def forward(self, x):
        return functional.normalize(self.head(self.layers(x)))


DEPENDENT = [
    nn.BatchNorm1d(3),
    nn.Dropout(0.5),
    nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3))),
    nn.LSTM(3, 3, num_layers=2, dropout=0.5),
    nn.MultiheadAttention(4, 2, dropout=0.5),
    UserDropout(),
    InHelper(),
    InNestedFunction(),
    Inherited(),
    MixinBefore(),
    MixinAfter(),
    ModeAsProperty(),
]


def kind(module):
    return type(module).__name__


class TestDependsOnMode:
    @pytest.mark.parametrize("module", DEPENDENT, ids=kind)
    def test_in_train_mode_yes(self, module):
        assert depends_on_mode(module.train())

    @pytest.mark.parametrize("module", DEPENDENT, ids=kind)
    def test_in_eval_mode_no(self, module):
        assert not depends_on_mode(module.eval())
        module.train()

    @pytest.mark.parametrize("module", [Plain(), nn.Identity(), nn.Conv2d(1, 1, 3), nn.ReLU()], ids=kind)
    def test_of_plain_nets_no(self, module):
        assert not depends_on_mode(module.train())

    def test_frozen_batchnorm_in_a_model_that_trains_no(self):
        frozen = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).train()
        assert depends_on_mode(frozen)
        frozen[1].eval()
        assert not depends_on_mode(frozen)

    def test_any_of_several_modules(self):
        assert depends_on_mode(Plain(), UserDropout())
        assert not depends_on_mode(Plain(), UserDropout().eval())

    @pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script:DeprecationWarning")  # scripting is deprecated, but in use
    @pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script:FutureWarning")  # the same in newer releases of torch
    def test_scripted_modules_yes(self):
        assert depends_on_mode(torch.jit.script(nn.Linear(3, 3)))


class TestOwnModules:
    class Norm(nn.BatchNorm1d):
        pass

    class Chain(nn.Sequential):
        pass

    def test_are_those_that_may_decide_what_is_returned(self):
        model = self.Chain(nn.Linear(3, 3), self.Norm(3), nn.Dropout(), UserDropout(), Plain())
        assert [m for m in own_modules(model) if type(m) is not nn.Sequential] == [model, model[4]]

    def test_stay_in_their_mode_where_that_is_wanted(self):
        model = self.Chain(nn.Linear(3, 3), self.Norm(3), UserDropout(), Plain().eval())
        with isolated(model, but=own_modules(model)):
            assert [m.training for m in (model, *model)] == [True, False, False, False, False]
            assert not any(p.requires_grad for p in model.parameters())
        assert [m.training for m in (model, *model)] == [True, True, True, True, False]


@pytest.mark.filterwarnings(r"ignore:.torch\.jit\..*:DeprecationWarning", r"ignore:.torch\.jit\..*:FutureWarning")
def test_a_frozen_script_has_no_mode_and_gets_none():
    frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(3, 3)).eval()))
    model = nn.Sequential(frozen, nn.Dropout())
    with isolated(model):
        assert not model[1].training
    assert model[1].training
    assert not hasattr(frozen, "training")
    with preserved(model):
        model.eval()  # torch gives it a mode
    assert not hasattr(frozen, "training")
    assert not depends_on_mode(frozen)


def test_data_of_parameters_comes_back():
    linear = nn.Linear(3, 2)
    weight, data, address = linear.weight, linear.weight.detach().clone(), linear.weight.data_ptr()
    with preserved(linear):
        weight.data = weight.data.double() * 2  # as losses do that cast or normalise their own
    assert linear.weight is weight
    assert (weight.dtype, weight.data_ptr()) == (torch.float32, address)
    assert torch.equal(weight, data)


def test_parameters_that_were_exchanged_come_back_in_order():
    linear = nn.Linear(3, 2)
    before = list(linear.named_parameters())
    with preserved(linear):
        linear.weight = nn.Parameter(torch.zeros(2, 3))
        del linear.bias
        linear.other = nn.Parameter(torch.zeros(1))
    after = list(linear.named_parameters())
    assert [name for name, _ in after] == ["weight", "bias"]
    assert all(one is other for (_, one), (_, other) in zip(after, before, strict=True))


def test_a_frozen_parameter_that_a_pass_binds_to_other_data():
    linear = nn.Linear(3, 2).requires_grad_(False)
    before = linear.weight.clone()
    for learns in (True, False):
        with preserved(linear, learns=learns):
            linear.weight.data.mul_(2)
            linear.weight.data = linear.weight.data + 1
        assert torch.equal(linear.weight, before)


def test_lazy_modules_that_were_never_called():
    lazy = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with isolated(lazy):
        pass
    assert lazy(torch.rand(4, 2)).shape == (4, 3)


@both_ways_out
class TestQueue:
    """Of a memory only what is enqueued inside is kept, and written back."""

    LABELS = torch.arange(6) // 2

    def filled(self, size=16, rows=6):
        memory = CrossBatchMemory(ContrastiveLoss(), 4, memory_size=size)
        torch.manual_seed(0)
        for _ in range(2):
            memory(torch.randn(rows, 4), torch.arange(rows) // 2)
        return memory

    @pytest.mark.parametrize("size", [64, 16, 12, 7])
    def test_comes_back(self, size, leave):
        memory = self.filled(size)
        state = {name: value.clone() for name, value in memory.state_dict().items()}
        attributes = memory.queue_idx, memory.has_been_filled, memory.curr_batch_idx.tolist()
        objects = [memory.embedding_memory, memory.label_memory]
        with leave(memory):
            for _ in range(5):
                memory(torch.randn(6, 4), self.LABELS + 7)
            assert memory.embedding_memory is objects[0]  # not a copy of it, which may be large
            assert not torch.equal(memory.embedding_memory, state["embedding_memory"])
        assert memory.embedding_memory is objects[0]
        assert memory.label_memory is objects[1]
        assert all(torch.equal(value, state[name]) for name, value in memory.state_dict().items())
        assert attributes == (memory.queue_idx, memory.has_been_filled, memory.curr_batch_idx.tolist())
        assert "add_to_memory" not in vars(memory)

    def test_a_graph_made_before_can_be_walked_backward(self, leave):
        memory = self.filled()
        embeddings = torch.randn(6, 4, requires_grad=True)
        expected = torch.autograd.grad(copy.deepcopy(memory)(embeddings, self.LABELS), embeddings)[0]
        loss = memory(embeddings, self.LABELS)
        with leave(memory):
            memory(torch.randn(6, 4), self.LABELS)
        assert torch.equal(torch.autograd.grad(loss, embeddings)[0], expected)

    def test_a_graph_of_rows_that_are_gone_raises(self, leave):
        products = DotProductSimilarity(normalize_embeddings=False)  # the graph holds the memory itself
        memory, made = CrossBatchMemory(ContrastiveLoss(1, 0, distance=products), 4, memory_size=6), []
        memory(torch.randn(6, 4), self.LABELS)
        with leave(memory):
            made.append(memory(torch.randn(6, 4, requires_grad=True), self.LABELS))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            made[0].backward()

    def test_of_another_type(self, leave):
        memory = self.filled()
        before = memory.embedding_memory.clone()
        with leave(memory):
            memory(torch.randn(6, 4, dtype=torch.float64), self.LABELS)
            assert memory.embedding_memory.dtype == torch.float64
        assert torch.equal(memory.embedding_memory, before)

    def test_nested_and_in_several_losses(self, leave):
        memory = self.filled()
        several, before = MultipleLosses([memory]), memory.embedding_memory.clone()
        with leave(several):
            memory(torch.randn(6, 4), self.LABELS)
            outer = memory.embedding_memory.clone()
            with leave(memory):
                memory(torch.randn(6, 4), self.LABELS)
            assert torch.equal(memory.embedding_memory, outer)
        assert torch.equal(memory.embedding_memory, before)

    def test_a_copy_made_inside_has_a_queue_of_its_own(self, leave):
        memory, made = self.filled(), []
        with leave(memory):
            made.append(copy.deepcopy(memory))
            before = memory.embedding_memory.clone()
            made[0](torch.randn(6, 4), self.LABELS)
            assert torch.equal(memory.embedding_memory, before)
            assert not torch.equal(made[0].embedding_memory, before)

    def test_a_memory_that_writes_in_its_own_way(self, leave):
        class Own(CrossBatchMemory):
            def forward(self, embeddings, labels):
                self.embedding_memory[:] = 1
                return embeddings.sum()

        memory = Own(ContrastiveLoss(), 4, memory_size=16)
        with leave(memory):
            memory(torch.randn(6, 4), self.LABELS)
        assert not memory.embedding_memory.any()
