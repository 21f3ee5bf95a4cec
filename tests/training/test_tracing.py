"""What is made of a traced tensor knows how it was made; nothing else is changed."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from traces import Own, names_of

from pml_adversarial.training.trace import Fixed, Ref, Step, steps_to
from pml_adversarial.training.tracing import Traced, lost_of, note, paused, plain, ref_of
from pml_adversarial.training.watch import Watch

OPERATIONS = [
    (lambda e: e * 2, "mul"),
    (lambda e: 2 * e, "mul"),
    (lambda e: e / e.norm(dim=1, keepdim=True), "div"),
    (lambda e: -e, "neg"),
    (lambda e: e @ torch.rand(4, 2), "matmul"),
    (lambda e: torch.rand(3, 8) @ e, "matmul"),
    (lambda e: e[:4], "__getitem__"),
    (lambda e: e[:, None], "__getitem__"),
    (lambda e: e[[0, 2]], "__getitem__"),
    (lambda e: e[e[:, 0] > -100], "__getitem__"),
    (lambda e: e.T, "__get__"),
    (lambda e: e.double(), "double"),
    (lambda e: e.bfloat16(), "bfloat16"),
    (lambda e: e.to(torch.double), "to"),
    (lambda e: e.clone(), "clone"),
    (lambda e: e.contiguous().view(-1, 2), "view"),
    (lambda e: e.chunk(2)[1], "chunk"),
    (lambda e: torch.split(e, [3, 5])[0], "split"),
    (lambda e: e.unbind()[3], "unbind"),
    (lambda e: torch.cat([e, e]), "cat"),
    (lambda e: torch.cat([torch.zeros(8, 4), e]), "cat"),
    (lambda e: torch.stack((e, e)), "stack"),
    (lambda e: torch.where(e > 0, e, 0.0), "where"),
    (lambda e: torch.einsum("nd,md->nm", e, e), "einsum"),
    (lambda e: e.max(1), "max"),
    (lambda e: torch.topk(e, 2), "topk"),
    (functional.normalize, "normalize"),
    (lambda e: functional.linear(e, torch.rand(2, 4)), "linear"),
    (lambda e: functional.dropout(e, 0.5), "dropout"),
    (lambda e: functional.pad(e, (0, 1)), "pad"),
    (lambda e: torch.add(torch.zeros(8, 4), other=e), "add"),
]

WITHOUT_GRADIENT = [
    (lambda e: e.detach(), "detach"),
    (lambda e: e.argmax(1), "argmax"),
    (lambda e: e > 0, "gt"),
    (lambda e: e.data, "__get__"),
    (torch.zeros_like, "zeros_like"),
    (lambda e: e.sign().detach(), "detach"),
    (lambda e: e.topk(2).indices, "topk"),
]

IN_PLACE = [
    (lambda e: e.mul_(2), "mul_"),
    (lambda e: e.clamp_(-0.1, 0.1), "clamp_"),
    (lambda e: e.__imul__(2), "__imul__"),
    (lambda e: e.__setitem__(0, 0.0), "__setitem__"),
    (lambda e: e.__setitem__((slice(None), 1), torch.zeros(8)), "__setitem__"),
    (lambda e: functional.relu(e, inplace=True), "relu"),
    (torch.relu_, "relu_"),
    (lambda e: e.masked_fill_(e > 0, 0.0), "masked_fill_"),
    (lambda e: e.index_fill_(0, torch.tensor([1]), 0.0), "index_fill_"),
]


@pytest.mark.parametrize(("operation", "name"), OPERATIONS, ids=range(len(OPERATIONS)))
class TestOperations:
    def test_are_noted_by_name(self, watch, model, images, operation, name):
        made = operation(model(images))
        made = made if isinstance(made, torch.Tensor) else made[0]
        assert type(made) is Traced
        assert ref_of(made).step.function.__name__.strip("_") == name.strip("_")
        assert names_of(made)[0] == "Sequential"

    def test_give_what_they_give_without(self, watch, model, images, operation, name):
        output = model(images)
        torch.manual_seed(1)
        made = operation(output)
        torch.manual_seed(1)
        expected = operation(output.detach().requires_grad_())
        pairs = [(made, expected)] if isinstance(made, torch.Tensor) else zip(made, expected, strict=True)
        for one, other in pairs:
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
        assert type(made) is Traced or type(made) is type(expected)


class TestOperationsOfSeveralResults:
    def test_each_has_its_place(self, watch, model, images):
        parts = model(images).chunk(4)
        assert [ref_of(part).place for part in parts] == [0, 1, 2, 3]
        assert len({id(ref_of(part).step) for part in parts}) == 1

    def test_those_without_gradient_have_theirs(self, watch, model, images):
        values, places = model(images).max(1)
        assert (ref_of(values).place, ref_of(places).place) == (0, 1)

    def test_pairs_have_both_sources(self, watch, model, images):
        first, second = model(images), model(images.flip(3))
        steps = ref_of(first - second).step.refs
        assert [ref.step for ref in steps] == [ref_of(first).step, ref_of(second).step]


class TestNotNoted:
    @pytest.mark.parametrize(
        "ask",
        [
            lambda e: e.shape,
            lambda e: e.size(0),
            len,
            lambda e: e.requires_grad,
            lambda e: e.grad_fn,
            lambda e: e.is_leaf,
            lambda e: e.dim(),
            lambda e: e.tolist(),
            lambda e: e.sum().item(),
            lambda e: float(e.mean().detach()),
            lambda e: torch.is_tensor(e),
            lambda e: e.data_ptr(),
            lambda e: bool((e == e).all()),
            lambda e: e.device,
            lambda e: e.dtype,
            lambda e: e.is_floating_point(),
            lambda e: hash(e) == id(e),
        ],
        ids=range(17),
    )
    def test_questions_are_answered(self, watch, model, images, ask):
        output = model(images)
        answer = ask(output)
        with plain([output]):
            assert answer == ask(output)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_modules_without_gradient_leave_their_name_alone(self, watch, model, images, mode):
        with mode():
            silent = model(images)
            after = silent * 2
        for tensor in (silent, after, after + 1):
            assert ref_of(tensor) is None
            assert lost_of(tensor) == "Sequential"
        assert watch.seen["without gradient"] == {"Sequential"}
        assert lost_of(after + model(images)) is None

    def test_a_module_that_hands_through_its_argument_under_no_grad_loses_nothing(self, watch, model, images):
        output = model(images)
        with torch.no_grad():
            assert nn.Identity()(output) is output
        assert names_of(output) == ["Sequential"]

    def test_gradients_of_weights_are_plain(self, watch, model, images):
        output = model(images)
        output.retain_grad()
        output.sum().backward()
        assert torch.equal(output.grad, torch.ones(8, 4))
        assert type(model[1].weight.grad) is torch.Tensor

    def test_hooks_of_tensors_get_plain_gradients(self, watch, model, images):
        kinds, output = [], model(images)
        output.register_hook(lambda gradient: kinds.append(type(gradient)))
        output.sum().backward()
        assert kinds == [torch.Tensor]

    def test_paused(self, watch, model, images):
        output = model(images)
        with paused():
            assert type(model(images)) is torch.Tensor
            assert type(output * 2) is torch.Tensor
            with paused():
                pass
            assert type(output * 2) is torch.Tensor
        assert type(output * 2) is Traced

    def test_paused_ends_with_an_exception(self, watch, model, images):
        with pytest.raises(ArithmeticError), paused():
            raise ArithmeticError
        assert type(model(images)) is Traced


# What is made of embeddings (8, 4) and has no gradient, and the name under which it is noted


class TestWithoutGradient:
    """Masks, numbers and detached values are followed, as long as the step lasts."""

    @pytest.mark.parametrize(("make", "name"), WITHOUT_GRADIENT, ids=range(len(WITHOUT_GRADIENT)))
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
    def test_what_is_made_is_noted(self, watch, model, images, make, name, mode):
        output = model(images)
        with mode():
            made = make(output)
            further = made + 1
        assert not made.requires_grad
        assert names_of(made)[0] == "Sequential"
        assert names_of(made)[-1].strip("_") == name.strip("_")
        assert names_of(further)[-1].strip("_") == "add"
        assert lost_of(made) is None

    def test_it_counts_as_an_argument(self, watch, model, images):
        output = model(images)
        norm = output.detach().norm(dim=1, keepdim=True)
        assert names_of(output / norm) == ["Sequential", "detach", "norm", "truediv"] or names_of(output / norm) == [
            "Sequential",
            "detach",
            "norm",
            "div",
        ]

    def test_a_frozen_trunk_is_followed(self, watch, images):
        trunk, head = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).requires_grad_(False), nn.Linear(4, 2)
        features = trunk(images)
        assert not features.requires_grad
        assert names_of(head(functional.normalize(features))) == ["Sequential", "normalize", "Linear"]

    def test_its_trace_is_lost_after_the_losses_that_follow(self, watch, model, images):
        mask = model(images) > 0
        kept = model(images).detach()
        assert names_of(mask)[0] == names_of(kept)[0] == "Sequential"
        for _ in range(2):
            watch.forget()  # as a loss does it
            model(images)
        for tensor, name in ((mask, "gt"), (kept, "detach")):
            assert ref_of(tensor) is None
            assert lost_of(tensor).strip("_") == name
            assert lost_of(tensor * 2) == lost_of(tensor)

    def test_its_trace_is_lost_after_two_losses_where_the_inputs_are_large(self, watch, model):
        inputs = torch.rand(4, *[64] * 4)
        large = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 2)).requires_grad_(False)
        features = large(inputs)
        for _ in range(2):
            assert ref_of(features) is not None
            watch.forget()
            large(inputs)
        assert ref_of(features) is None

    @pytest.mark.parametrize("through", [lambda e: e, lambda e: 0.5 * e], ids=["as it is", "scaled"])
    def test_its_trace_is_lost_after_some_losses(self, watch, model, images, through):
        total = features = through(model.requires_grad_(False)(images))
        seen = weakref.ref(ref_of(features).step)
        for _ in range(20):
            watch.forget()
            total = total + through(model(images))
        assert ref_of(features) is None
        assert seen() is None

    def test_its_trace_leads_back_over_the_losses_of_one_step(self, watch, model, images):
        features = model.requires_grad_(False)(images)
        for _ in range(4):
            watch.forget()
            assert names_of(features * 2) == [*names_of(features), "mul"]
            model(images)

    def test_its_trace_is_lost_where_no_loss_is_computed_for_long(self, watch, model, images):
        mask = model(images) > 0
        for _ in range(100):
            model(images[:1])
        assert ref_of(mask) is None

    def test_what_has_gradient_keeps_its_trace(self, watch, model, images):
        normalized = (lambda e: e / e.detach().norm(dim=1, keepdim=True))(model(images))
        before = names_of(normalized)
        for _ in range(3):
            watch.forget()
            model(images)
        gc.collect()
        assert names_of(normalized) == before
        assert "detach" in before


class TestDetached:
    """What was detached is held fixed, unless it belongs to the call of the tensor that it stands beside."""

    def beside(self, one, other):
        return [type(leaf) for leaf in ref_of(torch.cat([one, other])).step.args[0]]

    def test_of_the_same_call_is_followed(self, watch, model, images):
        output = model(images)
        assert self.beside(output, output.detach()) == [Ref, Ref]
        watch.forget()
        model(images)
        assert self.beside(output, output.detach()) == [Ref, Ref]

    def test_of_an_earlier_call_is_held_fixed_whether_a_loss_was_computed_or_not(self, watch, model, images):
        kept = model(images).detach() * 2
        assert self.beside(model(images), kept) == [Ref, Fixed]
        watch.forget()
        assert self.beside(model(images), kept) == [Ref, Fixed]

    def test_of_two_calls_that_are_joined_is_followed(self, watch, model, images):
        parts = model(images[:4]), model(images[4:])
        assert self.beside(torch.cat(parts), parts[0].detach()) == [Ref, Ref]

    def test_a_frozen_model_is_followed(self, watch, model, images):
        frozen = copy.deepcopy(model).requires_grad_(False)
        assert self.beside(frozen(images), model(images)) == [Ref, Ref]

    def test_that_a_module_takes_beside_data_is_held_fixed(self, watch, model, images):
        class Takes(nn.Module):
            def forward(self, x, memory):
                return model(x) + memory

        step = ref_of(Takes()(images, memory=model(images).detach())).step
        assert step.refs == []
        assert step.kwargs["memory"].lost == "Sequential"

    def test_that_a_module_takes_beside_embeddings_of_the_same_call_is_followed(self, watch, model, images):
        class Takes(nn.Module):
            def forward(self, e, detached):
                return e - detached.mean(0)

        output = model(images)
        assert len(ref_of(Takes()(output, output.detach())).step.refs) == 2

    def test_numbers_of_an_earlier_call_are_held_fixed(self, watch, model, images):
        order = model(images)[:, 0].argsort()
        assert names_of(model(images)[order]) == ["Sequential", "__getitem__"]


class TestInPlace:
    @pytest.mark.parametrize(("change", "name"), IN_PLACE, ids=[f"{i}{n}" for i, (_, n) in enumerate(IN_PLACE)])
    def test_a_change_is_a_step(self, watch, linear, images, change, name):
        output = linear(images)
        before = ref_of(output)
        change(output)
        after = ref_of(output)
        assert type(output) is Traced
        assert after.step is not before.step
        assert after.step.in_place
        assert after.step.args[0].step is before.step

    def test_the_statement_is_noted_too(self, watch, linear, images):
        output = linear(images)
        output *= 2
        output[0] = 0.5
        assert len(names_of(output)) == 3

    def test_twice_the_steps_stand_in_a_row(self, watch, linear, images):
        output = linear(images)
        output.add_(1).mul_(2)
        assert names_of(output) == ["Sequential", "add_", "mul_"]

    def test_what_was_made_before_still_knows_its_way(self, watch, linear, images):
        output = linear(images)
        made = output + 1
        output.mul_(2)
        assert names_of(made) == ["Sequential", "add"]

    def test_of_a_view_changes_its_base_unseen(self, watch, linear, images):
        output = linear(images)
        output[:, 0].mul_(2)
        assert ref_of(output) is None

    def test_outputs_are_kept_as_they_were(self, watch, linear, images):
        expected = linear(images).detach().clone()
        output = linear(images).mul_(10)
        assert torch.equal(steps_to([ref_of(output)])[0].call.outputs[0], expected)

    def test_of_a_memory_of_detached_ones_is_not_noted(self, watch, linear, images):
        memory = torch.zeros(16, 4)
        memory[:8] = linear(images).detach()
        assert type(memory) is torch.Tensor
        assert torch.equal(memory[:8], linear(images))

    def test_of_a_tensor_of_ones_own_is_noted_with_what_it_held(self, watch, linear, images):
        table = torch.zeros(8, 4)
        table[:4] = linear(images[:4])
        (table * 2).sum().backward()
        ref = ref_of(table)
        assert ref.step.in_place
        assert torch.equal(ref.step.args[0].value, torch.zeros(8, 4))

    def test_names_with_underscores_that_change_nothing(self, watch, linear, images):
        output = linear(images)
        made = output.__add__(1)
        assert names_of(output) == ["Sequential"]
        assert names_of(made) == ["Sequential", "add"] or names_of(made) == ["Sequential", "__add__"]

    def test_requires_grad_changes_nothing(self, watch, linear, images):
        output = linear(images)
        output.requires_grad_()
        assert ref_of(output) is not None
        assert names_of(output)[0] == "Sequential"


class TestNote:
    def test_a_tensor_can_be_noted_by_hand(self):
        step = Step(torch.mul, (), {})
        for made in (torch.rand(2, requires_grad=True) * 2, torch.rand(2)):
            note(made, Ref(step, 3))
            assert type(made) is Traced
            assert ref_of(made).step is step
            assert ref_of(made).place == 3

    @pytest.mark.parametrize("tensor", [nn.Parameter(torch.rand(2)), torch.rand(2).as_subclass(Own)], ids=["p", "own"])
    def test_others_stay_as_they_are(self, tensor):
        kind, step = type(tensor), Step(torch.mul, (), {})
        note(tensor, Ref(step, 0))
        assert type(tensor) is kind
        assert ref_of(tensor) is None


class TestPlain:
    def test_they_are_tensors_like_others_inside(self, watch, model, images):
        output, other = model(images), torch.rand(2)
        with plain([output, other, None, "text"]):
            assert type(output) is torch.Tensor
            assert type(output * 2) is torch.Tensor
        assert type(output) is Traced
        assert type(other) is torch.Tensor
        assert names_of(output * 2) == ["Sequential", "mul"]

    def test_also_after_an_exception(self, watch, model, images):
        output = model(images)
        with pytest.raises(ArithmeticError), plain([output]):
            raise ArithmeticError
        assert type(output) is Traced

    def test_one_that_is_named_twice(self, watch, model, images):
        output = model(images)
        with plain([output, output]):
            with plain([output]):
                assert type(output) is torch.Tensor
            assert type(output) is torch.Tensor
        assert type(output) is Traced


class TestUsesOfATracedTensor:
    """Whatever is done with a tensor can be done with a traced one, with the same result."""

    @pytest.fixture
    def output(self, watch, model, images):
        return model(images)

    def test_its_numbers_are_shown(self, output):
        with plain([output]):
            expected = repr(output)
        assert repr(output) == expected
        assert f"{output.sum().detach():.3f}" == f"{output.sum().item():.3f}"

    def test_numpy(self, output):
        values = output.detach().numpy()
        assert values.tolist() == output.tolist()
        with pytest.raises(RuntimeError, match="requires grad"):
            output.numpy()

    def test_no_grad_numpy(self, output):
        with torch.no_grad():
            assert output.cpu().detach().numpy().shape == (8, 4)

    def test_deepcopy_raises_or_copies_as_for_a_plain_one(self, output):
        with plain([output]), pytest.raises(RuntimeError) as expected:
            copy.deepcopy(output)
        with pytest.raises(RuntimeError) as found:
            copy.deepcopy(output)
        assert str(found.value) == str(expected.value)

    def test_a_deepcopy_of_a_detached_one(self, output):
        copied = copy.deepcopy(output.detach())
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, output)

    def test_copy(self, output):
        assert torch.equal(copy.copy(output), output)

    def test_saved_and_loaded_without_gradient(self, output):
        file = io.BytesIO()
        torch.save({"embeddings": output.detach()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["embeddings"]
        assert type(loaded) is torch.Tensor
        assert torch.equal(loaded, output)

    def test_pickled(self, output):
        assert torch.equal(pickle.loads(pickle.dumps(output)), output)

    def test_what_is_saved_holds_neither_model_nor_inputs(self, model, images):
        expected = len(pickle.dumps((model(images).detach() * 1).requires_grad_()))
        _watch = Watch()
        for output in (model(images), model(images) * 1, model(images).detach()):
            assert len(pickle.dumps(output)) < expected + 200
        file = io.BytesIO()
        torch.save(model(images), file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True), model(images))

    def test_backward_and_its_gradients(self, model, images):
        plain_output = model(images)
        expected = torch.autograd.grad(plain_output.square().sum(), list(model.parameters()))
        _watch = Watch()
        found = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    def test_gradient_of_itself(self, output):
        (gradient,) = torch.autograd.grad(output.square().sum(), output)
        assert torch.equal(gradient, 2 * output)

    def test_a_second_derivative(self, watch, model, images):
        given = images.clone().requires_grad_()
        output = model(given)
        (gradient,) = torch.autograd.grad(output.sum(), given, create_graph=True)
        gradient.square().sum().backward()
        assert given.grad.abs().sum() > 0

    def test_weights_that_are_made_of_it(self, output):
        for value in (output.detach(), output):
            weight = nn.Parameter(value)
            assert isinstance(weight, nn.Parameter)
            assert weight.is_leaf
            weight.sum().backward()
            assert weight.grad.tolist() == [[1] * 4] * 8

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
    def test_a_layer_whose_weight_is_made_of_it_is_copied_and_saved_as_others(self, watch, model, images, mode):
        with mode():
            features = functional.normalize(model(images))
        layer = nn.Linear(4, 8, bias=False)
        layer.weight = nn.Parameter(features)
        layer(images[:, 0, 0, :4]).sum().backward()
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        frozen = nn.Linear(4, 8, bias=False)
        frozen.weight = nn.Parameter(features, requires_grad=False)
        copies = copy.deepcopy(layer), torch.load(file, weights_only=False), copy.deepcopy(frozen)
        for one, needs in zip((layer, frozen, *copies), (True, False, True, True, False), strict=True):
            assert type(one.weight) is nn.Parameter
            assert one.weight.requires_grad is needs
            assert vars(one.weight) == {}
            assert torch.equal(one.weight, features)
        assert type(features) is Traced

    def test_a_leaf_that_is_made_of_it_is_copied_and_saved_as_others(self, output):
        leaf = output.detach().clone().requires_grad_()
        leaf.square().sum().backward()
        for copied in (copy.deepcopy(leaf), pickle.loads(pickle.dumps(leaf))):
            assert type(copied) is torch.Tensor
            assert copied.is_leaf
            assert copied.requires_grad
            assert torch.equal(copied, leaf)
        copied = copy.deepcopy(leaf)
        assert torch.equal(copied.grad, leaf.grad)
        assert copied.grad is not leaf.grad

    def test_iteration_and_unpacking(self, output):
        first, *others = output
        assert len(others) == 7
        assert names_of(first)[0] == "Sequential"

    def test_as_a_key(self, output):
        assert {output: 1}[output] == 1
        assert output in {output}

    def test_data_assigned(self, output):
        output.data = torch.zeros(8, 4)
        assert output.sum() == 0

    def test_isinstance(self, output):
        assert isinstance(output, torch.Tensor)
        assert torch.is_tensor(output)
        assert not isinstance(output, nn.Parameter)

    def test_vmap_and_func(self, watch, model, images):
        jacobian = torch.func.jacrev(lambda x: model(x[None])[0])(images[0])
        assert jacobian.shape == (4, 1, 6, 6)
        per_image = torch.vmap(lambda x: model(x[None])[0])(images)
        torch.testing.assert_close(per_image, model(images))

    def test_checkpointing(self, watch, model, images):
        for reentrant in (False, True):
            given = images.clone().requires_grad_()
            checkpoint(model, given, use_reentrant=reentrant).sum().backward()
            assert given.grad.abs().sum() > 0

    def test_no_warning(self, watch, model, images):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = functional.normalize(model(images))
            output.sum().backward()

    def test_after_its_watch_is_gone(self, model, images):
        watch = Watch()
        output = model(images)
        del watch
        gc.collect()
        (output * 2).sum().backward()
        assert model[1].weight.grad is not None


class TestMemory:
    """What a trace holds dies with the tensors that were traced."""

    def inputs_live(self, run, images):
        batch = images.clone()
        watched = weakref.ref(batch)
        output = run(batch)
        del batch
        meanwhile = watched() is not None
        del output
        return meanwhile, watched() is not None  # no collection of garbage is needed

    def test_inputs_die_with_the_output(self, watch, model, images):
        assert self.inputs_live(model, images) == (True, False)

    def test_inputs_die_with_what_was_made_of_the_output(self, watch, model, images):
        assert self.inputs_live(lambda batch: functional.normalize(model(batch)), images) == (True, False)

    def test_inputs_die_with_an_output_that_was_changed_in_place(self, watch, linear, images):
        assert self.inputs_live(lambda batch: linear(batch).mul_(2), images) == (True, False)

    @pytest.mark.parametrize(
        "keep",
        [
            lambda total, loss: total + loss.detach(),
            lambda total, loss: total + loss,
            lambda total, loss: torch.stack([total, loss.detach()]).sum(),
            lambda total, loss: 0.9 * total + 0.1 * loss.data,
        ],
        ids=["detached", "with gradient", "stacked", "average"],
    )
    def test_a_running_total_over_losses_keeps_nothing(self, watch, model, images, keep):
        total, seen = torch.zeros(()), []
        for _ in range(6):
            batch = images.clone()
            seen.append(weakref.ref(batch))
            loss = functional.mse_loss(model(batch), torch.zeros(8, 4))
            loss.backward()
            total = keep(total, loss)
            watch.forget()  # as a loss that is wrapped does it
            del batch, loss
            gc.collect()
        assert [batch() for batch in seen[:4]] == [None] * 4
        for _ in range(2):
            model(images)
            watch.forget()
        model(images)
        assert [batch() for batch in seen] == [None] * 6
        assert total > 0

    def test_a_total_whose_loss_is_wrapped_by_none_keeps_few(self, watch, model, images):
        total, seen = 0, []
        for _ in range(40):
            batch = images.clone()
            seen.append(weakref.ref(batch))
            loss = functional.mse_loss(model(batch), torch.zeros(8, 4))
            loss.backward()
            total = total + loss.detach()
            del batch, loss
        assert not any(batch() is not None for batch in seen[:20])

    @pytest.mark.parametrize("keep", [lambda e: e.detach(), lambda e: e > 0, lambda e: e.argmax(1)], ids=range(3))
    def test_what_is_kept_without_gradient_keeps_no_inputs(self, watch, model, images, keep):
        kept, batch = [], images.clone()
        seen = weakref.ref(batch)
        kept.append(keep(model(batch)))
        del batch
        for _ in range(2):
            watch.forget()
            model(images)
        assert seen() is None

    def test_an_output_that_its_argument_holds(self, watch, images):
        class Remembers(nn.Module):
            def forward(self, batch, memory):
                memory.append(batch * 2)
                return memory[-1]

        memory = []
        output = weakref.ref(Remembers()(images.requires_grad_(), memory))
        assert output() is not None
        del memory
        gc.collect()
        assert output() is None

    def test_modules_die_though_they_were_called(self, watch, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        model(images)
        seen = weakref.ref(model)
        del model
        gc.collect()
        assert seen() is None
