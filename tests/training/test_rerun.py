"""Steps of a trace are taken again as they were taken, or with other arguments."""

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from pml_adversarial.training.rerun import (
    apply,
    apply_as_before,
    checkpoints_take_gradients,
    name_of,
    output_replaced,
    recomputed_in,
    rerun,
    value_of,
)
from pml_adversarial.training.trace import Fixed, Ref, Step, steps_to
from pml_adversarial.training.tracing import paused, ref_of
from pml_adversarial.training.watch import Watch, submodules_of, weights_of


@pytest.fixture(autouse=True)
def watch():
    return Watch()


def step_of(tensor):
    return ref_of(tensor).step


def with_first(step, value):
    """Resolves the first argument to another value."""
    return lambda leaf: value if leaf is step.leaves[0] else value_of(leaf)


class TestRerun:
    def run(self, *tensors, take=apply):
        results = [ref_of(tensor) or Fixed(tensor) for tensor in tensors]
        with torch.no_grad(), paused():
            return rerun(steps_to(results), results, take)

    def test_gives_the_results_again_in_their_order(self, model, images):
        embeddings, fixed = model(images), torch.rand(2, 4)
        parts = functional.normalize(embeddings).chunk(2)
        found = self.run(parts[1], fixed, embeddings, parts[0])
        for one, other in zip(found, (parts[1], fixed, embeddings, parts[0]), strict=True):
            assert torch.equal(one, other)

    def test_each_step_is_taken_once_with_what_the_steps_before_gave_now(self, model, images):
        embeddings, taken = model(images), []

        def take(step, resolve):
            taken.append(name_of(step))
            return [torch.ones(8, 4)] if step.call is not None else apply(step, resolve)

        (found,) = self.run((embeddings + embeddings) * 3, take=take)
        assert taken == ["Sequential", "add", "mul"]
        assert torch.equal(found, torch.full((8, 4), 6.0))

    def test_arguments_in_containers(self, model, images):
        embeddings = model(images)
        (found,) = self.run(torch.cat([embeddings, torch.stack([embeddings[1], embeddings[0]])]))
        assert torch.equal(found, torch.cat([embeddings, embeddings[[1, 0]]]))


class Swaps(nn.Module):
    """Gives several tensors, of arguments of several kinds."""

    def forward(self, first, *, others, scale=1.0):
        return {"a": first * scale, "b": [others["x"], (others["y"][0] + 1,)]}


