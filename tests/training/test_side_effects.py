"""What forward passes leave behind outside of tensors is undone; what they cannot have changed stays as it is."""

import contextlib
import gc
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from functools import partial
from itertools import count

import numpy
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from pml_adversarial.training.side_effects import Values, keep_graphs, note_changed_buffers, undone, undone_with_values

SEEN_BY_A_HOOK = []
CALLS_SEEN_BY_A_HOOK = 0
NOT_SEEN_BY_ANY_HOOK = []
SAVED = []
PASSES = torch.zeros(())


class Recorder:
    def __init__(self):
        self.seen = []


RECORDER = Recorder()


def save(value):
    SAVED.append(value)


class Frozen(OrderedDict):
    """A dict that forbids to be updated, as outputs of transformers and configurations of diffusers."""

    def update(self, *args, **kwargs):
        raise TypeError("frozen")

    def pop(self, *args):
        raise TypeError("frozen")


class Stop(Exception):
    pass


@contextlib.contextmanager
def left_normally(*modules):
    with undone(modules):
        yield


@contextlib.contextmanager
def left_by_exception(*modules):
    with contextlib.suppress(Stop), undone(modules):
        yield
        raise Stop


both_ways_out = pytest.mark.parametrize("leave", [left_normally, left_by_exception])


class Slot:
    """An object without a dict."""

    __slots__ = ("held",)


@pytest.fixture
def module():
    return nn.Linear(2, 2)


@both_ways_out
class TestAttributes:
    def test_added_ones_are_gone(self, module, leave):
        with leave(module):
            module.features = torch.rand(2)
            module.names = ["a"]
        assert not hasattr(module, "features")
        assert not hasattr(module, "names")

    def test_changed_ones_name_their_objects_again(self, module, leave):
        module.features, module.calls = before = torch.rand(2), 3
        with leave(module):
            module.features, module.calls = torch.rand(2), 4
        assert (module.features, module.calls) == before
        assert module.features is before[0]

    def test_deleted_ones_are_back(self, module, leave):
        module.features = held = object()
        with leave(module):
            del module.features
        assert module.features is held

    def test_one_that_was_none_is_none(self, module, leave):
        module.cache = None
        with leave(module):
            module.cache = {}
        assert module.cache is None

    def test_one_that_becomes_another_kind_of_container_is_the_first_again(self, module, leave):
        module.cache = held = {"a": 1}
        with leave(module):
            module.cache["a"] = 2
            module.cache = []
        assert module.cache is held
        assert held == {"a": 1}

    def test_what_torch_keeps_itself_stays_as_it_is_changed(self, module, leave):
        other = nn.Parameter(torch.zeros(2, 2))
        with leave(module):
            module.eval()
            module.weight = other
            module.register_buffer("mean", torch.zeros(2))
        assert not module.training
        assert module.weight is other
        assert "mean" in dict(module.named_buffers())

    def test_of_modules_that_were_not_named_stay_as_they_are_changed(self, module, leave):
        outer = nn.Sequential(module)
        with leave(outer):
            module.calls = 1
        assert module.calls == 1

    def test_a_module_that_is_named_twice(self, module, leave):
        module.seen = [1]
        with leave(module, module):
            module.seen.append(2)
        assert module.seen == [1]


