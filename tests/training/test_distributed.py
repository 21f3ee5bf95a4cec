"""Two processes against one that holds the union of their batches; the processes are started once, by torchrun."""

import math
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from notes import Notes
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from seed_paper import seed_paper_loss
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import pml_adversarial
from pml_adversarial import AdversarialLoss, AdversarialMiner
from pml_adversarial.training import distributed
from pml_adversarial.training.distributed import JointBatch

HERE = Path(__file__).parents[1]
RANKS = (0, 1)
each_rank = pytest.mark.parametrize("rank", RANKS)


def torchrun(script, *arguments, timeout=150):
    """Standard output of two processes that run a script; a hang or a failure of one is a failure."""
    package = str(Path(pml_adversarial.__file__).parent.parent)
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    started = subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, errors = started.communicate(timeout=timeout)
    finally:
        started.terminate()  # it ends its processes; nothing if all is over
        started.wait(30)
    assert started.returncode == 0, errors[-6000:]
    return out


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What both ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(HERE / "distributed_worker.py", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in RANKS]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def as_lists(tuples):
    return tuples and [member.tolist() for member in tuples]


def in_rank_order(rows, rank, per_rank):
    """Own rows first -> rank order, of two ranks."""
    return (rows + rank * per_rank) % (2 * per_rank)


@pytest.mark.slow
class TestOneBatch:
    """`AdversarialLoss(DistributedLossWrapper(loss), ddp)` on two ranks is `AdversarialLoss(loss, model)` on one."""

    @pytest.mark.parametrize("name", worker.CASES)
    def test_equals_one_process_with_the_union(self, name, seen):
        case = worker.CASES[name]
        expected = worker.alone(case)
        for rank in RANKS:
            found = seen[rank]["cases"][name]
            close(found["loss"], 2 * expected["loss"])  # as PML's wrapper has it: DDP averages gradients
            close(found["gradients"], expected["gradients"])
            close(found["weights"], expected["weights"])
            for record in ("loss_before", "loss_after", "strength"):
                assert found["records"][record] == pytest.approx(expected["records"][record], abs=1e-8, nan_ok=True)

    @pytest.mark.parametrize("name", [name for name in worker.CASES if not name.startswith("nobody")])
    def test_each_rank_attacks_copies_of_its_own_rows(self, name, seen):
        expected = worker.alone(worker.CASES[name])["seen"]
        made = []
        for rank in RANKS:
            found = seen[rank]["cases"][name]["seen"]
            rows, layout, tuples, ref_pool_indices = found["plan"]
            assert torch.equal(rows, expected["plan"][0])
            assert torch.equal(layout, expected["plan"][1])
            assert as_lists(tuples) == as_lists(expected["plan"][2])
            assert (ref_pool_indices is None) == (expected["plan"][3] is None)
            rows_of_rank = self.rows_of(rank, worker.CASES[name])
            assert [m for m, row in enumerate(rows.tolist()) if row in rows_of_rank] == found["own"].tolist()
            close(found["inputs"], expected["inputs"][found["own"]])
            close(found["scores"], expected["scores"][:, found["own"]])
            close(found["embeddings"], expected["embeddings"])
            close(found["context"], expected["context"])
            made += found["own"].tolist()
        assert sorted(made) == list(range(len(expected["plan"][0])))

    @staticmethod
    def rows_of(rank, case):
        queries = set(range(6 * rank, 6 * rank + 6))
        refs = 0 if case.ref is None else 6 if case.shared else 4
        return queries | set(range(12 + refs * rank, 12 + refs * rank + refs))

    @pytest.mark.parametrize("name", worker.CASES)
    def test_records_are_of_own_copies(self, name, seen):
        expected = worker.alone(worker.CASES[name])["records"]
        of_ranks = [seen[rank]["cases"][name]["records"] for rank in RANKS]
        having = [records for records in of_ranks if records["num_perturbed"]]  # those of the others are NaN
        count = sum(records["num_perturbed"] for records in having)
        assert count == expected["num_perturbed"]
        assert count or math.isnan(expected["perturbation_linf"])
        if count:
            assert max(r["perturbation_linf"] for r in having) == pytest.approx(expected["perturbation_linf"])
        for mean in ("perturbation_l2", "embedding_shift", "share_score_rose", "share_zero_gradient"):
            total = sum(records["num_perturbed"] * records[mean] for records in having)
            found = total / count if count else math.nan
            assert found == pytest.approx(expected[mean], abs=1e-6, nan_ok=True)
            assert all(math.isnan(records[mean]) for records in of_ranks if not records["num_perturbed"])

    def test_a_rank_may_have_no_copies(self, seen):
        names = [name for name in worker.CASES if name.startswith("one rank alone")]
        assert len(names) == 3
        for name in names:
            alone, idle = (seen[rank]["cases"][name] for rank in RANKS)
            assert (len(alone["seen"]["own"]), len(idle["seen"]["own"])) == (4, 0)
            assert idle["records"]["num_perturbed"] == 0
            assert math.isnan(idle["records"]["embedding_shift"])
            assert idle["records"]["loss_after"] == alone["records"]["loss_after"] > 0

    def test_a_step_that_perturbs_nobody_still_has_a_loss(self, seen):
        assert all(seen[rank]["cases"]["nobody is perturbed"]["loss"] > 0 for rank in RANKS)

    @each_rank
    def test_tuples_are_those_of_rank_0(self, rank, seen):
        found = seen[rank]["cases"]["one rank alone has copies"]["seen"]["tuples"]
        assert torch.equal(torch.stack(found), torch.stack(worker.ONE_SIDED))

    @each_rank
    def test_ranks_train_the_same_weights(self, rank, seen):
        for name in worker.CASES:
            close(seen[rank]["cases"][name]["weights"], seen[1 - rank]["cases"][name]["weights"])

    def test_cases_perturb_what_they_are_there_for(self, seen):
        for name, found in seen[0]["cases"].items():
            moved = 0 if name == "no budget" or name.startswith("nobody") else 0.02
            assert (found["records"]["perturbation_linf"] > moved) == bool(moved), name


