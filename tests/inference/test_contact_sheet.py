"""The images at both ends of every score."""

import base64
import io
import re

import pyarrow as pa
import torch
from PIL import Image

from backfold.inference.contact_sheet import extremes, render_contact_sheet


def scores(values, first=0, **more):
    indices = range(first, first + len(values))
    paths = [f"{index}.png" for index in indices]
    return pa.table({"index": list(indices), "path": paths, "energy": values, **more})


def test_extremes_are_those_of_a_sorted_list():
    values = torch.randint(0, 40, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    parts = [scores(values[i : i + 7], i) for i in range(0, 100, 7)]
    for side, sign in zip(extremes(parts, 9)["energy"], (1, -1), strict=True):
        order = sorted(range(100), key=lambda index: (sign * values[index], index))
        assert [row["index"] for row in side] == order[:9]


def test_few_images_are_all_shown_and_numbers_that_are_none_come_last():
    low, high = extremes([scores([3.0, float("nan"), 1.0])], 24)["energy"]
    assert [row["path"] for row in low] == ["2.png", "0.png", "1.png"]
    assert [row["path"] for row in high] == ["0.png", "2.png", "1.png"]


def test_the_page_shows_the_right_pictures_in_order(run, pictures):
    source = pictures(10)
    energies = [5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0, 0.0]
    table = scores(energies, error_masking=[float(index) for index in range(10)])
    page = render_contact_sheet([table], source, run, "a <b> & c", count=2)
    assert "a &lt;b&gt; &amp; c" in page
    assert "<b>" not in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Lowest energy: the most plausible images",
        "Highest energy: the least plausible images",
        "Lowest error_masking",
        "Highest error_masking",
    ]
    assert re.findall(r"<strong>(.*?)</strong>", page) == ["0", "1", "9", "8"] * 2
    shown = re.findall(r'src="data:image/jpeg;base64,(.*?)" alt="(.*?)"', page)
    assert [alt for _, alt in shown] == [
        "9.png", "1.png", "2.png", "6.png", "0.png", "1.png", "9.png", "8.png",
    ]  # fmt: skip
    for content, alt in shown:
        picture = Image.open(io.BytesIO(base64.b64decode(content))).convert("L")
        expected = source.pixels(int(alt[0])).float().mean()
        actual = torch.tensor(list(picture.tobytes())).float().mean()
        assert abs(actual - expected) < 3