@both_ways_out
class TestContainersOfModules:
    CASES = (
        ([1, 2], lambda held: held.append(3)),
        ([1, 2], lambda held: held.clear()),
        ([2, 1], lambda held: held.sort()),
        ({"b": 1, "a": 2}, lambda held: held.update(c=1)),
        ({"b": 1, "a": 2}, lambda held: held.pop("b")),
        (OrderedDict(b=1, a=2), lambda held: held.move_to_end("b")),
        (defaultdict(list, b=1), lambda held: held["not there"]),
        ({1, 2}, lambda held: held.add(3)),
        ({1, 2}, lambda held: held.discard(1)),
        (deque([1, 2], maxlen=2), lambda held: held.append(3)),
        (deque([1, 2]), lambda held: held.rotate()),
    )

    @pytest.mark.parametrize("case", range(len(CASES)))
    def test_hold_again_what_they_held_in_order(self, module, leave, case):
        held, change = self.CASES[case]
        module.held = held
        before = list(held.items()) if isinstance(held, dict) else list(held)
        with leave(module):
            change(held)
            assert (list(held.items()) if isinstance(held, dict) else list(held)) != before
        assert (list(held.items()) if isinstance(held, dict) else list(held)) == before
        assert module.held is held

    def test_a_counter(self, module, leave):
        module.counts = Counter(a=2)
        with leave(module):
            module(torch.rand(2, 2))
        assert module.counts == {"a": 2}
        with leave(module):
            module.counts.update(a=1, b=1)
        assert module.counts == {"a": 2}

    def test_a_dict_that_forbids_changes(self, module, leave):
        module.config = Frozen(a=2)
        with leave(module):
            module.config["b"] = 1
        assert dict(module.config) == {"a": 2}

    def test_of_an_object_that_a_module_has(self, module, leave):
        module.recorder = recorder = Recorder()
        module.register_forward_hook(lambda module, *_: module.recorder.seen.append(1))
        with leave(module):
            module(torch.rand(2, 2))
            module.recorder = Recorder()
        assert module.recorder is recorder
        assert recorder.seen == []

    def test_a_bounded_deque_stays_bounded(self, module, leave):
        module.held = deque([1, 2], maxlen=2)
        with leave(module):
            module.held.append(3)
        module.held.append(4)
        assert list(module.held) == [2, 4]

    def test_hold_the_same_objects_again(self, module, leave):
        module.held = [object()]
        (before,) = module.held
        with leave(module):
            module.held[0] = object()
        assert module.held[0] is before

    def test_one_that_two_modules_share(self, leave):
        first, second = nn.Identity(), nn.Identity()
        first.log = second.log = [1]
        with leave(first, second):
            first.log.append(2)
            second.log.append(3)
        assert first.log == [1]
        assert first.log is second.log

    def test_one_that_holds_itself(self, module, leave):
        module.held = [1]
        module.held.append(module.held)
        with leave(module):
            module.held.append(2)
        assert len(module.held) == 2
        assert module.held[1] is module.held


def appends_to_closure():
    seen = []
    return (lambda *_: seen.append(1)), lambda: list(seen)


def counts_in_closure():
    calls = 0

    def hook(*_):
        nonlocal calls
        calls += 1

    return hook, lambda: calls


def keeps_in_object_of_closure():
    class Kept:
        features = None

    kept = Kept()

    def hook(module, args, output):
        kept.features = output

    return hook, lambda: kept.features


def appends_in_object_of_closure():
    class Kept:
        def __init__(self):
            self.features = []

    kept = Kept()
    return (lambda *_: kept.features.append(1)), lambda: list(kept.features)


def by_a_function_in_the_closure():
    seen = {}

    def write():
        seen[len(seen)] = 1

    return (lambda *_: write()), lambda: dict(seen)


def by_a_partial():
    seen = set()
    return partial(lambda kept, *_: kept.add(len(kept)), seen), lambda: set(seen)


def by_a_keyword_of_a_partial():
    seen = []
    return partial(lambda *_, kept: kept.append(1), kept=seen), lambda: list(seen)


def by_a_partial_of_a_closure():
    hook, held = counts_in_closure()
    return partial(hook, 1), held


def by_a_bound_method():
    class Recorder:
        def __init__(self):
            self.calls, self.seen = 0, []

        def hook(self, *_):
            self.calls += 1
            self.seen.append(self.calls)
            self.last = 1

    recorder = Recorder()
    return recorder.hook, lambda: (recorder.calls, list(recorder.seen), hasattr(recorder, "last"))


def by_a_callable_object():
    class Recorder:
        def __init__(self):
            self.seen = deque()

        def __call__(self, *_):
            self.seen.append(1)

    recorder = Recorder()
    return recorder, lambda: list(recorder.seen)


def by_a_default():
    seen = []

    def hook(module, args, output, kept=seen):
        kept.append(1)

    return hook, lambda: list(seen)


def by_a_default_of_a_keyword():
    seen = []

    def hook(*_, kept=seen):
        kept.append(1)

    return hook, lambda: list(seen)


def appends_to_a_global():
    def hook(*_):
        SEEN_BY_A_HOOK.append(1)

    return hook, lambda: list(SEEN_BY_A_HOOK)


def counts_in_a_global():
    def hook(*_):
        global CALLS_SEEN_BY_A_HOOK
        CALLS_SEEN_BY_A_HOOK += 1

    return hook, lambda: CALLS_SEEN_BY_A_HOOK