@pytest.mark.slow
class TestCommunication:
    def test_does_not_depend_on_the_attack_steps(self, seen):
        for rank in RANKS:
            found = seen[rank]["collectives"]
            for kind in ("frozen BatchNorm", "BatchNorm"):
                for perturb in ("positive", "all"):
                    one, four, nine = (found[kind, perturb, steps] for steps in (1, 4, 9))
                    assert one == four == nine

    def test_is_this(self, seen):
        counts = {"c10d::allgather_": 7, "c10d::broadcast_": 4, "c10d::allreduce_": 1}  # the last is DDP's own
        for (kind, *_), names in seen[0]["collectives"].items():
            again = kind == "BatchNorm"  # the context, as seen in eval mode
            names = [name.replace("_allgather_base_", "allgather_") for name in names]  # torch 2.15 gathers objects so
            assert {name: names.count(name) for name in names} == {**counts, "c10d::allgather_": 7 + again}

    @each_rank
    def test_rows_and_parts(self, rank, seen):
        found = seen[rank]["gathering"]
        assert found["unequal"].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
        assert found["gradient"].tolist() == [[1, 1, 1]] * (rank + 1)
        assert found["parts"].tolist() == [0, 1, 10, 11, 5, 15]
        assert found["nothing of rank 1"].tolist() == [0, 1, 2, 3]
        assert found["told"] == (rank, ["from 0", "from 1"])
        assert found["decided"] == "rank 0"

    @each_rank
    def test_numbers_rows_as_pml_does(self, rank, seen):
        found = seen[rank]["gathering"]
        assert torch.equal(found["own first"][found["as PML numbers"]], torch.arange(8))
        assert found["as PML numbers"].tolist() != list(range(8)) or rank == 0


