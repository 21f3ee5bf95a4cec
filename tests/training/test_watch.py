"""Outermost modules give tensors that know how they were made, and are left as they were."""

import copy
import gc
import pickle
import sys
import threading
import types
import warnings

import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as nn_module
from traces import Own, Raises, Returns, global_hooks, hooks_of, names_of

from pml_adversarial import AdversarialLoss
from pml_adversarial.training.nested import tensors_in
from pml_adversarial.training.trace import steps_to
from pml_adversarial.training.tracing import Traced, paused, ref_of
from pml_adversarial.training.watch import Watch, submodules_of, weights_of


class TestOutputsOfModules:
    def test_are_traced_to_the_inputs(self, watch, model, images):
        output = model(images)
        ref = ref_of(output)
        assert type(output) is Traced
        assert ref.step.function is model
        assert ref.place == 0
        (given,) = ref.step.args
        assert given.value is images

    def test_are_what_they_were_without(self, model, images):
        expected = model(images)
        weight = model[1].weight
        (gradient,) = torch.autograd.grad(expected.sum(), weight)
        _watch = Watch()
        output = model(images)
        assert torch.equal(output, expected)
        assert torch.equal(torch.autograd.grad(output.sum(), weight)[0], gradient)

    def test_by_keyword(self, watch):
        given = torch.rand(2, 3)
        step = ref_of(nn.Linear(3, 2)(input=given)).step
        assert step.args == ()
        assert step.kwargs["input"].value is given

    def test_a_chain_is_one_step_for_each_module(self, watch, images):
        trunk, head = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), nn.Linear(4, 2)
        features = trunk(images)
        step = ref_of(head(features)).step
        assert step.refs[0].step.function is trunk
        assert names_of(head(features)) == ["Sequential", "Linear"]

    def test_modules_inside_modules_are_one_step(self, watch, model, images):
        outer = nn.Sequential(nn.Sequential(model), nn.Tanh())
        assert names_of(outer(images)) == ["Sequential"]
        assert type(model(images)) is Traced

    def test_modules_inside_modules_cost_nothing(self, watch, model, images):
        inside = []
        model[1].register_forward_hook(lambda *_: inside.append(global_hooks()))
        before = global_hooks()
        model(images)
        assert inside == [{}]
        assert global_hooks() == before

    def test_nothing_inside_is_traced(self, watch, model, images):
        kinds = []
        for module in model:
            module.register_forward_hook(lambda module, args, output: kinds.append((type(args[0]), type(output))))
        model(images)
        assert kinds == [(torch.Tensor, torch.Tensor)] * 4

    def test_a_module_gets_plain_tensors_of_traced_ones(self, watch, model, images):
        kinds = []
        head = Returns(nn.Identity(), lambda tensor: kinds.append(type(tensor)) or tensor * 2)
        output = model(images)
        head(output)
        assert kinds == [torch.Tensor]
        assert type(output) is Traced

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda e: (e, e * 2),
            lambda e: [e, e * 2],
            lambda e: {"a": e, "b": e * 2},
            lambda e: {"a": (e,), "b": [{"c": e * 2}]},
        ],
        ids=["tuple", "list", "dict", "nested"],
    )
    def test_in_containers_are_all_traced(self, watch, model, images, wrap):
        outer = Returns(model, wrap)
        first, second = tensors_in(outer(images))
        assert (ref_of(first).place, ref_of(second).place) == (0, 1)
        assert ref_of(first).step is ref_of(second).step
        kept = ref_of(first).step.call.outputs
        assert torch.equal(kept[0], first)
        assert torch.equal(kept[1], second)

    def test_that_need_no_gradient_are_traced_too(self, watch, model, images):
        outer = Returns(model, lambda e: (e, e.argmax(1), e.detach()))
        found = outer(images)
        assert [type(output) for output in found] == [Traced] * 3
        assert [ref_of(output).place for output in found] == [0, 1, 2]
        (step,) = {ref_of(output).step for output in found}
        assert step.chosen[1].equal(found[1])

    def test_that_are_whole_numbers_alone_are_plain(self, watch, model, images):
        assert type(Returns(model, lambda e: e.argmax(1))(images)) is torch.Tensor

    def test_that_are_whole_numbers_of_another_length_are_plain(self, watch, model, images):
        _, numbers = Returns(model, lambda e: (e, torch.arange(3)))(images)
        assert type(numbers) is torch.Tensor

    def test_that_are_scalars_are_plain(self, watch, model, images, labels):
        loss_func = nn.CrossEntropyLoss()
        assert type(loss_func(model(images), labels)) is torch.Tensor

    @pytest.mark.parametrize("output", [None, "text", 3, ()])
    def test_that_are_no_tensors_come_through(self, watch, images, output):
        assert Returns(nn.Identity(), lambda _: output)(images) == output
        assert not watch.seen["without gradient"]

    def test_that_are_parameters_are_left_alone(self, watch):
        table = nn.Parameter(torch.rand(3, 4))
        output = Returns(nn.Identity(), lambda _: table)(torch.rand(2))
        assert output is table
        assert type(table) is nn.Parameter

    def test_that_are_leaves_are_not_lost(self, watch):
        given = torch.rand(2, 3, requires_grad=True)
        output = nn.Identity()(given)
        output.sum().backward()
        assert given.grad.tolist() == [[1] * 3] * 2

    def test_of_a_users_class_of_tensors_are_left_alone(self, watch, model, images):
        outer = Returns(model, lambda e: e.as_subclass(Own))
        output = outer(images)
        assert type(output) is Own
        assert type(output * 2) is Own
        assert ref_of(output) is None

    def test_the_modes_are_kept(self, watch, moody_model, images):
        moody_model[3].eval()
        step = ref_of(moody_model(images)).step
        assert step.call.modes == (True, True, True, True, False, True, True)

    def test_replaced_parameters_are_kept(self, watch, model, images):
        weights = {name: value * 2 for name, value in model.named_parameters()}
        step = ref_of(torch.func.functional_call(model, weights, (images,))).step
        step.call.find_swapped(model, weights_of(submodules_of(model)))
        assert step.call.swapped.keys() == weights.keys()
        assert ref_of(model(images)).step.call.swapped == {}

    def test_an_input_that_is_changed_in_place_is_told(self, watch, model, images):
        outer = Returns(model, lambda e: e)
        outer.register_forward_pre_hook(lambda module, args: (args[0].sub_(0.1), None)[1])
        given = images.clone()
        assert ref_of(outer(given)).step.call.changed
        assert not ref_of(model(images)).step.call.changed

    @pytest.mark.parametrize("wanted", [True, False])
    def test_random_numbers_are_told_if_they_are_wanted(self, watch, images, wanted):
        watch.wants_state = wanted
        module = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(36, 2))
        output = module(images)
        dropped = functional.dropout(output)
        for made, again in ((output, lambda: module(images)), (dropped, lambda: functional.dropout(output))):
            state = ref_of(made).step.random_state
            assert (state is not None) == wanted
            if wanted:
                torch.set_rng_state(state.on_cpu)
                assert torch.equal(again(), made)

    def test_buffers_without_values_are_left_out(self, watch, images):
        watch.wants_state = True
        lazy = nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d())
        told = ref_of(lazy(images.requires_grad_())).step.call.buffers
        assert [name for _, name, _ in told] == ["num_batches_tracked"]

    def test_what_else_a_call_changes_is_told_if_random_numbers_are(self, watch, images):
        class Counting(nn.Linear):
            def forward(self, x):
                self.calls += 1
                return super().forward(x)

        module = Counting(36, 2)
        module.calls = torch.zeros(())
        module(images.flatten(1))
        watch.wants_state = True
        (put_back,) = ref_of(module(images.flatten(1))).step.call.changed_state
        assert module.calls == 2
        put_back()
        assert module.calls == 1

    def test_buffers_are_told_if_random_numbers_are(self, watch, moody_model, images):
        watch.wants_state = True
        before = [buffer.clone() for buffer in moody_model.buffers()]
        told = ref_of(moody_model(images)).step.call.buffers
        assert [(module, name) for module, name, _ in told] == [
            (moody_model[1], name) for name in moody_model[1]._buffers
        ]
        assert all(torch.equal(value, other) for (*_, value), other in zip(told, before, strict=True))
        assert not torch.equal(moody_model[1].running_mean, told[0][2])

    def test_autocast_is_told(self, watch, model, images):
        with torch.autocast("cpu", torch.bfloat16):
            inside = ref_of(model(images)).step
        assert inside.autocast == {"cpu": torch.bfloat16}
        assert ref_of(model(images)).step.autocast == {}

    def test_two_calls_are_two_steps(self, watch, model, images):
        first, second = model(images[:4]), model(images[4:])
        assert ref_of(first).step.number < ref_of(second).step.number
        assert ref_of(first).step.args[0].value.equal(images[:4])


