"""Tensors are found in nested values, and exchanged there; all else stays as it was."""

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pml_adversarial.training.nested import leaves, mapped, outputs_in, places_in, tensors_in

Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass(frozen=True)
class Frozen:
    features: Any
    name: str = "a name"


@dataclasses.dataclass(frozen=True)
class Derived:
    features: Any
    twice: Any = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "twice", (self.features, self.features))


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    features: Any
    mask: Any


@dataclasses.dataclass
class Output(OrderedDict):
    """A dataclass that is a dict too, whose keys and attributes are the same, as outputs of transformers are."""

    logits: Any = None
    pooled: Any = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                super().__setitem__(field.name, value)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name, value):
        if name in self:
            super().__setitem__(name, value)
        super().__setattr__(name, value)


class Coordinates(tuple):
    """A tuple of a class of one's own."""

    __slots__ = ()


# A container -> what it holds, in order
NESTED = [
    (1, [1]),
    (None, [None]),
    ("word", ["word"]),
    ((), []),
    ([], []),
    ({}, []),
    ((1, 2), [1, 2]),
    ([3, (1, [2])], [3, 1, 2]),
    (Pair(2, (1, 0)), [2, 1, 0]),
    (Coordinates((2, 1)), [2, 1]),
    ({"b": 1, "a": 2}, [1, 2]),
    ({"b": {"d": 1, "c": 0}, "a": (2,)}, [1, 0, 2]),
    (OrderedDict(b=1, a=[2]), [1, 2]),
    (defaultdict(list, b=1, a=2), [1, 2]),
    (UserDict(b=1, a=2), [1, 2]),
    (Frozen([2, 1]), [2, 1, "a name"]),
    (Slotted(2, {"a": 1}), [2, 1]),
    (Output(pooled=1, logits=2), [2, 1]),
    (Output(pooled=(3, 4)), [3, 4]),
    ([Frozen(Pair(1, {"x": Output(logits=2)})), 3], [1, 2, "a name", 3]),
]
ids = [repr(value) for value, _ in NESTED]


@pytest.mark.parametrize(("value", "held"), NESTED, ids=ids)
class TestLeaves:
    def test_are_all_that_is_no_container_in_order(self, value, held):
        assert list(leaves(value)) == held

    def test_are_changed_in_their_order(self, value, held):
        met = []
        mapped(value, met.append)
        assert met == held

    def test_mapped_to_themselves_give_an_equal_value_of_the_same_class(self, value, held):
        same = mapped(value, lambda leaf: leaf)
        assert same == value
        assert type(same) is type(value)

    def test_are_exchanged_in_their_place(self, value, held):
        numbers = count()
        assert list(leaves(mapped(value, lambda leaf: next(numbers)))) == list(range(len(held)))

    def test_of_what_was_given_stay(self, value, held):
        mapped(value, lambda leaf: object())
        assert list(leaves(value)) == held


class TestLeavesThatAreNoContainers:
    @pytest.mark.parametrize(
        "leaf",
        [
            {1},
            "a word",
            b"bytes",
            range(2),
            slice(1, None, 2),
            deque([1]),
            SimpleNamespace(a=1),
            Frozen,
            lambda: 1,
            ...,
        ],
        ids=lambda leaf: type(leaf).__name__,
    )
    def test_are_leaves_as_a_whole(self, leaf):
        assert list(leaves(leaf)) == [leaf]
        assert mapped([leaf], lambda found: found)[0] is leaf

    def test_a_tensor_is_not_taken_apart(self):
        tensor = torch.rand(2, 3)
        assert next(iter(leaves((tensor,)))) is tensor

    def test_no_generator_is_used_up(self):
        generator = iter([1, 2])
        assert list(leaves((generator,))) == [generator]
        assert list(generator) == [1, 2]