@pytest.mark.slow
class TestErrors:
    EXPECTED = types.MappingProxyType(
        {
            "sizes": ("InputError", r"\(6, 4\).*rank 1 one with.*\(5, 4\)"),
            "no labels": ("InputError", "labels: torch.int64, rank 1 one with labels: None"),
            "unknown": ("CaptureError", "not known"),
            "range": ("InputError", "range from"),
            "tuples": ("PlanError", "names rows from 13 to 13"),
            "attack": ("AttackError", "expected finite values in"),
            "mode": ("InputError", "model depends on its mode: True, rank 1 one with model depends on its mode: False"),
            "mode since": ("ReplayError", "changed its mode"),
        }
    )

    @pytest.mark.parametrize("name", EXPECTED)
    def test_on_one_rank_are_raised_on_all(self, name, seen):
        kind, words = self.EXPECTED[name]
        for rank in RANKS:
            assert seen[rank]["errors"][name] is not None, "nothing was raised"
            assert seen[rank]["errors"][name][0] == kind
            with pytest.raises(ValueError, match=words):
                raise ValueError(seen[rank]["errors"][name][1])
        if name not in ("sizes", "no labels", "mode"):
            assert seen[0]["errors"][name][1] == f"Rank 1: {seen[1]['errors'][name][1]}"

    def test_of_others_reach_all_ranks(self, seen):
        assert [seen[rank]["errors"]["plan"] for rank in RANKS] == [
            ("LocalError", "no plan"),
            ("RuntimeError", "LocalError: no plan"),
        ]
        assert [seen[rank]["errors"]["score"] for rank in RANKS] == [
            ("RuntimeError", "LocalError: no score"),
            ("LocalError", "no score"),
        ]

    @each_rank
    def test_rows_without_inputs_before_others(self, rank, seen):
        kind, words = seen[rank]["errors"]["rows without inputs first"]
        assert kind == "InputError"
        assert "expected them behind" in words

    @each_rank
    def test_rank_0_alone_plans(self, rank, seen):
        assert seen[rank]["errors"]["plan elsewhere"] is None

    @each_rank
    def test_leave_the_ranks_in_step(self, rank, seen):
        assert seen[rank]["errors"]["after all"] is None

    @each_rank
    def test_wrong_order_of_miners(self, rank, seen):
        kind, words = seen[rank]["others"]["wrong order"]
        assert kind == "CaptureError"
        assert words.endswith("AdversarialMiner(DistributedMinerWrapper(miner), model).")


@pytest.mark.slow
class TestRandomNumbers:
    def test_differ_between_ranks(self, seen):
        for name in ("seed 5", "each its own loss"):
            assert not torch.equal(seen[0]["noise"][name], seen[1]["noise"][name])

    @each_rank
    def test_are_a_function_of_seed_step_and_rank(self, rank, seen):
        noise = seen[rank]["noise"]
        assert torch.equal(noise["seed 5"], noise["seed 5 again"])
        assert not torch.equal(noise["seed 5"], noise["second step"])
        assert torch.equal(noise["second step"], noise["second step, loaded"])

    @each_rank
    def test_seed_and_step_are_those_of_rank_0(self, rank, seen):
        noise = seen[rank]["noise"]
        assert torch.equal(noise["seed 5"], noise["seeds of their own"])
        assert torch.equal(noise["second step"], noise["second step, loaded by rank 0"])
        assert {**noise["state"], "monitor": None} == {
            "step": 2,
            "seed": 5,
            "monitor": None,
            "plugins": {},
            "attributes": {},
        }
        assert noise["share, loaded by rank 0"] == 0.5