# What is done to embeddings (8, 4), and the name under which it is noted


class TestWatch:
    def test_modules_that_are_named(self, model, images):
        watch = Watch([model])
        other = copy.deepcopy(model)
        assert type(model(images)) is Traced
        assert type(other(images)) is torch.Tensor
        assert watch.seen == {"with gradient": {"Sequential"}, "without gradient": set(), "not watched": {"Sequential"}}

    def test_modules_that_hold_one_or_are_held(self, model, images):
        _watch = Watch([model])
        assert type(nn.Sequential(model, nn.Tanh())(images)) is Traced
        assert type(model[1](images.flatten(1))) is Traced

    def test_modules_that_take_what_was_noted(self, model, images):
        _watch = Watch([model])
        head = nn.Linear(4, 2)
        assert type(head(torch.rand(3, 4))) is torch.Tensor
        assert names_of(head(model(images))) == ["Sequential", "Linear"]
        assert names_of(head(input=model(images))) == ["Sequential", "Linear"]

    def test_a_module_that_another_watch_names_is_noted_for_both(self, model, images):
        other = copy.deepcopy(model)
        _first, _second = Watch([model]), Watch([other])
        assert type(model(images)) is type(other(images)) is Traced

    def test_a_watch_that_is_new_sees_modules_that_were_not_watched(self, model, images):
        _first = Watch([nn.Identity()])
        assert type(model(images)) is torch.Tensor
        _second = Watch([model])
        assert type(model(images)) is Traced

    def test_none_leaves_nothing_global(self, model, images):
        gc.collect()
        before = global_hooks()
        watch = Watch()
        during = global_hooks()
        assert during != before
        output = model(images)
        del watch
        gc.collect()
        model(images)  # the hook goes with the first call that finds nobody who watches
        assert global_hooks() == before
        assert type(model(images)) is torch.Tensor
        assert (output * 2).shape == (8, 4)

    def test_a_new_one_after_the_last_is_seen(self, model, images):
        for _ in range(3):
            watch = Watch()
            assert type(model(images)) is Traced
            del watch
            gc.collect()
            assert type(model(images)) is torch.Tensor

    def test_two_share_one_hook(self, watch):
        before = global_hooks()
        _other = Watch()
        assert global_hooks() == before

    def test_a_watch_that_dies_while_a_model_runs(self, model, images):
        watches = [Watch()]
        model[1].register_forward_hook(lambda *_: watches.clear())
        expected = model(images)
        assert torch.equal(model(images), expected)
        assert hooks_of(model)[0]["_forward_hooks"] == {}

    def test_a_watch_that_begins_while_a_model_runs(self, model, images):
        watches = []
        model[1].register_forward_hook(lambda *_: watches.append(Watch()))
        before = hooks_of(model)
        model(images)
        assert hooks_of(model) == before
        assert type(model(images)) is Traced