class TestApply:
    def test_a_module_with_any_arguments(self, images):
        others = {"x": images * 0.1, "y": (images * 0.2,)}
        output = Swaps()(images.requires_grad_(), others=others, scale=3.0)
        step = step_of(output["a"])
        found = apply(step)
        assert [torch.equal(*pair) for pair in zip(found, step.call.outputs, strict=True)] == [True] * 3
        changed = apply(step, lambda leaf: 2 * leaf.value if isinstance(leaf, Fixed) else leaf)
        for one, other in zip(changed, (6 * images, 0.2 * images, 0.4 * images + 1), strict=True):
            torch.testing.assert_close(one, other)

    def test_a_function_of_several_results(self, model, images):
        parts = model(images).split([1, 7])
        found = apply(step_of(parts[0]), lambda leaf: torch.ones(8, 4) if isinstance(leaf, Ref) else leaf)
        assert [part.shape for part in found] == [(1, 4), (7, 4)]

    def test_in_place_leaves_its_argument(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        step = step_of(model(images).mul_(2))
        given = torch.ones(8, 4)
        (result,) = apply(step, with_first(step, given))
        assert result.eq(2).all()
        assert given.eq(1).all()

    def test_written_into_a_table(self, model, images):
        table = torch.zeros(8, 4)
        table[2:4] = model(images[:2])
        step = step_of(table)
        (found,) = apply(step, lambda leaf: torch.ones(2, 4) if isinstance(leaf, Ref) else value_of(leaf))
        assert found.sum(1).tolist() == [0, 0, 4, 4, 0, 0, 0, 0]
        assert step.args[0].value.eq(0).all()

    def test_of_a_step_under_autocast_outside_and_the_other_way_round(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        with torch.autocast("cpu", torch.bfloat16):
            inside = step_of(model(images))
        outside = step_of(model(images))
        with torch.autocast("cpu", torch.bfloat16):
            assert apply(outside)[0].dtype == torch.float32
            assert apply(inside)[0].dtype == torch.bfloat16
            assert apply(outside, autocast_as_now=True)[0].dtype == torch.bfloat16
            assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_enabled("cpu")
        assert apply(inside)[0].dtype == torch.bfloat16
        assert apply(inside, autocast_as_now=True)[0].dtype == torch.float32
        assert torch.equal(apply(inside)[0], inside.call.outputs[0])
        assert not torch.is_autocast_enabled("cpu")

    def test_of_another_type_of_autocast(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        with torch.autocast("cpu", torch.float16):
            step = step_of(model(images))
        with torch.autocast("cpu", torch.bfloat16):
            assert apply(step)[0].dtype == torch.float16
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16

    def test_of_a_module_with_swapped_parameters(self, model, images):
        weights = {name: (value * 2).detach().requires_grad_() for name, value in model.named_parameters()}
        step = step_of(torch.func.functional_call(model, weights, (images,)))
        step.call.find_swapped(model, weights_of(submodules_of(model)))
        before = dict(model.named_parameters())
        (found,) = apply(step, with_first(step, 1 - images))
        torch.testing.assert_close(found, torch.func.functional_call(model, weights, (1 - images,)))
        assert all(value is before[name] for name, value in model.named_parameters())
        gradients = torch.autograd.grad(found.sum(), list(weights.values()))
        assert all(gradient.abs().sum() > 0 for gradient in gradients)

    def test_what_is_computed_carries_gradient(self, model, images):
        given = images.clone().requires_grad_()
        step = step_of(model(images))
        (gradient,) = torch.autograd.grad(apply(step, with_first(step, given))[0].sum(), given)
        assert gradient.flatten(1).abs().sum(1).all()


class TestApplyAsBefore:
    def test_random_numbers_and_buffers_are_those_of_then(self, watch, moody_model, images):
        watch.wants_state = True
        moody_model[1].momentum = 1.0
        outputs, steps = [], []
        for part in (images[:4], images[4:]):
            output = moody_model(part)
            outputs.append(output.detach().clone())
            steps.append(step_of(output))
        last = moody_model[1].running_mean.clone()
        for output, step in reversed(list(zip(outputs, steps, strict=True))):
            assert torch.equal(apply_as_before(step, value_of)[0], output)
        assert not torch.equal(moody_model[1].running_mean, last)  # that of the first call, taken last

    def test_buffers_that_an_eval_pass_reads(self, watch, moody_model, images):
        watch.wants_state = True
        moody_model.eval()
        step = step_of(moody_model(images))
        with torch.no_grad():
            moody_model[1].running_mean.add_(3)
        assert not torch.equal(apply(step, value_of)[0], step.call.outputs[0])
        for _ in range(2):
            assert torch.equal(apply_as_before(step, value_of)[0], step.call.outputs[0])

    def test_what_is_kept_is_not_changed_by_running(self, watch, moody_model, images):
        watch.wants_state = True
        step = step_of(moody_model(images))
        kept = [value.clone() for *_, value in step.call.buffers]
        apply_as_before(step, value_of)
        assert all(torch.equal(value, other) for (*_, value), other in zip(step.call.buffers, kept, strict=True))

    def test_a_function_that_draws(self, watch, model, images):
        watch.wants_state = True
        output = model(images)
        dropped = functional.dropout(output, 0.3)
        step = step_of(dropped)
        for _ in range(2):
            (found,) = apply_as_before(step, lambda leaf: output if isinstance(leaf, Ref) else leaf)
            assert torch.equal(found, dropped)

    def test_without_a_state_it_goes_on_from_the_present_one(self, images):
        step = step_of(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(36, 4))(images))
        assert not torch.equal(apply_as_before(step, value_of)[0], apply_as_before(step, value_of)[0])


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant, count=1):
        super().__init__()
        self.inner, self.reentrant, self.count = inner, reentrant, count

    def forward(self, images):
        for _ in range(self.count - 1):
            images = checkpoint(nn.Identity(), images * 1, use_reentrant=self.reentrant)
        return checkpoint(self.inner, images, use_reentrant=self.reentrant)


class TestCheckpoints:
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradients_of_inputs_pass(self, model, images, reentrant):
        given = images.clone().requires_grad_()
        (expected,) = torch.autograd.grad(model(given).square().sum(), given)
        module = Checkpointed(model, reentrant, 2)
        with checkpoints_take_gradients():
            (found,) = torch.autograd.grad(module(given).square().sum(), given)
        torch.testing.assert_close(found, expected)

    def test_a_reentrant_one_would_not_pass(self, model, images):
        given = images.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="checkpoint"):
            torch.autograd.grad(Checkpointed(model, True)(given).sum(), given)

    def test_random_numbers_are_drawn_alike_in_the_backward_pass(self, images):
        inner = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 4))
        given, gradients = images.clone().requires_grad_(), []
        for module in (inner, Checkpointed(inner, True)):
            torch.manual_seed(2)
            with checkpoints_take_gradients():
                output = module(given)
            torch.rand(5)
            gradients.append(torch.autograd.grad(output.sum(), given)[0])
        assert torch.equal(*gradients)

    def test_it_is_undone_also_nested_and_after_an_exception(self):
        before, own = CheckpointFunction.apply, "apply" in vars(CheckpointFunction)
        with checkpoints_take_gradients():
            first = CheckpointFunction.apply
            with checkpoints_take_gradients():
                assert CheckpointFunction.apply is not first
            assert CheckpointFunction.apply is first
            with pytest.raises(ArithmeticError), checkpoints_take_gradients():
                raise ArithmeticError
            assert CheckpointFunction.apply is first
        assert CheckpointFunction.apply == before
        assert ("apply" in vars(CheckpointFunction)) == own


