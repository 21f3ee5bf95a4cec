"""Training loops of the shapes that public scripts have, with tiny models and random data.

Each loop takes two functions. ``wrap`` stands where a user writes ``AdversarialLoss``: that line and its import are all
that is added. ``seen`` is called after each backward pass, with the loss and the modules that are trained.
"""

import copy
from contextlib import contextmanager

import lightning
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils import distributed as pml_distributed
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

STEPS = 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZATION = MEAN, STD


def photographs(rows, precision=torch.float32):
    """Normalised, as a data set with ``Normalize`` gives them, with values that this precision tells apart."""
    pixels = 0.1 + 0.8 * torch.rand(rows, 3, 8, 8)
    images = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return images.to(precision).float()


def measurements(*shape):
    """Standardised, and not far from zero."""
    return torch.randn(*shape).clamp(-4, 4)


def convolutions(width=8):
    """Maps of an image."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
    )


def backbone(width=8):
    """Their means."""
    return nn.Sequential(*convolutions(width), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Bottleneck(nn.Module):
    """Logits, and the features before them."""

    def __init__(self, features, classes, dropout):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(features, 8), nn.BatchNorm1d(8), nn.Dropout(dropout))
        self.classifier = nn.Linear(8, classes)

    def forward(self, x):
        features = self.block(x)
        return [self.classifier(features), features]


class Identification(nn.Module):
    def __init__(self, classes, dropout):
        super().__init__()
        self.model, self.classifier = backbone(), Bottleneck(8, classes, dropout)

    def forward(self, images):
        return self.classifier(self.model(images))


def logits_and_features(wrap, seen, dropout=0.0):
    """A classifier's logits and its features, which are divided by their norm, mined, and join a sum of losses."""
    model = Identification(classes=4, dropout=dropout)
    miner, criterion = miners.MultiSimilarityMiner(), nn.CrossEntropyLoss()
    criterion_triplet = losses.TripletMarginLoss(margin=0.3)
    criterion_triplet = wrap(criterion_triplet, model, normalization=NORMALIZATION)
    groups = [{"params": model.model.parameters(), "lr": 0.01}, {"params": model.classifier.parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    scheduler, warm_up = torch.optim.lr_scheduler.StepLR(optimizer, 2), 0.1
    model.train(True)
    for _ in range(STEPS):
        images, labels = photographs(8), torch.arange(8) % 4
        optimizer.zero_grad()
        logits, features = model(images)
        norm = torch.norm(features, p=2, dim=1, keepdim=True)
        features = features.div(norm.expand_as(features))
        loss = criterion(logits, labels)
        loss += criterion_triplet(features, labels, miner(features, labels))
        del images
        warm_up = min(1.0, warm_up + 0.3)
        loss = loss * warm_up
        loss.backward()
        seen(loss, model)
        optimizer.step()
        scheduler.step()


class ThreeViews(nn.Module):
    """Three networks, two of them one, that are called together and share a classifier."""

    def __init__(self, classes):
        super().__init__()
        self.satellite, self.street = backbone(), backbone()
        self.drone, self.classifier = self.satellite, Bottleneck(8, classes, 0.0)

    def forward(self, one, two, three):
        views = (self.satellite, one), (self.street, two), (self.drone, three)
        return tuple(self.classifier(network(images)) for network, images in views)


def three_views(wrap, seen, merged=True):
    """Three inputs of one call; the features of all views are one batch, or one each. A copy follows the weights."""
    model = ThreeViews(classes=6)
    average, criterion, miner = copy.deepcopy(model), nn.CrossEntropyLoss(), miners.MultiSimilarityMiner()
    criterion_triplet = losses.TripletMarginLoss(margin=0.3)
    criterion_triplet = wrap(criterion_triplet, model, normalization=NORMALIZATION)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train(True)
    for _ in range(STEPS):
        views, labels = [photographs(6) for _ in range(3)], torch.arange(6) // (1 if merged else 2)
        optimizer.zero_grad()
        outputs = model(*views)
        logits = [output[0] for output in outputs]
        features = [f.div(torch.norm(f, p=2, dim=1, keepdim=True).expand_as(f)) for _, f in outputs]
        loss = sum(criterion(part, labels) for part in logits)
        if merged:
            batches = [(torch.cat(features, dim=0), torch.cat((labels, labels, labels), dim=0))]
        else:
            batches = [(part, labels) for part in features]
        for part, part_labels in batches:
            loss += criterion_triplet(part, part_labels, miner(part, part_labels))
        loss *= 0.5
        loss.backward()
        seen(loss, model)
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
                ours.mul_(0.9).add_(theirs, alpha=0.1)


def three_views_apart(wrap, seen):
    """As before, with a loss for each view."""
    three_views(wrap, seen, merged=False)


class Unit(nn.Module):
    def forward(self, x):
        return functional.normalize(x, p=2, dim=1)


class GeM(nn.Module):
    """Pooling with a learnt power."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x):
        return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


class Places(lightning.LightningModule):
    """A batch holds places, and each place several images."""

    def __init__(self, wrap, seen):
        super().__init__()
        self.miner = miners.MultiSimilarityMiner(epsilon=0.1, distance=distances.CosineSimilarity())
        self.loss_fn = losses.MultiSimilarityLoss(
            alpha=1.0, beta=50, base=0.0, distance=distances.DotProductSimilarity()
        )
        self.loss_fn = wrap(self.loss_fn, normalization=NORMALIZATION)
        self.backbone = convolutions()
        self.aggregator = nn.Sequential(Unit(), GeM(), nn.Linear(8, 6), Unit())
        self.seen, self.shares = seen, []

    def forward(self, images):
        return self.aggregator(self.backbone(images))

    def loss_function(self, descriptors, labels):
        mined = self.miner(descriptors, labels)
        loss = self.loss_fn(descriptors, labels, mined)
        self.shares.append(1 - len(set(mined[0].detach().cpu().numpy())) / len(descriptors))
        self.log("share", sum(self.shares) / len(self.shares))
        return loss

    def training_step(self, batch, batch_idx):
        places, labels = batch
        count, each, *image = places.shape
        descriptors = self(places.view(count * each, *image))
        loss = self.loss_function(descriptors, labels.view(-1))
        self.log("loss", loss.item())
        self.latest = loss.detach()
        return {"loss": loss}

    def on_after_backward(self):
        self.seen(self.latest, self.backbone, self.aggregator)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1])]

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * min(1.0, (self.trainer.global_step + 1) / 3)
        optimizer.step(closure=optimizer_closure)


def fit(module, *tensors, batch_size):
    fit_on(module, TensorDataset(*tensors), batch_size)


def fit_on(module, dataset, batch_size):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(dataset, batch_size=batch_size))


def places_in_lightning(wrap, seen):
    """A Lightning module that holds miner and loss, whose forward is two modules, and whose batch is made flat."""
    places = photographs(STEPS * 8).view(STEPS * 4, 2, 3, 8, 8)
    labels = torch.arange(STEPS * 4)[:, None].expand(-1, 2).contiguous()
    fit(Places(wrap, seen), places, labels, batch_size=4)


@contextmanager
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class Descriptor(nn.Module):
    """Pools with another power in eval mode."""

    def __init__(self):
        super().__init__()
        self.backbone, self.fc, self.bn = convolutions(), nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6)

    def forward(self, x):
        rows, p = x.shape[0], 3.0 if self.training else 4.0
        x = self.backbone(x)
        x = functional.avg_pool2d(x.clamp(min=1e-6).pow(p), (x.size(-2), x.size(-1))).pow(1.0 / p)
        return functional.normalize(self.bn(self.fc(x.view(rows, -1))))


def memory_among_processes(wrap, seen, precision=torch.float32):
    """Crops are one batch, embedded under autocast by DDP, and meet a memory; the gradient is scaled."""
    with one_process():
        model = DistributedDataParallel(Descriptor())
        loss_fn = losses.ContrastiveLoss(pos_margin=0.0, neg_margin=0.7)
        loss_fn = losses.CrossBatchMemory(loss_fn, embedding_size=6, memory_size=32)
        loss_fn = pml_distributed.DistributedLossWrapper(loss_fn)
        loss_fn = wrap(loss_fn, model, normalization=NORMALIZATION)
        plain = [p for p in model.parameters() if p.ndim == 1]
        others = [p for p in model.parameters() if p.ndim > 1]
        optimizer = torch.optim.SGD([{"params": plain, "weight_decay": 0.0}, {"params": others}], 0.01, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        model.train()
        for step in range(STEPS):
            crops, numbers = [photographs(4, precision) for _ in range(3)], 4 * step + torch.arange(4)
            optimizer.zero_grad()
            labels = torch.cat([torch.tile(numbers, dims=(2,)), 1000 + numbers])
            images = torch.cat(crops, dim=0)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
                embeddings = model(images)
                loss = loss_fn(embeddings, labels)
            scaler.scale(loss).backward()
            seen(loss, model)
            scaler.step(optimizer)
            scaler.update()


def memory_under_autocast(wrap, seen):
    """As before, in bfloat16."""
    memory_among_processes(wrap, seen, torch.bfloat16)


class MinedTriplets(nn.Module):
    """A criterion that mines by itself."""

    def __init__(self, distance=None):
        super().__init__()
        distance = distance or distances.LpDistance(normalize_embeddings=True, p=2, power=2)
        self.loss = losses.TripletMarginLoss(distance=distance, margin=0.2)
        self.miner = miners.TripletMarginMiner(distance=distance, type_of_triplets="all", margin=0.2)

    def forward(self, embeddings, y):
        return self.loss(embeddings, y, self.miner(embeddings, y))


class Trainer:
    """Steps after every second batch, and takes the largest column for the class."""

    def __init__(self, model, objective, optimizer, scheduler, seen):
        self.model, self.objective, self.optimizer = model.to("cpu"), objective.to("cpu"), optimizer
        self.scheduler, self.seen, self.right = scheduler, seen, 0

    def train(self, loader):
        model = self.model.train()
        for number, (x, y) in enumerate(loader):
            out = model(x)
            loss = self.objective(out, y)
            loss.backward()
            self.seen(loss, model, self.objective)
            if (number - 1) % 2 == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()
            _, predicted = out.max(1)
            self.right += predicted.eq(y).sum().item()
        self.scheduler.step()


def objective_that_mines(wrap, seen):
    """The criterion is a module of the user's own, with a miner inside; gradients add up over batches."""
    model = nn.Sequential(backbone(), nn.Linear(8, 6))
    objective = MinedTriplets()
    objective = wrap(objective, model, normalization=NORMALIZATION)
    accumulate(model, objective, seen)


def objective_with_weights(wrap, seen):
    """The criterion has weights, which are trained with those of the model; gradients add up over batches."""
    model = nn.Sequential(backbone(), nn.Linear(8, 6))
    objective = losses.ArcFaceLoss(num_classes=4, embedding_size=6, margin=28.6, scale=16)
    objective = wrap(objective, model, normalization=NORMALIZATION)
    accumulate(model, objective, seen)


def accumulate(model, objective, seen):
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    loader = DataLoader(TensorDataset(photographs(8 * STEPS), torch.arange(8 * STEPS) % 4), batch_size=8)
    Trainer(model, objective, optimizer, scheduler, seen).train(loader)


class MinedPairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.miner = miners.MultiSimilarityMiner(epsilon=0.1)
        self.loss_func = losses.MultiSimilarityLoss(2, 50, 0.5)

    def forward(self, embeddings, labels):
        hard_pairs = self.miner(embeddings, labels)
        return self.loss_func(embeddings, labels, hard_pairs)


class Retrieval(nn.Module):
    """Average and maximum of the last maps, embedded and divided by their length by hand."""

    def __init__(self):
        super().__init__()
        self.model = convolutions()
        self.model.embedding = nn.Linear(8, 6)

    def forward(self, images):
        maps = images
        for layer in self.model[:5]:
            maps = layer(maps)
        x = self.model.embedding(maps.mean((2, 3)) + maps.amax((2, 3)))
        length = torch.sqrt(torch.sum(torch.pow(x, 2), 1).add_(1e-12))
        return torch.div(x, length.view(-1, 1).expand_as(x)).view(x.size())


def frozen_statistics(wrap, seen):
    """BatchNorm stays in eval mode, all but the last layer wait for an epoch, and gradients are clipped."""
    model = nn.DataParallel(Retrieval())
    criterion = MinedPairs()
    criterion = wrap(criterion, model, normalization=NORMALIZATION)
    embedding = set(model.module.model.embedding.parameters())
    others = [parameter for parameter in model.parameters() if parameter not in embedding]
    groups = [{"params": others}, {"params": list(embedding), "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=0.001)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for epoch in range(2):
        model.train()
        for module in model.module.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for parameter in others:
            parameter.requires_grad = epoch > 0
        for _ in range(3):
            x, y = photographs(8)[:, None], (torch.arange(8) % 4)[:, None]
            embedded = model(x.squeeze())
            loss = criterion(embedded, y.squeeze())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_value_(model.parameters(), 10)
            seen(loss, model)
            optimizer.step()
        scheduler.step()


class OfSets(nn.Module):
    """Adds up what it computes of each member of a set. It gives also what it computed."""

    def __init__(self):
        super().__init__()
        self.cells = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU())
        self.project = nn.Sequential(nn.Linear(16, 8), nn.LeakyReLU(), nn.Linear(8, 6), nn.LeakyReLU())

    def forward(self, x):
        activations = self.cells(x)
        features = torch.sum(activations, 1, keepdim=True).view(x.shape[0], -1)
        return self.project(features), activations


def sets_of_cells(wrap, seen):
    """Each row is a set of measured cells, of another size in each batch; the second output goes unused."""
    model = OfSets()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    loss_func = losses.SupConLoss(distance=distances.CosineSimilarity(), temperature=0.1)
    loss_func = wrap(loss_func, model, bounds=(-5, 5))
    model.train()
    for cells in range(5, 5 + STEPS):
        points, labels = measurements(12, cells, 6), torch.arange(12) % 4
        features, _ = model(points)
        loss = loss_func(features, labels)
        loss.backward()
        seen(loss, model)
        optimizer.step()
        optimizer.zero_grad()


class Night(nn.Module):
    """Embeds each part of a recording; what it knows of a part depends on its neighbours."""

    def __init__(self, classes):
        super().__init__()
        self.of_part, self.of_night = (
            nn.LSTM(6, 4, batch_first=True),
            nn.LSTM(4, 4, batch_first=True, bidirectional=True),
        )
        self.norm, self.classifier = nn.LayerNorm(8), nn.Linear(8, classes)

    def encode(self, x):
        nights, parts, times, frequencies = x.size()
        x, _ = self.of_part(x.reshape(nights * parts, times, frequencies))
        x, _ = self.of_night(x.mean(1).reshape(nights, parts, -1))
        x = self.norm(nn.ReLU()(x))
        return x, self.classifier(x)

    def forward(self, x):
        return self.encode(x)


class Combined(nn.Module):
    """Cross-entropy, and triplets that are weighted by class."""

    def __init__(self, wrap):
        super().__init__()
        self.miner, self.ce_loss = miners.MultiSimilarityMiner(), nn.CrossEntropyLoss()
        self.contr_loss = losses.TripletMarginLoss(
            distance=distances.CosineSimilarity(),
            reducer=reducers.ClassWeightedReducer(weights=torch.tensor([1.0, 0.5, 1.0])),
            embedding_regularizer=regularizers.LpRegularizer(),
        )
        self.contr_loss = wrap(self.contr_loss, bounds=(-5, 5))

    def forward(self, embeddings, predictions, targets):
        loss = self.ce_loss(predictions, targets)
        hard_pairs = self.miner(embeddings, targets)
        return loss + self.contr_loss(embeddings, targets, hard_pairs)


class Sleep(lightning.LightningModule):
    def __init__(self, wrap, seen):
        super().__init__()
        self.nn, self.loss, self.seen = Night(classes=3), Combined(wrap), seen

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        embeddings, outputs = self.nn(inputs)
        nights, parts, classes = outputs.size()
        embeddings, outputs = embeddings.reshape(nights * parts, -1), outputs.reshape(-1, classes)
        loss = self.loss(embeddings, outputs, targets.reshape(-1))
        self.log("train_loss", loss)
        self.latest = loss.detach()
        return loss

    def on_after_backward(self):
        self.seen(self.latest, self.nn)

    def configure_optimizers(self):
        return torch.optim.Adam(self.nn.parameters(), lr=1e-3, weight_decay=1e-3)


def parts_of_a_recording(wrap, seen):
    """Each row of the input has several embeddings, one for each part, and the loss takes them all as a batch."""
    targets = torch.tensor([0, 0, 1, 1, 2, 2]).repeat(2 * STEPS, 1)[:, torch.randperm(6)]
    fit(Sleep(wrap, seen), measurements(2 * STEPS, 6, 5, 6), targets, batch_size=2)


class Tabular(lightning.LightningModule):
    """Two corrupted views of each row, through layers that learn their width from the first batch."""

    def __init__(self, wrap, seen):
        super().__init__()
        self.encoder = nn.Sequential(nn.LazyLinear(16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.projector = nn.Sequential(nn.LazyLinear(8), nn.ReLU())
        self.loss_fn = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=1.0))
        self.loss_fn = wrap(self.loss_fn, bounds=(-5, 5))
        self.seen = seen

    def corrupt(self, x):
        mask, noise = torch.rand_like(x) >= 0.6, torch.rand_like(x) * 2 - 1
        return torch.where(mask, noise, x), torch.where(~mask, noise, x)

    def training_step(self, batch, batch_idx):
        one, two = self.corrupt(batch[0])
        one, two = self.projector(self.encoder(one)), self.projector(self.encoder(two))
        loss = self.loss_fn(one, two)
        self.log("train_loss", loss)
        self.latest = loss.detach()
        return loss

    def on_after_backward(self):
        self.seen(self.latest, self.encoder, self.projector)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def corrupted_rows(wrap, seen):
    """Two views without labels, in Lightning; each is embedded by two modules, one after the other."""
    fit(Tabular(wrap, seen), measurements(8 * STEPS, 10), batch_size=8)


class Rings(nn.Module):
    """Several pictures of an object, through a recurrent and an attentive layer."""

    def __init__(self):
        super().__init__()
        self.cnn, self.lstm = backbone(width=4), nn.LSTM(4, 4, batch_first=True, bidirectional=True)
        self.attention, self.mlp = nn.MultiheadAttention(8, 2, dropout=0.0), nn.Linear(8, 6)

    def forward(self, x):
        objects, rings, views, *image = x.size()
        x = self.cnn(x.reshape(-1, *image)).reshape(objects * rings, views, 4)
        x = self.lstm(x)[0].mean(1).reshape(objects, rings, 8).transpose(0, 1)
        return self.mlp(self.attention(x, x, x)[0].mean(0))


class PerModality(reducers.BaseReducer):
    """The mean over either half of a batch."""

    def __init__(self, rows):
        super().__init__()
        self.half = rows // 2

    def pos_pair_reduction(self, found, indices, *args):
        anchors, _ = indices
        return (torch.mean(found[anchors < self.half]) + torch.mean(found[anchors >= self.half])) / 2


def sketches_and_objects(wrap, seen):
    """Two networks with inputs of different form; from the third step on, memories that take one half of the batch."""
    objects, sketches = Rings(), nn.Sequential(backbone(), nn.Linear(8, 6))
    contra_loss = losses.NTXentLoss()
    cbm_sketch = losses.CrossBatchMemory(contra_loss, 6, 32)
    cbm_object = losses.CrossBatchMemory(contra_loss, 6, 32)
    cbm_object = wrap(cbm_object, [objects, sketches], normalization=NORMALIZATION)
    cbm_sketch = wrap(cbm_sketch, [objects, sketches], normalization=NORMALIZATION)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3, weight_decay=1e-4) for m in (objects, sketches)]
    for step in range(STEPS + 1):
        batch = {"objects": photographs(4 * 2 * 4).view(4, 2, 4, 3, 8, 8), "sketches": photographs(4)}
        embeddings = torch.cat([objects(batch["objects"]), sketches(batch["sketches"])])
        rows = len(embeddings)
        labels = torch.cat([torch.arange(rows // 2), torch.arange(rows // 2)])
        if step > 0:
            mask = torch.zeros(rows, dtype=torch.bool)
            mask[torch.arange(rows // 2, rows)] = True
            loss = (
                cbm_object(embeddings, labels, enqueue_mask=mask) + cbm_sketch(embeddings, labels, enqueue_mask=mask)
            ) / 2
        else:
            loss = losses.NTXentLoss(reducer=PerModality(rows))(embeddings, labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        if step > 0:
            seen(loss, objects, sketches)
        for optimizer in optimizers:
            optimizer.step()


def hard_triplets(embeddings, positive, negative):
    """The farthest positive and the nearest negative of each row, which masks tell."""
    apart = torch.cdist(embeddings, embeddings)
    hardest = apart.masked_fill(~positive, -1.0).argmax(1), apart.masked_fill(~negative, 1e9).argmin(1)
    return torch.arange(len(embeddings)), *hardest


class HardTriplets:
    """No module: a class that calls a loss with triplets of its own, and labels that say nothing."""

    def __init__(self, wrap, model=None, **options):
        distance = distances.LpDistance(normalize_embeddings=False, collect_stats=True)
        reducer = reducers.AvgNonZeroReducer(collect_stats=True)
        self.loss_fn = losses.TripletMarginLoss(
            margin=2.0, swap=True, distance=distance, reducer=reducer, collect_stats=True
        )
        self.loss_fn = wrap(self.loss_fn, model, **options)

    def __call__(self, embeddings, positive, negative, **inputs):
        with torch.no_grad():
            mined = hard_triplets(embeddings.detach(), positive, negative)
        loss = self.loss_fn(embeddings, torch.arange(len(embeddings)), mined, **inputs)
        stats = {"norm": self.loss_fn.distance.final_avg_query_norm, "active": self.loss_fn.reducer.num_past_filter}
        return loss, stats


class Global(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.pooling = convolutions(), GeM()

    def forward(self, batch):
        return {"global": self.pooling(self.backbone(batch["images"]))}


def masks(rows):
    labels = torch.arange(rows) // 2
    same = labels[:, None] == labels
    return same & ~torch.eye(rows, dtype=torch.bool), ~same


def dicts_and_masks(wrap, seen):
    """The model takes a dict and gives one; masks stand in for labels."""
    model = Global()
    loss_fn = HardTriplets(wrap, model, normalization=NORMALIZATION)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        batch, (positive, negative) = {"images": photographs(8)}, masks(8)
        model.train()
        optimizer.zero_grad()
        with torch.set_grad_enabled(True):
            embeddings = model(batch)["global"]
            loss, stats = loss_fn(embeddings, positive, negative)
            assert stats["norm"] > 0
            loss.backward()
            seen(loss, model)
            optimizer.step()


class Patches(nn.Module):
    """The mean over patches, projected, of unit length."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm, self.fc = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, images):
        tokens = self.norm(self.patches(images).flatten(2).transpose(1, 2))
        return functional.normalize(self.fc(functional.gelu(tokens).mean(1)), dim=1)


def half_without_labels(wrap, seen, precision=torch.float32):
    """Rows with and without labels are embedded at once; the loss takes the former, a penalty the latter."""
    model, miner = Patches(), miners.MultiSimilarityMiner()
    criterion = losses.MultiSimilarityLoss(alpha=2.0, beta=50.0, base=0.5)
    criterion = wrap(criterion, model, normalization=NORMALIZATION)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(STEPS):
        images, others, labels = photographs(8), photographs(5), torch.arange(8) % 4
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            embeddings = model(torch.cat([images, others]))
            unlabelled, embeddings = embeddings[8:], embeddings[:8]
            loss = criterion(embeddings, labels, miner(embeddings, labels))
            loss = loss + 0.1 * (unlabelled @ unlabelled.T).exp().mean()
        optimizer.zero_grad()
        loss.backward()
        seen(loss, model)
        optimizer.step()


class InParts(nn.Module):
    """Embeds images as the loop does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return torch.cat([self.model({"images": part})["global"] for part in images.split(4)])


def gradient_in_stages(wrap, seen, cure=False):
    """The gradient of the embeddings first, then, part by part, that of the model.

    The cure: embeddings are made in the same parts, inputs are handed over, and gradients are set to zero before the
    loss, whose backward pass reaches the model by the copies.
    """
    model = Global()
    loss_fn = HardTriplets(wrap, InParts(model) if cure else model, normalization=NORMALIZATION)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(STEPS):
        parts, (positive, negative) = [{"images": photographs(4)} for _ in range(2)], masks(8)
        inputs = {"inputs": torch.cat([part["images"] for part in parts])} if cure else {}
        with torch.set_grad_enabled(False):
            embeddings = torch.cat([model(part)["global"] for part in parts])
        if cure:
            optimizer.zero_grad()
        with torch.set_grad_enabled(True):
            embeddings.requires_grad_(True)
            loss, _ = loss_fn(embeddings, positive, negative, **inputs)
            loss.backward()
        if not cure:
            optimizer.zero_grad()
        if embeddings.grad is not None:  # it is, where perturbed copies take the place of all rows
            for number, part in enumerate(parts):
                model(part)["global"].backward(gradient=embeddings.grad[4 * number : 4 * number + 4])
        seen(loss, model)
        optimizer.step()


class Volumes(lightning.LightningModule):
    """Asks which loss it was given, and goes two ways."""

    def __init__(self, encoder, loss_function, seen, cure):
        super().__init__()
        self.model, self.loss_function, self.seen, self.cure = encoder, loss_function, seen, cure

    def forward(self, x):
        return self.model(x)[1]

    def training_step(self, batch, batch_idx):
        anchors, positives = self(batch["anchor"]), self(batch["positive"])
        asked = getattr(self.loss_function, "loss", self.loss_function) if self.cure else self.loss_function
        if isinstance(asked, losses.NTXentLoss):
            indices = torch.arange(len(anchors))
            loss = self.loss_function(torch.cat((anchors, positives)), torch.cat((indices, indices)))
        else:
            loss = self.loss_function(anchors, positives, self(batch["negative"]))
        self.log("loss", loss)
        self.latest = loss.detach()
        return loss

    def on_after_backward(self):
        self.seen(self.latest, self.model)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Stack(nn.Module):
    """Features and projections of a stack of slices."""

    def __init__(self):
        super().__init__()
        self.stem, self.project = nn.Conv3d(2, 4, (5, 4, 4), stride=(5, 4, 4)), nn.Linear(4, 6)

    def forward(self, x):
        features = functional.relu(self.stem(x)).mean((2, 3, 4))
        return features, self.project(features)


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 4 * STEPS

    def __getitem__(self, number):
        anchor = measurements(2, 5, 8, 8)
        return {"anchor": anchor, "positive": (anchor + 0.1 * measurements(2, 5, 8, 8)).clamp(-4, 4)}


def class_of_the_loss(wrap, seen, cure=False):
    """Takes one way for one class of losses, and another for all others. The cure: it asks the wrapped loss."""
    encoder, loss_function = Stack(), losses.NTXentLoss(temperature=0.5)
    loss_function = wrap(loss_function, encoder, bounds=(-5, 5))
    fit_on(Volumes(encoder, loss_function, seen, cure), Pairs(), batch_size=4)


LOOPS = (
    logits_and_features,
    places_in_lightning,
    memory_among_processes,
    memory_under_autocast,
    three_views,
    three_views_apart,
    objective_that_mines,
    objective_with_weights,
    frozen_statistics,
    sets_of_cells,
    parts_of_a_recording,
    corrupted_rows,
    sketches_and_objects,
    dicts_and_masks,
    half_without_labels,
)
"""All that run with the line and the import alone."""

WITHOUT_MODEL = (places_in_lightning, parts_of_a_recording, corrupted_rows)
"""Of these, those whose line has no model at hand."""