class TestModulesStayAsTheyWere:
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_no_hook_is_left(self, watch, moody_model, images, mode):
        before, globally = hooks_of(moody_model), global_hooks()
        with mode():
            moody_model(images)
        assert hooks_of(moody_model) == before
        assert global_hooks() == globally

    @pytest.mark.parametrize("after", [True, False])
    def test_nor_after_an_exception(self, watch, model, images, after):
        failing = Raises(model, after)
        before, globally = hooks_of(failing), global_hooks()
        for _ in range(2):
            with pytest.raises(ArithmeticError, match="of the user's"):
                failing(images)
        assert hooks_of(failing) == before
        assert global_hooks() == globally
        assert type(model(images)) is Traced

    def test_nor_after_one_of_a_users_hook(self, watch, model, images):
        def fail(*_):
            raise ArithmeticError

        for register in (model.register_forward_pre_hook, model.register_forward_hook):
            handle = register(fail)
            before, globally = hooks_of(model), global_hooks()
            with pytest.raises(ArithmeticError):
                model(images)
            assert hooks_of(model) == before
            assert global_hooks() == globally
            handle.remove()
        assert type(model(images)) is Traced

    def test_traced_arguments_of_a_module_that_raises_are_traced_again(self, watch, model, images):
        output = model(images)
        with pytest.raises(ArithmeticError):
            Raises(nn.Identity())(output)
        assert type(output) is Traced
        assert names_of(output * 2) == ["Sequential", "mul"]

    def test_a_wrong_call_raises_what_it_raises_without(self, model, images):
        with pytest.raises(TypeError) as expected:
            model()
        _watch = Watch()
        before = hooks_of(model)
        with pytest.raises(TypeError) as found:
            model()
        assert str(found.value) == str(expected.value)
        assert hooks_of(model) == before

    def test_hooks_of_the_user_run_as_without(self, model, images):
        met = []
        model.register_forward_pre_hook(lambda module, args: met.append("before"))
        model.register_forward_hook(lambda module, args, output: met.append("after") or output + 1)
        expected = model(images)
        _watch = Watch()
        output = model(images)
        assert met == ["before", "after"] * 2
        assert torch.equal(output, expected)
        assert torch.equal(ref_of(output).step.call.outputs[0], expected)

    def test_a_hook_of_the_user_may_change_the_inputs(self, watch, model, images):
        model.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        output = model(images)
        assert torch.equal(output, model[3](model[2](model[1](model[0](images * 0.5)))))


