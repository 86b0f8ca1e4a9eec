"""One HTML file with the images at both ends of every score."""

import base64
import io
from collections.abc import Iterable

import pyarrow as pa
from jinja2 import Environment, PackageLoader
from torchvision.transforms.v2.functional import to_pil_image

from backfold.data.loading import evaluation_batches
from backfold.data.source import ImageSource
from backfold.inference.parts import INDEX
from backfold.training.run import Pretrained
from backfold.training.watch import to_display

TITLES = {
    "energy": (
        "Lowest energy: the most plausible images",
        "Highest energy: the least plausible images",
    )
}


def extremes(tables: Iterable[pa.Table], count: int) -> dict[str, tuple[pa.Table, pa.Table]]:
    """For each score, the rows of the ``count`` lowest and highest values, the farthest first."""
    found: dict[str, tuple[pa.Table, pa.Table]] = {}
    for table in tables:
        for name in table.drop_columns([INDEX, "path"]).column_names:
            low, high = found.get(name, (table[:0], table[:0]))
            # Equal scores in the images' order: the sheet is the same on every run.
            found[name] = tuple(
                pa.concat_tables([side, table]).sort_by([(name, order), (INDEX, "ascending")])[
                    :count
                ]
                for side, order in ((low, "ascending"), (high, "descending"))
            )
    return found


def render_contact_sheet(
    tables: Iterable[pa.Table], source: ImageSource, run: Pretrained, title: str, count: int = 24
) -> str:
    """The page, with its pictures inside: at most ``count`` of ``source`` in a view."""
    # A conditional run's energy of whole images says nothing of plausible ones.
    titles = {} if run.config.energy == "conditional" else TITLES
    views = [
        (view_title, name, side.to_pylist())
        for name, sides in extremes(tables, count).items()
        for view_title, side in zip(
            titles.get(name, (f"Lowest {name}", f"Highest {name}")), sides, strict=True
        )
    ]
    shown = sorted({row[INDEX] for _, _, rows in views for row in rows})
    pictures = {}  # data URIs by index
    for batch in evaluation_batches(source, run.image_size, run.channels, 16, indices=shown):
        images = to_display(run.statistics.normalize(batch.images), run.statistics)
        for index, image in zip(batch.indices.tolist(), images, strict=True):
            buffer = io.BytesIO()
            to_pil_image(image).save(buffer, format="JPEG", quality=90)
            encoded = base64.b64encode(buffer.getvalue()).decode()
            pictures[index] = f"data:image/jpeg;base64,{encoded}"
    environment = Environment(loader=PackageLoader("backfold.inference", ""), autoescape=True)
    return environment.get_template("contact_sheet.html.jinja").render(
        title=title, views=views, images=len(source), pictures=pictures
    )