def by_an_object_that_is_global():
    return (lambda *_: RECORDER.seen.append(1)), lambda: list(RECORDER.seen)


def by_a_function_that_is_global():
    return (lambda *_: save(1)), lambda: list(SAVED)


def by_itself():
    def hook(*_):
        hook.calls += 1

    hook.calls = 0
    return hook, lambda: hook.calls


def by_a_list_in_a_dict():
    kept = {"a": [], "b": {"c": set()}}

    def hook(*_):
        kept["a"].append(1)
        kept["b"]["c"].add(len(kept["a"]))

    return hook, lambda: (list(kept["a"]), set(kept["b"]["c"]))


def by_an_outer_module():
    """As ``self`` of a module that holds the model."""
    outer = nn.Module()
    outer.seen = []
    return (lambda *_: outer.seen.append(1)), lambda: list(outer.seen)


def by_a_helper_that_calls_itself():
    seen = []

    def visit(depth):
        seen.append(depth)
        return depth and visit(depth - 1)

    return (lambda *_: visit(2) and None), lambda: list(seen)


HOOKS = [
    by_an_object_that_is_global,
    by_a_function_that_is_global,
    by_itself,
    by_a_list_in_a_dict,
    by_an_outer_module,
    by_a_helper_that_calls_itself,
    appends_to_closure,
    counts_in_closure,
    keeps_in_object_of_closure,
    appends_in_object_of_closure,
    by_a_function_in_the_closure,
    by_a_partial,
    by_a_keyword_of_a_partial,
    by_a_partial_of_a_closure,
    by_a_bound_method,
    by_a_callable_object,
    by_a_default,
    by_a_default_of_a_keyword,
    appends_to_a_global,
    counts_in_a_global,
]


@pytest.fixture(params=HOOKS, ids=lambda make: make.__name__)
def recording(request):
    """A hook, and what gives what it has kept."""
    return request.param()


@both_ways_out
class TestHooks:
    def test_what_a_forward_hook_kept_is_undone(self, module, leave, recording):
        hook, kept = recording
        module.register_forward_hook(hook)
        module(torch.rand(2, 2))
        before = kept()
        with leave(module):
            module(torch.rand(2, 2))
            assert not _same(kept(), before)
        assert _same(kept(), before)

    def test_what_a_hook_before_the_module_kept_is_undone(self, module, leave):
        hook, kept = appends_to_closure()
        module.register_forward_pre_hook(hook)
        module(torch.rand(2, 2))
        with leave(module):
            module(torch.rand(2, 2))
        assert kept() == [1]

    @pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
    def test_what_a_hook_of_the_backward_pass_kept_is_undone(self, module, leave, register):
        hook, kept = appends_to_closure()
        getattr(module, register)(hook)
        run = lambda: module(torch.rand(2, 2, requires_grad=True)).sum().backward()  # noqa: E731
        run()
        assert kept() == [1]
        with leave(module):
            run()
            assert kept() == [1, 1]
        assert kept() == [1]

    @pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
    def test_what_a_hook_of_all_modules_kept_is_undone(self, module, leave, register):
        seen = ["before"]
        handle = register(lambda *_: seen.append("a call") and None)
        try:
            with leave(module):
                module(torch.rand(2, 2))
                assert len(seen) > 1
        finally:
            handle.remove()
        assert seen == ["before"]

    def test_hooks_stand_as_they_stood(self, module, leave):
        module.register_forward_hook(appends_to_closure()[0])
        before = list(module._forward_hooks.values())
        with leave(module):
            module(torch.rand(2, 2))
        assert list(module._forward_hooks.values()) == before

    def test_a_hook_of_the_module_itself_stays_bound_to_it(self, leave):
        class Own(nn.Linear):
            calls = 0

            def count(self, *_):
                self.calls += 1

        module = Own(2, 2)
        module.register_forward_hook(module.count)
        with leave(module):
            module(torch.rand(2, 2))
            assert module.calls == 1
        assert module.calls == 0
        module.eval()
        assert not module.training

    @pytest.mark.parametrize("hook", [print, nn.Identity(), Slot, max], ids=repr)
    def test_hooks_that_keep_nothing_do_no_harm(self, module, leave, hook):
        module.register_forward_hook(hook)
        with leave(module):
            module.calls = 1
        assert not hasattr(module, "calls")

    def test_an_empty_cell_does_no_harm(self, module, leave):
        def hook(*_):
            return later

        module.register_forward_hook(hook)
        with leave(module):
            module.calls = 1
        assert not hasattr(module, "calls")
        later = None
        assert module(torch.rand(2, 2)) is not later