class TestWrappersAreTransparent:
    """A model may be run inside a module that holds the loss, such as a module of Lightning."""

    def test_calls_inside_a_module_that_holds_a_wrapper_are_noted(self, model, images):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.model, self.loss_func = model, AdversarialLoss(ContrastiveLoss(), model)

            def forward(self, batch):
                return self.model(batch) * 2

        outer = Both()
        output = outer(images)
        assert names_of(output) == ["Sequential", "mul"]

    def test_the_loss_itself_is_no_step(self, model, images, labels):
        loss_func = AdversarialLoss(ContrastiveLoss(), model, warmup=0)
        embeddings = model(images)
        value = loss_func(embeddings, labels)
        assert type(value) is torch.Tensor
        assert type(embeddings) is Traced
        assert names_of(embeddings) == ["Sequential"]


class TestArguments:
    """Whatever a module takes, it is called with it."""

    @pytest.mark.parametrize("kind", ["proxy", "own tuple", "cycle", "none"])
    def test_that_cannot_be_copied_do_not_stop_it(self, watch, images, kind):
        class OwnTuple(tuple):
            def __new__(cls, one, other):
                return super().__new__(cls, (one, other))

        class Takes(nn.Module):
            def forward(self, images, other):
                return images.flatten(1) * torch.ones(36, requires_grad=True)

        cycle = []
        cycle.append(cycle)
        other = {"proxy": types.MappingProxyType({"a": 1}), "own tuple": OwnTuple(1, 2), "cycle": cycle, "none": None}
        output = Takes()(images, other[kind])
        assert output.shape == (8, 36)
        assert ref_of(output).step.args[0].value is images

    @pytest.mark.parametrize("by_name", [True, False])
    def test_that_it_changes_are_noted_as_they_were_and_are_those_that_it_was_given(
        self, watch, model, images, by_name
    ):
        class Empties(nn.Module):
            def forward(self, batch, seen):
                seen.append(batch)
                return batch.setdefault("made", model(batch.pop("image")))

        batch, seen = {"image": images, "others": [1]}, []
        step = ref_of(Empties()(**{"batch": batch, "seen": seen}) if by_name else Empties()(batch, seen)).step
        noted = step.kwargs["batch"] if by_name else step.args[0]
        assert noted["image"].value is images
        assert noted.keys() == {"image", "others"}
        assert seen == [batch]
        assert seen[0] is batch
        assert batch.keys() == {"made", "others"}

    def test_by_keyword_that_it_changes_in_place_are_told(self, watch, model, images):
        class Shifts(nn.Module):
            def forward(self, x):
                return model(x.sub_(0.1))

        assert ref_of(Shifts()(x=images.clone())).step.call.changed

    def test_by_keyword_come_as_plain_tensors(self, watch, model, images):
        kinds = []

        class Head(nn.Module):
            def forward(self, features):
                kinds.append(type(features))
                return features * 2

        assert names_of(Head()(features=model(images))) == ["Sequential", "Head"]
        assert kinds == [torch.Tensor]


