"""What is remembered of a trace: tensors and their versions, and steps."""

import torch

from pml_adversarial.training.trace import Call, Fixed, Ref, Step, autocast, version_of


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