@pytest.mark.slow
class TestMiner:
    @pytest.mark.parametrize("name", worker.MINERS)
    @pytest.mark.parametrize("perturb", ["all", "positive"])
    @pytest.mark.parametrize("ref", [False, True], ids=["no reference", "reference"])
    def test_finds_the_tuples_of_one_process(self, name, perturb, ref, seen):
        model = worker.make_model()
        mined, (embeddings, labels, *reference), count = worker.mine(
            name, perturb, model, lambda miner: miner, lambda rows: rows, ref
        )
        loss = losses.ContrastiveLoss()(embeddings, labels, mined, *reference)
        loss.backward()
        expected = self.as_set(mined, 0, 4 if ref else 6)
        of_ranks = [seen[rank]["miners"]["found"][name, perturb, ref] for rank in RANKS]
        for rank, (found, value, gradients, _) in enumerate(of_ranks):
            assert self.as_set(found, rank, 4 if ref else 6) == expected
            close(value, 2 * loss.detach())
            close(gradients, [p.grad for p in model.parameters()])
        assert sum(own for *_, own in of_ranks) == count > 0
        assert any(len(member) for member in mined)

    @staticmethod
    def as_set(mined, rank, partners):
        names = ("a", "p", "n") if len(mined) == 3 else ("a", "p", "a", "n")
        numbers = [in_rank_order(m, rank, 6 if n == "a" else partners) for n, m in zip(names, mined, strict=True)]
        groups = [numbers] if len(mined) == 3 else [numbers[:2], numbers[2:]]
        return [{*zip(*(m.tolist() for m in group), strict=True)} for group in groups]

    @each_rank
    def test_inputs_may_be_told_to_miner_and_loss(self, rank, seen):
        expected = worker.told_inputs(worker.make_model(), lambda loss: loss, lambda miner: miner, lambda rows: rows)
        found = seen[rank]["told inputs"]
        assert self.as_set(found["mined"], rank, 6) == self.as_set(expected["mined"], 0, 6)
        close(found["loss"], 2 * expected["loss"])
        close(found["gradients"], expected["gradients"])
        assert expected["perturbed"] == (12, 12)
        assert found["perturbed"] == (6, 6)

    @each_rank
    def test_is_pmls_wrapper_without_budget(self, rank, seen):
        found, plain = seen[rank]["miners"]["no budget"]
        assert self.as_set(found, rank, 6) == self.as_set(plain, rank, 6)


