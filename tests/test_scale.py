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


def test_an_image_s_memory_holds_at_least_what_the_backward_pass_must_keep(counted):
    scores = 12 * 12 * 197 * 197 * 4
    activations = 12 * 197 * 4 * (3 * 768 + 768 + 2 * 3072)
    peak = counted["dense"].peak_bytes
    assert scores + activations < peak < 6 * (scores + activations)


def test_time_of_one_gpu():
    one = scale.Estimate(1, DENSE, PARAMETERS, 0.2)
    # 4096 x 215 GFLOP = 880.6 TFLOP, at 197.88 TFLOP/s
    assert one.compute_seconds == pytest.approx(4.4504, rel=1e-4)
    assert one.network_bytes == one.network_seconds == 0
    assert one.images_per_second == pytest.approx(920.37, rel=1e-4)
    # 312 steps an epoch, 31,200 in all: 138,852 s
    assert one.hours(1_281_167, 100) == pytest.approx(38.570, rel=1e-4)
    assert one.hours(100_000_000, 1) == pytest.approx(24_414 * 4.4504 / 3600, rel=1e-4)


def test_time_of_eight_machines():
    many = scale.Estimate(64, DENSE, PARAMETERS, 0.1)
    # 2 x 63 / 64 x 343.2 MB
    assert many.network_bytes == pytest.approx(675.67e6, rel=1e-4)
    assert many.network_seconds == pytest.approx(675.67e6 / 400e9, rel=1e-4)
    assert many.compute_seconds == pytest.approx(0.139075, rel=1e-4)
    assert many.images_per_second == pytest.approx(4096 / (0.139075 + 0.001689), rel=1e-4)
    assert many.network_bytes / 1.25e9 == pytest.approx(0.54, abs=0.005)  # at 10 Gbit/s
    eight = scale.Estimate(8, DENSE, PARAMETERS, 0.1)
    assert eight.network_seconds == pytest.approx(600.6e6 / 450e9, rel=1e-4)


def test_memory_of_weights_and_optimizer():
    assert scale.fixed_bytes(8, 1_000_000_000) == (16e9, 9e9)
    assert scale.fixed_bytes(1, 1_000_000_000) == (16e9, 16e9)
    # (0.9 x 80 - 16 x 0.25) / 0.5 = 136
    counted = scale.Counted(operations=1.0, peak_bytes=0.5e9, parameters=250_000_000)
    assert scale.images_at_once(counted) == 136


def test_the_page_is_as_the_script_writes_it():
    text = scale.PAGE.read_text()
    emptied = text.replace("| 1 H100, dense |", "| none |")
    assert emptied != text
    assert scale.page(emptied) == text, "run `python scripts/scale.py`"