def _same(one, other):
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    return one == other


@both_ways_out
class TestWhatIsNotReached:
    def test_globals_that_no_hook_names(self, module, leave):
        module.register_forward_hook(appends_to_a_global()[0])
        before = len(NOT_SEEN_BY_ANY_HOOK)
        with leave(module):
            NOT_SEEN_BY_ANY_HOOK.append(1)
        assert len(NOT_SEEN_BY_ANY_HOOK) == before + 1

    def test_lists_that_nothing_names(self, module, leave):
        seen = []
        with leave(module):
            seen.append(1)
        assert seen == [1]

    def test_iterators(self, module, leave):
        numbers = count()
        module.register_forward_hook(lambda *_: next(numbers) and None)
        with leave(module):
            module(torch.rand(2, 2))
        assert next(numbers) == 1

    def test_hooks_of_other_modules(self, module, leave):
        hook, kept = appends_to_closure()
        other = nn.Identity()
        other.register_forward_hook(hook)
        with leave(module):
            other(torch.rand(2))
        assert kept() == [1]

    def test_values_of_tensors(self, module, leave):
        module.total = torch.zeros(2)
        with leave(module):
            module.total += 1
        assert module.total.tolist() == [1, 1]


class TestOrder:
    def test_nested_inside_one_another_each_undoes_its_own(self, module):
        module.seen = []
        with undone([module]):
            module.seen.append(1)
            with undone([module]):
                module.seen.append(2)
                module.deep = 1
            assert module.seen == [1]
            assert not hasattr(module, "deep")
        assert module.seen == []

    def test_an_exception_comes_through(self, module):
        with pytest.raises(Stop), undone([module]):
            raise Stop

    def test_modules_may_come_from_a_generator(self, module):
        with undone(m for m in [module]):
            module.calls = 1
        assert not hasattr(module, "calls")

    def test_nothing_that_was_kept_lives_on(self, module):
        held = torch.rand(1)
        with undone([module]):
            module.held = held
        watched = weakref.ref(held)
        del held
        gc.collect()
        assert watched() is None


class Counts(nn.Module):
    """Counts its passes in one place."""

    of_class = {"passes": torch.zeros(())}  # noqa: RUF012

    def __init__(self, place):
        super().__init__()
        self.place, self.recorder = place, Recorder()
        self.recorder.passes = torch.zeros(())
        self.tensor, self.array, self.lists = torch.zeros(()), numpy.zeros(()), {"a": [torch.zeros(())]}
        self.pair = (torch.zeros(()), 1)
        self.frozen = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("buffer", torch.zeros(()))
        held = torch.zeros(())
        self.in_hook = lambda: held
        self.register_forward_hook(lambda *_: held.add_(place == "in_hook") and None)

    @property
    def held(self):
        others = {
            "dict": self.lists["a"][0],
            "pair": self.pair[0],
            "object": self.recorder.passes,
            "class": self.of_class["passes"],
            "global": PASSES,
            "in_hook": self.in_hook(),
        }
        return others[self.place] if self.place in others else getattr(self, self.place)

    @property
    def passes(self):
        return self.held.item()

    @torch.no_grad()
    def forward(self, x):
        held = self.held
        if isinstance(held, numpy.ndarray):
            held += 1
        elif self.place != "in_hook":
            held.data.add_(1)
        return x


PLACES = ["tensor", "array", "frozen", "scale", "dict", "pair", "object", "class", "global", "in_hook"]
every_place = pytest.mark.parametrize("place", PLACES)