class TestTensorsIn:
    def test_a_tensor_is_one(self):
        tensor = torch.rand(2)
        (found,) = tensors_in(tensor)
        assert found is tensor

    def test_all_are_found_in_order(self):
        first, second, third, fourth = torch.rand(4, 1).unbind()
        held = {"z": [first, 1, None], "a": Frozen(Pair(second, "x")), "m": Output(pooled=(third,), logits=fourth)}
        found = tensors_in(held)
        assert [id(tensor) for tensor in found] == [id(tensor) for tensor in (first, second, fourth, third)]

    def test_one_that_stands_twice_is_found_twice(self):
        tensor = torch.rand(2)
        assert len(tensors_in((tensor, {"a": tensor}))) == 2

    def test_parameters_are_tensors(self):
        parameter = torch.nn.Parameter(torch.rand(2))
        assert tensors_in([parameter])[0] is parameter

    @pytest.mark.parametrize("value", [None, 1.0, "x", (), {"a": [None]}])
    def test_there_may_be_none(self, value):
        assert tensors_in(value) == []


class TestPlacesIn:
    def test_of_a_tensor_alone(self):
        assert places_in(torch.rand(2)) == [()]

    def test_one_for_each_output_in_order(self):
        holder = SimpleNamespace(name="x", pair=[torch.rand(1), torch.rand(1)])
        value = {"z": (torch.rand(1), None, 3), "a": Frozen(Pair(torch.rand(1), "x")), "o": holder}
        assert places_in(value) == [("z", 0), ("a", "features", 0), ("o", "pair"), ("o", "pair")]
        assert len(outputs_in(value)) == 4

    def test_an_object_that_holds_itself(self):
        value = SimpleNamespace(found=torch.rand(1))
        value.itself = [torch.rand(1), value]
        assert places_in(value) == [("found",), ("itself",)]

    @pytest.mark.parametrize("value", [None, "x", [], torch.nn.Linear(1, 1), 3.0])
    def test_there_may_be_none(self, value):
        assert places_in(value) == []


class TestMapped:
    def test_named_tuples_keep_their_names(self):
        changed = mapped(Pair(1, 2), lambda leaf: -leaf)
        assert (changed.left, changed.right) == (-1, -2)

    def test_frozen_dataclasses_are_copied(self):
        before = Frozen(1)
        changed = mapped(before, lambda leaf: leaf if isinstance(leaf, str) else leaf + 1)
        assert changed == Frozen(2)
        assert before == Frozen(1)

    def test_sizes_stay_sizes(self):
        assert mapped({"size": torch.Size([2, 3])}, lambda leaf: leaf + 1) == {"size": torch.Size([3, 4])}

    def test_what_torch_returns_keeps_its_names(self):
        changed = mapped(torch.rand(3, 4).max(1), lambda leaf: leaf.tolist())
        assert len(changed.values) == len(changed.indices) == 3

    def test_fields_that_init_does_not_take_are_kept(self):
        assert mapped(Derived(1), lambda leaf: leaf * 5).twice == (5, 5)

    def test_keys_and_attributes_of_an_output_stay_the_same(self):
        changed = mapped(Output(logits=1, pooled=2), lambda leaf: leaf * 10)
        assert (changed["logits"], changed["pooled"]) == (10, 20)
        assert (changed.logits, changed.pooled) == (10, 20)

    def test_keys_stay_in_order_though_they_do_not_sort(self):
        changed = mapped(OrderedDict([("z", 1), (1, 2), (None, 3)]), str)
        assert list(changed.items()) == [("z", "1"), (1, "2"), (None, "3")]

    def test_a_default_of_a_dict_is_kept(self):
        changed = mapped(defaultdict(list, a=1), lambda leaf: leaf)
        assert changed["not there"] == []

    def test_lists_are_new_lists(self):
        inner = [1]
        changed = mapped({"a": inner}, lambda leaf: leaf)
        changed["a"].append(2)
        assert inner == [1]

    def test_a_leaf_may_become_a_container(self):
        assert mapped([1, 2], lambda leaf: [leaf, leaf]) == [[1, 1], [2, 2]]

    def test_an_exception_comes_through(self):
        with pytest.raises(ZeroDivisionError):
            mapped([0], lambda leaf: 1 / leaf)