@pytest.mark.slow
class TestEachItsOwnLoss:
    @pytest.mark.parametrize("name", worker.LOCAL)
    def test_gradients_are_the_mean_of_the_ranks(self, name, seen):
        case = worker.CASES[name]
        model = worker.make_model(case.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        part = {rank: (lambda rows, rank=rank: rows.chunk(2)[rank]) for rank in RANKS}
        for step in range(case.steps):
            total = [torch.zeros_like(p) for p in model.parameters()]
            values = []
            for rank in RANKS:
                model.zero_grad()
                loss_func = seed_paper_loss(case.loss(), model, attack=worker.PGD, perturb=case.perturb)
                embeddings, labels = model(part[rank](worker.images(12, step))), part[rank](worker.LABELS)
                loss = loss_func(embeddings, labels, case.miner()(embeddings, labels) if case.miner else None)
                loss.backward()
                values.append(loss.detach())
                total = [sum_ + p.grad / 2 for sum_, p in zip(total, model.parameters(), strict=True)]
            for p, gradient in zip(model.parameters(), total, strict=True):
                p.grad = gradient
            optimizer.step()
        for rank in RANKS:
            close(seen[rank]["local"][name]["loss"], values[rank])
            close(seen[rank]["local"][name]["gradients"], total)
        assert values[0] != values[1]


@pytest.mark.slow
class TestBatchNormInTrainMode:
    """Each rank normalises its own rows: one model per rank, the attack written out, the loss by plain loops."""

    def test_by_hand(self, seen):
        models = [worker.make_model("BatchNorm") for _ in RANKS]
        inputs = worker.images(12, 0).chunk(2)
        for model, x in zip(models, inputs, strict=True):
            model.train()(x)  # the forward pass of the batch: it moves the running statistics
        with torch.no_grad():
            context = normalize(torch.cat([model.eval()(x) for model, x in zip(models, inputs, strict=True)]))
        attacked = [
            self.attack(model, x, 6 * rank, context) for rank, (model, x) in enumerate(zip(models, inputs, strict=True))
        ]
        embeddings = [model.train()(x) for model, x in zip(models, attacked, strict=True)]
        loss = self.triplet_loss(normalize(torch.cat(embeddings)))
        loss.backward()
        gradients = [a.grad + b.grad for a, b in zip(*(m.parameters() for m in models), strict=True)]
        for rank in RANKS:
            found = seen[rank]["BatchNorm"]
            close(found["inputs"], attacked[rank])
            close(found["loss"], 2 * loss.detach())
            close(found["gradients"], gradients)
            for name, buffer in models[rank].named_buffers():
                close(found["buffers"][name], buffer)
        assert not torch.equal(
            seen[0]["BatchNorm"]["buffers"]["1.running_mean"], seen[1]["BatchNorm"]["buffers"]["1.running_mean"]
        )

    @staticmethod
    def attack(model, clean, first, context):
        moved = clean
        for _ in range(3):
            x = moved.clone().requires_grad_()
            score = 0
            for i, embedding in enumerate(normalize(model(x)), start=first):
                far = [
                    (embedding - context[j]).norm()
                    for j in range(12)
                    if worker.LABELS[j] == worker.LABELS[i] and j != i
                ]
                near = [(embedding - context[j]).norm() for j in range(12) if worker.LABELS[j] != worker.LABELS[i]]
                score = score + max(far) - min(near)
            (gradient,) = torch.autograd.grad(score, x)
            moved = (clean + (moved + 0.04 * gradient.sign() - clean).clamp(-0.1, 0.1)).clamp(0, 1)
        return moved

    @staticmethod
    def triplet_loss(unit):
        found, labels = [], worker.LABELS.tolist()
        for a in range(12):
            for p in range(12):
                for n in range(12):
                    if labels[a] == labels[p] and a != p and labels[a] != labels[n]:
                        violation = (unit[a] - unit[p]).norm() - (unit[a] - unit[n]).norm() + 0.3
                        found += [violation] if violation > 0 else []
        return torch.stack(found).mean()


@pytest.mark.slow
class TestLossesWithParameters:
    """The loss stands in DistributedDataParallel; as in PML, its own gradients count once for each rank."""

    def test_equal_pml_without_a_budget(self, seen):
        for rank in RANKS:
            close(seen[rank]["proxies, no budget"], seen[rank]["proxies, PML"])

    def test_equal_one_process(self, seen):
        torch.manual_seed(11)
        model = worker.make_model()
        proxies = losses.ProxyAnchorLoss(4, 4).double()
        loss_func = seed_paper_loss(proxies, model, attack=worker.PGD, perturb="all")
        optimizer = torch.optim.SGD(
            [{"params": model.parameters()}, {"params": proxies.parameters(), "lr": 0.02}], 0.01
        )
        for step in range(2):
            optimizer.zero_grad()
            loss = loss_func(model(worker.images(12, step)), worker.LABELS)
            loss.backward()
            optimizer.step()
        for rank in RANKS:
            found = seen[rank]["proxies"]
            close(found["losses"][1], 2 * loss.detach())
            close(found["model"], [p.grad for p in model.parameters()])
            close(found["proxies"], 2 * proxies.proxies.grad)


@pytest.mark.slow
class TestOtherUses:
    @each_rank
    def test_model_is_found_by_itself(self, rank, seen):
        assert torch.equal(seen[rank]["others"]["found by itself"], seen[rank]["others"]["named"])

    @each_rank
    def test_is_pmls_wrapper_in_eval_mode(self, rank, seen):
        assert torch.equal(seen[rank]["others"]["eval"], seen[rank]["others"]["PML"])

    @each_rank
    def test_a_score_of_all_copies_finds_those_of_other_ranks_clean(self, rank, seen):
        model, clean = worker.make_model(), worker.images(12, 0).chunk(2)
        others, moved = model(clean[1 - rank]).detach().sum(0), clean[rank]
        for _ in range(3):
            x = moved.clone().requires_grad_()
            (gradient,) = torch.autograd.grad((model(x).sum(0) + others).square().sum(), x)
            moved = (clean[rank] + (moved + 0.04 * gradient.sign() - clean[rank]).clamp(-0.1, 0.1)).clamp(0, 1)
        close(seen[rank]["others"]["pulled together"], moved)

    def test_gradients_can_be_accumulated(self, seen):
        model = worker.make_model()
        loss_func = seed_paper_loss(worker.Triplet(), model, attack=worker.PGD)
        for step in range(2):
            loss_func(model(worker.images(12, step)), worker.LABELS).backward()
        for rank in RANKS:
            close(seen[rank]["others"]["accumulated"], [p.grad for p in model.parameters()])

    @pytest.mark.parametrize(
        ("name", "plugin"), [("scalar score", worker.AllPulled()), ("copies of rank 0", worker.RepeatsRowsOfRank0())]
    )
    def test_plugins(self, name, plugin, seen):
        spy, model = worker.Spy(), worker.make_model()
        loss = seed_paper_loss(worker.Triplet(), model, attack=worker.PGD, plugins=[plugin, spy])(
            model(worker.images(12, 0)), worker.LABELS
        )
        loss.backward()
        for rank in RANKS:
            inputs, value, gradients = seen[rank]["others"][name]
            own = [m for m, row in enumerate(spy.seen["plan"][0].tolist()) if row // 6 == rank]
            close(inputs, spy.seen["inputs"][own])
            close(value, 2 * loss.detach())
            close(gradients, [p.grad for p in model.parameters()])


@pytest.mark.slow
def test_script_of_the_docs_runs():
    out = torchrun(HERE.parent / "docs" / "examples" / "train_torchrun.py")
    found = [[float(number) for number in re.findall(r"\d+\.?\d*", line)] for line in out.splitlines()]
    assert [epoch for epoch, *_ in found] == list(range(8))  # of one rank, once each
    assert all(before < after for _, before, after, _ in found)
    assert found[-1][2] < found[0][2]
    assert [strength for *_, strength in found[3:]] == [0.94, 1, 1, 1, 1]


class TestOneProcess:
    def step(self, wrap_loss, wrap_miner, model, images, labels):
        """Loss, gradients and tuples of a step with a random start."""
        options = {"attack": worker.NOISY, "seed": 1}
        loss_func = seed_paper_loss(wrap_loss(worker.Triplet()), model, **options)
        miner = AdversarialMiner(wrap_miner(miners.BatchHardMiner()), model, **options)
        embeddings = model(images)
        mined = miner(embeddings, labels)
        model.zero_grad()
        loss = loss_func(embeddings, labels, mined)
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters()], mined

    @pytest.mark.parametrize("initialised", [False, True])
    def test_wrappers_change_nothing(self, initialised, model, images, labels, request):
        plainly = self.step(lambda loss: loss, lambda miner: miner, model, images, labels)
        if initialised:
            request.getfixturevalue("single")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped = self.step(DistributedLossWrapper, DistributedMinerWrapper, model, images, labels)
        torch.testing.assert_close(wrapped, plainly, rtol=0, atol=0)

    @pytest.mark.usefixtures("single")
    def test_memory_inside(self, model, images, labels):
        def memory():
            return losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 16)

        options = {"attack": worker.PGD}
        wrapped = seed_paper_loss(DistributedLossWrapper(memory()), model, **options)(model(images), labels)
        assert torch.equal(wrapped, seed_paper_loss(memory(), model, **options)(model(images), labels))

    @pytest.mark.usefixtures("single")
    @pytest.mark.parametrize("static_graph", [False, True])
    def test_model_in_ddp(self, static_graph, model, images, labels):
        loss = seed_paper_loss(worker.Triplet(), model, attack=worker.PGD, perturb="all")(model(images), labels)
        expected = torch.autograd.grad(loss, [*model.parameters()])
        passes = Notes()
        ddp = DistributedDataParallel(model, static_graph=static_graph)
        ddp.register_forward_hook(lambda *_: passes.append(1))
        seed_paper_loss(worker.Triplet(), ddp, attack=worker.PGD, perturb="all")(ddp(images), labels).backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], [*expected], rtol=0, atol=1e-7)
        assert len(passes) == 1  # the others go past it


