"""One HTML file with the strangest images by every score, and the most ordinary ones by some."""

import base64
import io
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from jinja2 import Environment, PackageLoader
from torchvision.transforms.v2.functional import to_pil_image

from backfold.data.loading import evaluation_batches
from backfold.data.source import ImageSource, SubsetSource
from backfold.defects import DefectFinder
from backfold.inference.jobs import INDEX, MAP
from backfold.pictures import HEAT_SCALE, HOTTEST, heat_png, to_display
from backfold.training.run import Pretrained

TITLES = {
    "Lowest energy": "Lowest energy: the most plausible images",
    "Highest energy": "Highest energy: the least plausible images",
}
JOINED = "joined"
STRANGEST = "Highest joined: the strangest images, and under each where it is strange"


def extremes(tables: Iterable[pa.Table], count: int) -> dict[str, list[list[dict[str, Any]]]]:
    """For each score, the rows of the ``count`` lowest and highest values, the farthest first."""
    table = pa.concat_tables(tables)
    return {
        name: [
            # Equal scores in the images' order: the sheet is the same on every run.
            table.sort_by([(name, order), (INDEX, "ascending")])[:count].to_pylist()
            for order in ("ascending", "descending")
        ]
        for name in table.column_names
        if name not in (INDEX, "path", MAP)
    }


def render_contact_sheet(
    tables: Iterable[pa.Table],
    source: ImageSource,
    run: Pretrained,
    title: str,
    count: int = 24,
    finder: DefectFinder | None = None,
) -> str:
    """The page, with its pictures inside: at most ``count`` of ``source`` in a view.

    With a finder of defects the highest of its joined scores are shown once more, under its map.
    """
    titles = {f"Highest {JOINED}": STRANGEST}
    # A conditional run's energy of whole images says nothing of plausible ones.
    titles |= {} if run.config.energy == "conditional" else TITLES
    views: list[tuple[str, str, list[dict[str, Any]]]] = []
    for name, (low, high) in sorted(extremes(tables, count).items(), key=lambda s: s[0] != JOINED):
        # The least strange images show nothing.
        if name == "energy" or name.startswith("error_"):
            views.append((f"Lowest {name}", name, low))
        views.append((f"Highest {name}", name, high))
    views = [(titles.get(heading, heading), name, rows) for heading, name, rows in views]
    shown = sorted({row[INDEX] for _, _, rows in views for row in rows})
    strange = {row[INDEX] for heading, _, rows in views if heading == STRANGEST for row in rows}
    pictures, maps = {}, {}  # data URIs by index
    subset = SubsetSource(source, shown)
    for batch in evaluation_batches(subset, run.image_size, run.channels, 16):
        images = run.statistics.normalize(batch.images)
        indices = subset.indices[batch.indices.numpy()].tolist()
        for index, image in zip(indices, to_display(images, run.statistics), strict=True):
            buffer = io.BytesIO()
            to_pil_image(image).save(buffer, format="JPEG", quality=90)
            pictures[index] = _uri("jpeg", buffer.getvalue())
        chosen = [place for place, index in enumerate(indices) if index in strange]
        if finder is not None and chosen:
            _, found = finder(images[chosen])
            for place, each in zip(chosen, found, strict=True):
                maps[indices[place]] = _uri("png", heat_png(images[place], each, run.statistics))
    environment = Environment(loader=PackageLoader("backfold.inference", ""), autoescape=True)
    return environment.get_template("contact_sheet.html.jinja").render(
        title=title, views=views, images=len(source), pictures=pictures, maps=maps,
        strangest=STRANGEST, hottest=HOTTEST, colours=", ".join(HEAT_SCALE),
    )  # fmt: skip


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
