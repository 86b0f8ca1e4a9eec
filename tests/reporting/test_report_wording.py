import math

import pytest

from backfold.reporting import wording


@pytest.mark.parametrize(
    ("value", "digits", "unit", "expected"),
    [
        (4.25, 1, "dB", "4.2 dB"),
        (-0.04, 1, "", "0.0"),
        (-0.06, 1, "", "-0.1"),
        (1234567.0, 0, "", "1,234,567"),
        (math.nan, 1, "dB", "not finite"),
        (-math.inf, 1, "dB", "not finite"),
        (None, 1, "dB", "not measured"),
    ],
)
def test_decimals(value, digits, unit, expected):
    assert wording.decimals(value, digits, unit) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.26, "+0.3"), (-0.26, "-0.3"), (0.04, "0.0"), (-0.04, "0.0"), (None, "not measured")],
)
def test_signed(value, expected):
    assert wording.signed(value, 1) == expected


def test_percent():
    assert wording.percent(0.1234) == "12.3 %"
    assert wording.percent(None) == "not measured"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.99, "1 min 0 s"),
        (61.0, "1 min 1 s"),
        (3599.9, "1 h 0 min"),
        (5333.2, "1 h 29 min"),
        (7199.0, "2 h 0 min"),
        (200_000.0, "2 d 8 h"),
        (math.nan, "not finite"),
        (None, "not measured"),
    ],
)
def test_duration(seconds, expected):
    assert wording.duration(seconds) == expected


def test_counted():
    assert wording.counted(1, "row", "rows") == "1 row"
    assert wording.counted(0, "row", "rows") == "0 rows"
    assert wording.labels_phrase(1) == "1 label a class"
    assert wording.labels_phrase(10) == "10 labels a class"
    assert wording.labels_phrase("all") == "all labels"
    assert wording.origin_phrase("photos", 1500) == "photos, step 1,500"
    assert wording.origin_phrase(None, 0) == "step 0"
    assert wording.origin_phrase("photos", None) == "photos"
    assert wording.origin_phrase(None, None) == ""


def test_significant_keeps_small_numbers():
    assert wording.significant(0.00065449, 4) == "0.0006545"
    assert wording.significant(math.inf) == "not finite"
    assert wording.significant(None) == "not measured"
