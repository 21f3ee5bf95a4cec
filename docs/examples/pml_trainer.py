"""PML's trainer and logging with an adversarial loss; the best model is selected by its robustness.

python pml_trainer.py

Handwritten digits: 0-4 are for training, 5 and 6 select the model, 7-9 test it. Everything is written to
pml_trainer_run/, which must not exist yet. It needs `pip install "pml-adversarial[cli,records]" faiss-cpu`.
"""

from pathlib import Path

import torch
from pytorch_metric_learning import losses, samplers, testers, trainers
from pytorch_metric_learning.utils import logging_presets
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn
from torch.utils.data import TensorDataset

from pml_adversarial import AdversarialLoss, AdversarialTester, evaluate_robustness
from pml_adversarial.cli.images import digits

FOLDER = "pml_trainer_run"
EPOCHS, ITERATIONS, BATCH_SIZE = 10, 10, 100
EPS = 0.1  # in validation and test, in pixels of [0, 1]; training uses twice as much
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_models():
    convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU()
    return {
        "trunk": nn.Sequential(*convolutions, nn.Flatten()).to(DEVICE),
        "embedder": nn.Linear(512, 64).to(DEVICE),
    }


def train(dataset, val):
    torch.manual_seed(0)
    models = make_models()
    loss_func = AdversarialLoss(
        losses.MultiSimilarityLoss(alpha=2, beta=40, base=0.5),
        models,
        eps=2 * EPS,
        warmup=EPOCHS * ITERATIONS // 2,
    )
    keeper, records, tensorboard = logging_presets.get_record_keeper(f"{FOLDER}/records", f"{FOLDER}/tensorboard")
    hooks = logging_presets.get_hook_container(keeper, primary_metric="worst_case_recall_at_1", log_freq=1)
    tester = testers.GlobalEmbeddingSpaceTester(
        end_of_testing_hook=hooks.end_of_testing_hook,
        data_device=DEVICE,
        dataloader_num_workers=0,
        accuracy_calculator=AccuracyCalculator(include=("precision_at_1",), k="max_bin_count"),
    )
    tester = AdversarialTester(tester, eps=EPS, max_queries=100)  # adds worst_case_recall_at_1 and others
    trainers.MetricLossOnly(
        models,
        {f"{name}_optimizer": torch.optim.Adam(model.parameters(), lr=1e-3) for name, model in models.items()},
        BATCH_SIZE,
        {"metric_loss": loss_func},
        dataset,
        sampler=samplers.MPerClassSampler(dataset.tensors[1], m=20, batch_size=BATCH_SIZE),
        iterations_per_epoch=ITERATIONS,
        data_device=DEVICE,
        dataloader_num_workers=0,
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=hooks.end_of_epoch_hook(tester, {"val": val}, f"{FOLDER}/models"),
    ).train(num_epochs=EPOCHS)
    tensorboard.close()
    best_epoch, best = hooks.get_best_epoch_and_accuracy(tester, "val")
    print(f"best epoch: {best_epoch}, worst-case R@1 {best:.1%} on the validation classes at eps {EPS}")
    return best_epoch, records.query("SELECT * FROM metric_loss_AdversarialLoss", return_dict=True)


def main():
    Path(FOLDER).mkdir()  # PML would append to the records of an earlier run
    data = digits()
    for_val = data.test_labels < 7
    val = TensorDataset(data.test_images[for_val], data.test_labels[for_val])
    test = TensorDataset(data.test_images[~for_val], data.test_labels[~for_val])

    best_epoch, recorded = train(TensorDataset(data.train_images, data.train_labels), val)
    strength, before, after = (recorded[name] for name in ("strength", "loss_before", "loss_after"))
    print(f"records of the loss in each of {len(strength)} iterations, among them:")
    for i in range(0, len(strength), 2 * ITERATIONS):
        print(f"  iteration {i}: strength {strength[i]:.2f}, loss {before[i]:.3f}, under attack {after[i]:.3f}")
    print(f"read them: tensorboard --logdir {FOLDER}/tensorboard, or {FOLDER}/records (CSV, SQLite)")

    models = make_models()
    for name, model in models.items():
        file = f"{FOLDER}/models/{name}_best{best_epoch}.pth"
        model.load_state_dict(torch.load(file, map_location=DEVICE, weights_only=True))
    report = evaluate_robustness(nn.Sequential(*models.values()), test, eps=EPS, attacks="quick", checks=False)
    clean, attacked = report.clean["recall_at_1"], report.worst_case(EPS)
    print(f"test classes: R@1 {clean:.1%}, at most {attacked:.1%} under attack")


if __name__ == "__main__":
    main()
