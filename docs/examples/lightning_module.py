"""Adversarial metric learning as a LightningModule.

python lightning_module.py

Handwritten digits: the model is trained on 0-4. It never sees 5-9 in training; their loss is logged as the validation
loss, and they are the test at the end. The script writes metrics and the checkpoint to lightning_run/. It needs
`pip install "pml-adversarial[cli]" lightning`.
"""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pml_adversarial import AdversarialLoss, evaluate_robustness
from pml_adversarial.cli.images import digits

FOLDER = "lightning_run"
EPOCHS, BATCH_SIZE = 15, 112


class MetricLearner(lightning.LightningModule):
    """A small convolutional embedding.

    Args:
        eps: of the training attack, in pixels of [0, 1].
        warmup: steps over which it grows.
    """

    def __init__(self, eps=0.2, warmup=0):
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 64),
        )
        loss_func = MultiSimilarityLoss(alpha=2, beta=40, base=0.5)
        self.loss_func = AdversarialLoss(loss_func, self.model, eps=eps, warmup=warmup)

    def forward(self, images):
        """Pixels in [0, 1] -> embeddings."""
        return self.model(images)

    def training_step(self, batch, batch_idx):
        """The attack runs inside the loss. The records of the step are logged."""
        images, labels = batch
        loss = self.loss_func(self.model(images), labels)
        self.log_dict({f"train/{name}": value for name, value in self.loss_func.records.items()})
        return loss

    def validation_step(self, batch, batch_idx):
        """The loss without an attack, because Lightning has put it into eval mode."""
        images, labels = batch
        self.log("val/loss", self.loss_func(self.model(images), labels))

    def configure_optimizers(self):
        """Adam for the parameters of the model, and of the loss if it has any."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def train(data):
    lightning.seed_everything(0)
    train_set = TensorDataset(data.train_images, data.train_labels)
    val_set = TensorDataset(data.test_images, data.test_labels)
    train_loader = DataLoader(train_set, BATCH_SIZE, shuffle=True, drop_last=True)
    val_loader = DataLoader(val_set, BATCH_SIZE)
    module = MetricLearner(warmup=EPOCHS * len(train_loader) // 2)
    checkpoint = ModelCheckpoint()  # keeps the last epoch: the one with the lowest val/loss may lie in the warmup
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="auto",
        devices=1,
        logger=CSVLogger(".", name=FOLDER),
        log_every_n_steps=1,
        callbacks=[checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train_loader, val_loader)
    print(f"metrics: {trainer.logger.log_dir}/metrics.csv")
    print(f"checkpoint: {checkpoint.best_model_path}")
    for name, value in sorted(trainer.callback_metrics.items()):
        print(f"  {name}: {value:.3f}")
    return checkpoint.best_model_path


def main():
    data = digits()
    module = MetricLearner.load_from_checkpoint(train(data), map_location="cpu")
    report = evaluate_robustness(
        module.model, (data.test_images, data.test_labels), eps=0.1, attacks="quick", checks=False, batch_size=512
    )
    clean, attacked = report.clean["recall_at_1"], report.worst_case(0.1)
    print(f"unseen classes: R@1 {clean:.1%}, at most {attacked:.1%} under attack at eps 0.1")


if __name__ == "__main__":
    main()