class TestRefused:
    def test_order_that_pml_refuses(self, model):
        with pytest.raises(TypeError, match="must extend BaseMetricLossFunction"):
            DistributedLossWrapper(AdversarialLoss(losses.ContrastiveLoss(), model))


class TestNumbers:
    @pytest.fixture
    def ranks(self, monkeypatch):
        """Pretends to be one of several processes."""

        def pretend(rank, world_size):
            monkeypatch.setattr(distributed, "world_size", lambda: world_size)
            monkeypatch.setattr(distributed, "rank", lambda: rank)

        return pretend

    @pytest.mark.parametrize("rank", range(3))
    def test_own_first(self, rank, ranks):
        ranks(rank, 3)
        rows = [[10 * r, 10 * r + 1] for r in range(3)]
        by_pml = rows[rank] + [row for r in range(3) if r != rank for row in rows[r]]
        numbers = distributed.own_first(torch.arange(6), 2).tolist()
        assert [by_pml[number] for number in numbers] == [0, 1, 10, 11, 20, 21]

    def test_seeds(self, ranks):
        assert distributed.seed_of_rank(4) == 4
        found = []
        for rank in range(4):
            ranks(rank, 4)
            found += [distributed.seed_of_rank(seed) for seed in range(4)]
        assert len({*found}) == 16
        assert all(0 <= seed < 2**63 for seed in found)
        assert found[0] == worker.rank_0_seed(0)

    def test_nothing_is_distributed(self):
        assert (distributed.world_size(), distributed.rank()) == (1, 0)