class TestThreads:
    def run_in_thread(self, function):
        found = []
        thread = threading.Thread(target=lambda: found.append(function()))
        thread.start()
        thread.join()
        return found[0]

    def test_calls_in_a_thread_are_noted(self, watch, model, images):
        output = self.run_in_thread(lambda: model(images))
        assert names_of(output) == ["Sequential"]
        assert names_of(output * 2) == ["Sequential", "mul"]

    def test_many_at_once(self, watch, images):
        models, failed = [nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(36, 4)) for _ in range(4)], []

        def work(model):
            try:
                for _ in range(200):
                    assert names_of(model(images)) == ["Sequential"]
            except Exception as error:
                failed.append(error)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            threads = [threading.Thread(target=work, args=(model,)) for model in models]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert failed == []

    def test_paused_in_one_thread_is_not_paused_in_another(self, watch, model, images):
        with paused():
            assert type(self.run_in_thread(lambda: model(images))) is Traced


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
class TestCompiled:
    @pytest.fixture(autouse=True)
    def nothing_compiled_before(self):
        torch.compiler.reset()  # there is a limit for all compiled modules of a process

    def test_a_compiled_module_is_one_step(self, watch, model, images):
        compiled = torch.compile(model, backend="eager")
        output = compiled(images)
        torch.testing.assert_close(output, model(images))
        (step,) = steps_to([ref_of(output)])
        assert step.call is not None
        assert names_of(output * 2)[1:] == ["mul"]

    def test_a_compiled_module_is_not_compiled_anew_in_each_step(self, watch, model, images):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(model, backend=backend)
        for _ in range(4):
            compiled(images)
        assert len(graphs) == 1

    def test_a_compiled_function_of_traced_tensors(self, watch, model, images):
        compiled = torch.compile(lambda e: e / e.norm(dim=1, keepdim=True), backend="eager")
        output = model(images)
        torch.testing.assert_close(compiled(output), functional.normalize(output))

    def test_a_compiled_function_that_calls_the_model(self, watch, model, images):
        compiled = torch.compile(lambda x: functional.normalize(model(x)), backend="eager")
        torch.testing.assert_close(compiled(images), functional.normalize(model(images)))

    def test_a_model_that_is_traced_by_jit(self, watch, model, images):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            traced = torch.jit.trace(model, images)
        assert torch.equal(traced(images), model(images))
        assert len(names_of(traced(images))) == 1

    def test_a_scripted_model(self, watch, model, images):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = torch.jit.script(model)
        before = global_hooks()
        output = [scripted(images) for _ in range(3)][-1]
        assert global_hooks() == before
        assert torch.equal(output, model(images))
        assert ref_of(output).step.function is scripted
        assert not nn_module._global_forward_hooks
        assert not getattr(nn_module, "_global_forward_hooks_with_kwargs", {})  # torch 2.4 has none
        assert len(nn_module._global_forward_pre_hooks) == 1

    def test_exported(self, watch, model, images):
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), model(images))


class TestCopiesOfModels:
    def test_a_model_that_was_called_can_be_pickled(self, watch, model, images):
        model(images)
        loaded = pickle.loads(pickle.dumps(model))
        assert type(loaded(images)) is Traced
        assert hooks_of(loaded) == hooks_of(model)


class TestWeights:
    """What tells that a module is another one now."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: setattr(m[1].weight, "data", 2 * m[1].weight.data),
            lambda m: torch.optim.SGD(m.parameters(), lr=0.1).step(),
            lambda m: m.__setitem__(1, nn.Linear(36, 4)),
            lambda m: m[1].register_forward_hook(lambda *_: None),
        ],
        ids=["other data", "a step of the optimizer", "another layer", "a hook"],
    )
    def test_change_with(self, linear, images, change):
        linear(images).sum().backward()
        before = weights_of(submodules_of(linear))
        assert weights_of(submodules_of(linear)) == before
        change(linear)
        assert weights_of(submodules_of(linear)) != before


class TestFunctionsOfTorchFunc:
    @pytest.mark.parametrize("wants_state", [False, True])
    def test_run_as_without_a_watch(self, watch, model, images, wants_state):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}

        def gradient(image):
            return torch.func.grad(lambda p: torch.func.functional_call(model, p, (image[None],)).sum())(parameters)

        def run():
            ensemble = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (images,)))(stacked)
            return [ensemble, *torch.func.vmap(gradient)(images).values()]

        watch.wants_state = wants_state
        with paused():
            expected = run()
        for found, value in zip(run(), expected, strict=True):
            torch.testing.assert_close(found, value)
