"""What is remembered of a trace: tensors and their versions, and steps."""

import pytest
import torch

from pml_adversarial.training.rerun import name_of
from pml_adversarial.training.trace import Call, Fixed, Ref, Step, autocast, steps_to, version_of
from pml_adversarial.training.tracing import ref_of


class TestFixed:
    def test_tells_of_a_change_in_place(self):
        tensor = torch.zeros(2)
        fixed = Fixed(tensor)
        assert fixed.version == version_of(tensor)
        tensor += 1
        assert fixed.version != version_of(tensor)

    def test_of_inference_mode_have_no_version(self):
        with torch.inference_mode():
            tensor = torch.zeros(2)
        assert Fixed(tensor).version == version_of(tensor) == 0


class TestStep:
    def test_its_leaves_stand_in_order_and_its_refs_among_them(self):
        first = Step(torch.add, (Fixed(torch.zeros(2)), 1), {})
        ref, fixed = Ref(first, 0), Fixed(torch.ones(2))
        step = Step(torch.stack, ([ref, fixed], 1), {"out": None, "more": {"a": ref}})
        assert step.leaves == [ref, fixed, 1, None, ref]
        assert step.refs == [ref, ref]

    def test_later_steps_have_higher_numbers(self):
        one, other = Step(torch.add, (), {}), Step(torch.add, (), {})
        assert one.number < other.number

    def test_it_knows_the_autocast_under_which_it_was_taken(self):
        assert Step(torch.add, (), {}).autocast == {}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert Step(torch.add, (), {}).autocast == autocast() == {"cpu": torch.bfloat16}


class TestCall:
    def test_it_holds_outputs_without_their_graph(self):
        output = torch.ones(2, requires_grad=True) * 2
        (kept,) = Call([output]).outputs
        assert torch.equal(kept, output)
        assert not kept.requires_grad


@pytest.mark.usefixtures("watch")
class TestStepsTo:
    def test_are_in_the_order_in_which_they_were_taken(self, model, images):
        first, second = model(images), model(images.flip(0))
        made = torch.cat([second, first]) * 2
        steps = steps_to([ref_of(made)])
        assert [step.number for step in steps] == sorted(step.number for step in steps)
        assert [name_of(step) for step in steps] == ["Sequential", "Sequential", "cat", "mul"]
        assert steps[0].leaves[0].value is images

    def test_those_that_do_not_lead_there_are_left_out(self, model, images):
        embeddings = model(images)
        _other = embeddings * 2
        assert len(steps_to([ref_of(embeddings)])) == 1

    def test_each_stands_once(self, model, images):
        embeddings = model(images)
        made = (embeddings + embeddings) * embeddings
        assert len(steps_to([ref_of(made), ref_of(embeddings), ref_of(made)])) == 3

    def test_fixed_results_have_none(self):
        assert steps_to([Fixed(torch.rand(2))]) == []

    def test_a_long_trace(self, model, images):
        embeddings = model(images)
        for _ in range(2000):
            embeddings = embeddings * 1.0
        assert len(steps_to([ref_of(embeddings)])) == 2001