class TestBatchOfSeveral:
    """Two queries and one reference row of each of three ranks."""

    OWNERS = (0, 0, 1, 1, 2, 2, 0, 1, 2)

    def batch(self, rank, known):
        rows = torch.zeros(9, 4)
        inputs = torch.tensor([2.0 * rank, 2 * rank + 1, 6 + rank])[:known]  # each names its row
        return JointBatch(inputs, rows, rows, None, None, 6, world_size=3, rank=rank)

    @pytest.mark.parametrize("rank", range(3))
    def test_knows_whose_rows_are_whose(self, rank):
        batch, rows = self.batch(rank, 3), torch.tensor([8, 0, 3, 3, 7, 5, 6, 1])
        assert batch.owners(rows).tolist() == [self.OWNERS[row] for row in rows]
        own = batch.own(torch.arange(len(rows)), rows)
        assert own.tolist() == [m for m, row in enumerate(rows) if self.OWNERS[row] == rank]
        assert batch.inputs_of(rows[own]).tolist() == rows[own].tolist()

    @pytest.mark.parametrize(("known", "attackable"), [(3, 9), (2, 6)])
    def test_knows_what_can_be_attacked(self, known, attackable):
        assert self.batch(1, known).num_attackable == attackable


def test_models_that_are_no_ddp_are_called_as_they_are(images):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(1, 1)

        def forward(self, x):
            return x.flatten(1)[:, :4] * self.module.weight

    model = Model()
    loss_func = seed_paper_loss(worker.Triplet(), model, attack=worker.PGD)
    loss_func(model(images), torch.arange(8) // 2).backward()
    assert model.module.weight.grad is not None
