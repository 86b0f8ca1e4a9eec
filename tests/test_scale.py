"""The calculation in docs/scale.md, by hand, and the page as the script writes it."""

import pytest

import scale

DENSE = 215.0e9
PARAMETERS = 85_799_424  # 85,798,656 of ViT-B/16 without classifier, 768 of the head


@pytest.fixture(scope="module")
def counted():
    return {"dense": scale.count(sparse=False), "sparse": scale.count(sparse=True)}


def forward_operations(tokens, patches):
    """Of a ViT-B/16 on so many tokens, class token included, written out."""
    layer = (
        2 * tokens * 768 * (3 * 768)  # queries, keys, values
        + 2 * tokens * tokens * 768 * 2  # scores, and their mean of the values
        + 2 * tokens * 768 * 768
        + 2 * tokens * 768 * 3072 * 2
    )
    return 12 * layer + 2 * patches * (3 * 16 * 16) * 768


def test_counted_operations_are_those_of_a_vit_b(counted):
    embedding = 2 * 196 * 768 * 768
    # The images of an ordinary step need no gradient.
    ordinary = 3 * forward_operations(197, 196) - embedding
    assert scale.count_ordinary() == pytest.approx(ordinary, rel=1e-9)
    dense, sparse = counted["dense"], counted["sparse"]
    assert dense.parameters == sparse.parameters == PARAMETERS
    attention = 12 * 2 * 197 * 197 * 768 * 2
    products = forward_operations(197, 196) - attention
    # Six times each product with weights, and eight to nine times those of activations.
    assert 6 * products + 8 * attention < dense.operations < 6 * products + 9.5 * attention
    # The patches are embedded all, then half of the tokens run.
    assert sparse.operations > 6 * forward_operations(99, 196) - 2 * embedding
    assert sparse.operations < 6.5 * forward_operations(99, 196)
    assert 0.4 < sparse.peak_bytes / dense.peak_bytes < 0.55
    kept = 4 * 12 * (12 * 197 * 197 + 197 * (3 * 768 + 768 + 2 * 3072))  # scores, activations
    assert kept < dense.peak_bytes < 6 * kept


def test_time_and_memory():
    one = scale.Estimate(1, DENSE, PARAMETERS, 0.2)
    # 4096 x 215 GFLOP = 880.6 TFLOP, at 197.88 TFLOP/s; no network
    assert one.images_per_second == pytest.approx(4096 / 4.4504, rel=1e-4)
    # 312 steps an epoch, 31,200 in all: 138,852 s
    assert one.hours(1_281_167, 100) == pytest.approx(38.570, rel=1e-4)
    many = scale.Estimate(64, DENSE, PARAMETERS, 0.1)
    # 2 x 63 / 64 x 343.2 MB
    assert many.network_bytes == pytest.approx(675.67e6, rel=1e-4)
    assert many.network_seconds == pytest.approx(675.67e6 / 400e9, rel=1e-4)
    assert many.compute_seconds == pytest.approx(0.139075, rel=1e-4)
    assert many.images_per_second == pytest.approx(4096 / (0.139075 + 0.001689), rel=1e-4)
    assert scale.fixed_bytes(8, 1_000_000_000) == (16e9, 9e9)
    # (0.9 x 80 - 16 x 0.25) / 0.5 = 136
    counted = scale.Counted(operations=1.0, peak_bytes=0.5e9, parameters=250_000_000)
    assert scale.images_at_once(counted) == 136


def test_the_page_is_as_the_script_writes_it(counted, monkeypatch):
    monkeypatch.setattr(scale, "count", lambda sparse: counted["sparse" if sparse else "dense"])
    text = scale.PAGE.read_text()
    emptied = text.replace("| 1 H100, dense |", "| none |")
    assert emptied != text
    assert scale.page(emptied) == text, "run `python scripts/scale.py`"