class TestValuesThatForwardChanges:
    @every_place
    def test_are_put_back_and_known_from_then_on(self, place):
        module = Counts(place)
        before, held = module.passes, module.held
        for learns in (True, False, False):
            with undone_with_values([module], learns):
                module(torch.zeros(2))
                module(torch.zeros(2))
                assert module.passes == before + 2
            assert module.passes == before
            assert module.held is held

    @every_place
    def test_are_known_after_a_pass_that_was_compared(self, place):
        module = Counts(place)
        before, values = module.passes, Values([module])
        module(torch.zeros(2))
        (put_back,) = values.changed()
        with undone_with_values([module]):
            module(torch.zeros(2))
        assert module.passes == before + 1
        put_back()
        assert module.passes == before

    def test_what_no_pass_changed_is_not_put_back(self, module):
        module.total = torch.zeros(2)
        with undone_with_values([module], learns=True):
            module(torch.rand(2, 2))
        with undone_with_values([module]):
            module.total += 1
        assert module.total.tolist() == [1, 1]
        assert Values([module]).changed() == []

    @pytest.mark.parametrize("refer", [lambda b: b, lambda b: b.view(1), lambda b: b.view(1).numpy()])
    def test_a_buffer_that_a_list_refers_to_too_is_left_out(self, refer):
        module = Counts("buffer")
        module.buffers_of_all = [refer(module.buffer)]
        values = Values([module])
        module(torch.zeros(2))
        assert values.changed() == []
        assert module.buffer == 1

    def test_are_put_back_after_an_exception(self):
        module = Counts("tensor")
        with contextlib.suppress(Stop), undone_with_values([module], learns=True):
            module(torch.zeros(2))
            raise Stop
        assert module.tensor == 0

    def test_a_parameter_that_was_exchanged_is_told(self, module):
        values, before = Values([module]), module.weight
        module.weight = nn.Parameter(torch.zeros(2, 2))
        (put_back,) = values.changed()
        put_back()
        assert module.weight is before

    def test_a_tensor_that_grows(self, module):
        module.seen = torch.zeros(2)
        with undone_with_values([module], learns=True):
            module.seen.resize_(4).fill_(1)
        assert module.seen.tolist() == [0, 0]

    def test_tensors_whose_values_cannot_be_copied_do_no_harm(self, module):
        module.kept = [
            torch.empty(2, device="meta"),
            torch.eye(2).to_sparse(),
            torch.zeros(1).expand(3),
            nn.UninitializedParameter(),
            numpy.array([None]),
        ]
        with torch.inference_mode():
            module.kept.append(torch.zeros(2))
        for learns in (True, False):
            with undone_with_values([module], learns):
                module.kept.append(1)
            assert len(module.kept) == 6


@pytest.mark.parametrize("place", ["tensor", "buffer", "frozen", "dict"])
class TestGraphs:
    def learned(self, place):
        module = Counts(place)
        values, buffer = Values([module]), module.buffer.clone()
        module(torch.zeros(2))
        note_changed_buffers([(module, "buffer", buffer)])
        values.changed()
        return module

    def test_keep_the_values_that_they_were_made_with(self, place):
        module, x = self.learned(place), torch.ones(2, requires_grad=True)
        held, output = module.held, x * module.held * module.scale
        keep_graphs([module])
        module.held.add_(5)
        (x * module.held).sum().backward()
        assert x.grad.tolist() == [6, 6]
        output.sum().backward()
        assert x.grad.tolist() == [7, 7]
        assert module.scale.grad == 2  # the parameter beside it is still the one of the graph
        assert module.held is held

    def test_tensors_that_no_graph_holds_stay_where_they_are(self, place):
        module = self.learned(place)
        address = module.held.data_ptr()
        keep_graphs([module])
        assert module.held.data_ptr() == address

    def test_memory_that_two_tensors_share_stays_shared(self, place):
        module, x = self.learned(place), torch.ones(2, requires_grad=True)
        module.view = module.held.view(1)
        Values([module])
        with undone_with_values([module], learns=True):
            module.view.add_(1)
        output = x * module.held
        keep_graphs([module])
        assert module.view.data_ptr() == module.held.data_ptr()
        assert output.tolist() == [1, 1]

    def test_made_before_and_inside_can_be_walked_backward(self, place):
        if place in ("buffer", "frozen"):
            pytest.skip("isolation exchanges buffers; parameters without gradient keep their place")
        module, x = self.learned(place), torch.ones(2, requires_grad=True)
        outputs = [x * module.held]
        with undone_with_values([module]):
            module.held.add_(1)
            outputs.append(x * module.held)
        sum(output.sum() for output in outputs).backward()
        assert x.grad.tolist() == [3, 3]
        assert module.held == 1
