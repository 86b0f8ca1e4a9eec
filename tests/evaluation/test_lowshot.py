import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from backfold.data.statistics import ChannelStatistics
from backfold.errors import UserError
from backfold.evaluation import lowshot, render_table
from backfold.evaluation.finetuning import FineTuning
from backfold.evaluation.lowshot import (
    LOWSHOT_LABELS,
    Contender,
    LabelledTensors,
    few_labels_probe_accuracy,
    fine_tuned_rows,
    linear_rows,
    lowshot_rows,
)
from backfold.evaluation.probes import linear_probe_accuracy
from backfold.evaluation.protocol import (
    accuracy_row,
    draw_labelled,
    draw_share,
    label_text,
    labelled_subsets,
    read_rows,
    write_rows,
)
from backfold.reporting.tables import evaluation_table
from backfold.reporting.verdicts import compare

CPU = torch.device("cpu")
STATISTICS = ChannelStatistics((0.5,), (0.25,))
SETTINGS = FineTuning(
    epochs=0, min_steps=3, batch_size=8, base_lr=0.05, mixup=0.0, cutmix=0.0
).from_scratch()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)

    def forward(self, images):
        return self.convolution(images).relu()


def make(_drop_path):
    return Small()


def shaded(count, seed):
    """Bytes of three shades, one a class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = 40 + 80 * labels[:, None, None, None] + rng.integers(0, 40, size=(count, 1, 6, 6))
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)


DATA = LabelledTensors(*shaded(60, 0), *shaded(30, 1), STATISTICS)
EMBEDDINGS = [images.float().mean(dim=(2, 3)) for images in (DATA.train_images, DATA.test_images)]


def recorded(monkeypatch, values=None):
    """Replace fine-tuning by a note of what was asked; the accuracy is the next of ``values``."""
    calls, values = [], iter(values or [])

    def fine_tune(make_backbone, images, labels, statistics, settings, device):
        assert (statistics, device) == (STATISTICS, CPU)
        calls.append((make_backbone, images, labels, settings))

    monkeypatch.setattr(lowshot, "fine_tune", fine_tune)
    monkeypatch.setattr(lowshot, "accuracy", lambda *_: next(values, 0.5))
    return calls


@pytest.mark.parametrize(
    ("share", "expected"), [(0.01, [1, 2, 5]), (0.1, [2, 20, 50]), (0.5, [8, 98, 249])]
)
def test_shares_are_stratified_to_the_image(share, expected):
    counts = {4: 15, 0: 195, 7: 498}  # 1 % is 0.15, 1.95 and 4.98; 10 % is 1.5 and so on
    labels = torch.cat([torch.full((count,), name) for name, count in counts.items()])
    labels = labels[torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))]
    drawn = draw_share(labels, share, seed=0, draw=2)
    assert len(drawn.unique()) == len(drawn)
    assert [int((labels[drawn] == name).sum()) for name in counts] == expected
    assert torch.equal(drawn, draw_share(labels, share, seed=0, draw=2))
    for seed, draw in ((0, 1), (1, 2)):
        assert set(drawn.tolist()) != set(draw_share(labels, share, seed, draw).tolist())


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_shares_outside_their_range_are_refused(share):
    with pytest.raises(UserError, match="the share of labels is"):
        draw_share(DATA.train_labels, share, 0, 0)


def test_subsets_are_the_draws():
    labels = DATA.train_labels
    assert [len(subset) for subset in labelled_subsets(labels, None, 4, 0)] == [60]
    for drawn, one in zip(labelled_subsets(labels, 4, 3, 7), range(3), strict=True):
        assert torch.equal(drawn, draw_labelled(labels, 4, 7, one))
    for drawn, one in zip(labelled_subsets(labels, 0.2, 3, 7), range(3), strict=True):
        assert torch.equal(drawn, draw_share(labels, 0.2, 7, one))
    with pytest.raises(UserError, match="draws is 0"):
        labelled_subsets(labels, 4, 0, 0)


def test_label_texts():
    assert [label_text(count) for count in (None, *LOWSHOT_LABELS)] == [
        "all", 1, 5, 10, 25, "1 %", "10 %",
    ]  # fmt: skip


def test_one_label_a_class_is_logistic_regression_with_a_fixed_penalty():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(4, 6)), rng.normal(size=(200, 6))
    labels, test_labels = np.array([5, 1, 8, 2]), rng.choice([5, 1, 8, 2], 200)
    scaled = [(part - train.mean(0)) / train.std(0) for part in (train, test)]
    model = LogisticRegression(C=1.0, max_iter=1000).fit(scaled[0], labels)
    arguments = [torch.from_numpy(part) for part in (train, labels, test, test_labels)]
    expected = float(model.score(scaled[1], test_labels))
    assert few_labels_probe_accuracy(*arguments) == pytest.approx(expected, abs=0.01)
    with pytest.raises(UserError, match="two classes"):
        few_labels_probe_accuracy(arguments[0], torch.zeros(4), *arguments[2:])
    arguments[2][3, 1] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        few_labels_probe_accuracy(*arguments)


def test_linear_rows_are_the_probe_on_the_draws():
    rows = linear_rows(
        EMBEDDINGS[0], DATA.train_labels, EMBEDDINGS[1], DATA.test_labels, "untrained", (1, 5, 0.2),
        draws=3, seed=2,
    )  # fmt: skip
    assert [(row.protocol, row.labels, row.backbone) for row in rows] == [
        ("linear", 1, "untrained"),
        ("linear", 5, "untrained"),
        ("linear", "20 %", "untrained"),
    ]
    draws = [draw_labelled(DATA.train_labels, 5, 2, draw) for draw in range(3)]
    accuracies = [
        linear_probe_accuracy(
            EMBEDDINGS[0][i], DATA.train_labels[i], EMBEDDINGS[1], DATA.test_labels, seed=2
        )
        for i in draws
    ]
    assert rows[1] == accuracy_row("linear", 5, "untrained", accuracies)


def test_every_contender_is_tuned_on_the_same_draws_and_grid(monkeypatch):
    calls, chosen = recorded(monkeypatch), []

    def choose(make_backbone, images, labels, statistics, settings, device, factors):
        assert (make_backbone, statistics, device) == (contender.make_backbone, STATISTICS, CPU)
        chosen.append((images, labels, factors))
        return settings

    monkeypatch.setattr(lowshot, "choose_learning_rate", choose)
    for name in ("untrained", "pretrained"):
        contender = Contender(name, lambda _, name=name: name, SETTINGS)
        fine_tuned_rows(contender, DATA, CPU, (2, 0.25), draws=3, seed=4, factors=(0.5, 2.0))
    assert len(calls) == 12
    for first, second in zip(calls[:6], calls[6:], strict=True):
        assert torch.equal(first[1], second[1])
        assert torch.equal(first[2], second[2])
        assert first[3] == second[3]
    assert [call[3].seed for call in calls[:6]] == [0, 1, 2, 0, 1, 2]
    expected = draw_share(DATA.train_labels, 0.25, 4, 1)
    assert torch.equal(calls[4][1], DATA.train_images[expected])
    assert torch.equal(calls[4][2], DATA.train_labels[expected])
    assert {call[0](0.0) for call in calls[6:]} == {"pretrained"}
    # Once for each number of labels, on the first draw's own labels.
    for (images, labels, factors), call in zip(chosen[:2], calls[:6:3], strict=True):
        assert torch.equal(images, call[1])
        assert torch.equal(labels, call[2])
        assert factors == (0.5, 2.0)


def test_rows_are_mean_and_deviation_of_the_draws(monkeypatch):
    recorded(monkeypatch, [0.2, 0.4, 0.9, 0.7])
    contender = Contender("pretrained", make, SETTINGS)
    few, every = fine_tuned_rows(contender, DATA, CPU, (2, None), draws=3, factors=(1.0,))
    assert (few.protocol, few.labels, few.backbone) == ("finetune", 2, "pretrained")
    assert few.accuracy_mean == pytest.approx(50.0)
    assert few.accuracy_std == pytest.approx(100 * np.std([0.2, 0.4, 0.9], ddof=1))
    assert (every.labels, every.accuracy_mean, every.accuracy_std) == ("all", 70.0, 0.0)


def test_all_rows_of_a_contender_and_what_is_made_of_them(tmp_path):
    rows = []
    for name in ("untrained", "pretrained"):
        contender = Contender(name, make, SETTINGS)
        rows += lowshot_rows(
            contender, DATA, *EMBEDDINGS, CPU, labels_per_class=(1, 0.1), draws=2, factors=(1.0,)
        )
    assert [(row.protocol, row.labels) for row in rows[:4]] == [
        ("linear", 1), ("linear", "10 %"), ("finetune", 1), ("finetune", "10 %"),
    ]  # fmt: skip
    assert rows[:4] == [type(row)(**{**row.to_dict(), "backbone": "untrained"}) for row in rows[4:]]
    assert rows[0].accuracy_mean == rows[1].accuracy_mean == 100.0
    write_rows(tmp_path / "evaluation.json", rows)
    assert read_rows(tmp_path / "evaluation.json") == rows
    assert [comparison.difference for comparison in compare(rows)] == [0.0] * 4
    assert [row[1] for row in evaluation_table(rows).rows] == ["1", "10 %", "1", "10 %"]
    assert list(render_table(rows).columns[1].cells) == ["1", "10 %", "1", "10 %"]


def test_more_labels_than_images_are_refused():
    with pytest.raises(UserError, match="has 20 training images, fewer than the 25"):
        fine_tuned_rows(Contender("untrained", make, SETTINGS), DATA, CPU, (25,))
