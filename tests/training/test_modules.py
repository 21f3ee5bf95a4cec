"""Modules that a function runs: found as they are called, and in what the function can reach."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm

from pml_adversarial.training.modules import modules_reached_by, modules_run_by

IMAGES = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """One image is refused in train mode, and a method looks at the mode by itself."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 3), nn.BatchNorm1d(3)

    def encode(self, images):
        found = self.norm(self.linear(images.flatten(1)))
        return batch_norm(found, self.norm.running_mean, self.norm.running_var, training=self.training)

    def forward(self, images):
        return self.encode(images)


class Service:
    def __init__(self, net):
        self.parts = {"net": net, "other": nn.Linear(2, 2)}

    def __call__(self, images):
        return self.parts["net"](images).tolist()


GLOBAL = Net()


def through_a_global(images):
    return GLOBAL.encode(images)


FORMS = {
    "call": lambda net: lambda images: net(images),
    "method": lambda net: lambda images: net.encode(images),
    "forward": lambda net: lambda images: net.forward(images),
    "bound method": lambda net: net.encode,
    "partial": lambda net: partial(lambda images, model: model(images), model=net),
    "function of a function": lambda net: (lambda inner: lambda images: inner(images))(lambda images: net(images)),
    "object": Service,
    "under no_grad": lambda net: torch.no_grad()(lambda images: net.encode(images)),
}


@pytest.mark.parametrize("form", FORMS)
def test_are_found_in_eval_mode_and_left_as_they_were(form):
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert modules_run_by(FORMS[form](net), IMAGES) == (net,)
    assert net.training
    assert net.norm.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_of_a_global():
    assert modules_run_by(through_a_global, IMAGES) == (GLOBAL,)


def test_that_nothing_reaches_are_found_as_they_are_called():
    hidden = {3: Net()}

    class Hiding:
        __slots__ = ()

        def __call__(self, images):
            return hidden[3](images)

    assert modules_run_by(Hiding(), IMAGES) == (hidden[3],)
    assert hidden[3].norm.num_batches_tracked == 0
    assert hidden[3].training


class Hiding(nn.Module):
    """It holds a net in some way that torch does not see."""

    def __init__(self, held):
        super().__init__()
        self.part = nn.Identity()
        self.part.held = held

    def forward(self, images):
        return self.part.held[0](images)


HIDING = {
    "tuple": lambda net: Hiding((net,)),
    "list": lambda net: Hiding([net]),
    "dict": lambda net: Hiding({0: net}),
    "bound method": lambda net: Hiding((net.encode,)),
    "function": lambda net: Hiding((lambda images: net.encode(images),)),
    "each other": lambda net: Hiding((net, [Hiding((net,))])),
}


@pytest.mark.parametrize("form", HIDING)
def test_a_module_holds_without_registering_them(form):
    net = Net()
    outer = HIDING[form](net)
    net.back = (outer,)
    assert set(modules_run_by(outer, IMAGES)) == {outer, net}
    assert net.norm.num_batches_tracked == 0
    assert net.training


def test_a_module_that_holds_itself_and_many_others_is_soon_looked_through():
    nets = [Hiding(()) for _ in range(100)]
    for net in nets:
        net.held = tuple(nets)
    assert set(modules_reached_by(nets[0])) == set(nets)


def test_others_that_are_reached_do_not_count():
    net, other = Net(), nn.Linear(4, 4)
    assert modules_run_by(lambda images: (net(images), other)[0], IMAGES) == (net,)


def test_of_a_function_without_modules():
    assert modules_run_by(lambda images: images.flatten(1), IMAGES) == ()


def test_a_compiled_module():
    net = Net().eval()
    compiled = torch.compile(net, backend="eager")
    assert modules_run_by(lambda images: compiled(images), IMAGES) == (compiled,)


def test_an_error_of_the_function_is_raised_and_all_is_as_it_was():
    net = Net()

    def fails(images):
        net(images)
        raise OSError("out of luck")

    with pytest.raises(OSError, match="out of luck"):
        modules_run_by(fails, IMAGES)
    assert net.training
    assert not torch.nn.modules.module._global_forward_pre_hooks


class GivesLess(Net):
    """In train mode it returns a score beside the embedding."""

    def forward(self, images):
        found = self.encode(images)
        return {"score": found.sum(1), "embedding": found} if self.training else found


def test_of_a_function_that_wants_what_is_given_in_train_mode_alone():
    net = GivesLess()
    assert modules_run_by(lambda images: net(images)["embedding"], IMAGES.repeat(2, 1, 1, 1)) == (net,)
    assert net.training
    assert net.norm.num_batches_tracked == 0