class TestOutputReplaced:
    def test_what_follows_gets_the_other_output(self, model, images):
        other = torch.rand(8, 16)
        with output_replaced(model[1], other):
            found = model(images)
        assert torch.equal(found, model[3](model[2](other)))
        assert not torch.equal(model(images), found)

    def test_the_other_output_and_what_was_computed_get_the_gradient(self, model, images):
        other = torch.rand(8, 16, requires_grad=True)
        with output_replaced(model[1], other):
            model(images).square().sum().backward()
        by_other = other.grad
        torch.testing.assert_close(model[1].bias.grad, by_other.sum(0))
        torch.testing.assert_close(model[1].weight.grad, by_other.T @ images.flatten(1))

    def test_a_table_of_embeddings_learns(self):
        table, ids = nn.Embedding(5, 3), torch.tensor([[1, 4], [1, 0]])
        other = torch.rand(2, 2, 3)
        with output_replaced(table, other):
            found = table(ids)
        assert torch.equal(found, other)
        found.sum().backward()
        assert table.weight.grad[:, 0].tolist() == [1, 2, 0, 0, 1]

    def test_a_module_without_gradient_gives_the_other_alone(self, model, images):
        model.requires_grad_(False)
        other = torch.rand(8, 16, requires_grad=True)
        with output_replaced(model[1], other):
            found = model(images)
        assert torch.autograd.grad(found.sum(), other)[0].abs().sum() > 0

    def test_the_hook_goes_also_after_an_exception(self, model):
        before = dict(model[1]._forward_hooks)
        with pytest.raises(ArithmeticError), output_replaced(model[1], torch.rand(8, 16)):
            raise ArithmeticError
        assert dict(model[1]._forward_hooks) == before


class TestNames:
    def test_are_those_that_the_user_knows(self, model, images):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert name_of(step_of(model(images))) == "Sequential"
        assert name_of(step_of(functional.normalize(model(images)))) == "normalize"
        assert name_of(Step(object(), (), {})) == "a function"

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_compute_again_in_a_context(self, model, images, reentrant):
        calls, module = [], Checkpointed(model, reentrant)

        @contextlib.contextmanager
        def noted():
            calls.append("in")
            try:
                yield
            finally:
                calls.append("out")

        def asked():
            calls.append("asked")
            return noted

        with recomputed_in(asked):
            output = module(images.clone().requires_grad_())
        assert calls == ["asked"]
        for _ in range(2):
            output.sum().backward(retain_graph=True)
        assert calls == ["asked", *["in", "out"] * 2]
        module(images.clone().requires_grad_()).sum().backward()
        assert len(calls) == 5, "it is over"
