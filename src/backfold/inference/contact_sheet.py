"""One HTML file with the images at both ends of every score."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, PackageLoader
from torchvision.transforms.v2.functional import to_pil_image

from backfold.data.loading import evaluation_loader
from backfold.data.source import ImageSource
from backfold.inference.table import INDEX
from backfold.training.pretrained import Pretrained
from backfold.training.previews import to_display

IMAGES_SHOWN = 24
ROUNDED = 6
WORDS = {
    "energy": (
        "Lowest energy: the most plausible images",
        "Highest energy: the least plausible images",
    )
}


@dataclass(frozen=True)
class Tile:
    """One image with its score."""

    path: str
    value: str
    picture: str


@dataclass(frozen=True)
class View:
    """Images at one end of a score, the farthest first."""

    title: str
    tiles: list[Tile]


def score_names(table: pa.Table) -> list[str]:
    """The columns that are scores."""
    return [name for name in table.column_names if name not in (INDEX, "path")]


def extremes(tables: Iterable[pa.Table], count: int) -> dict[str, tuple[pa.Table, pa.Table]]:
    """For each score, the rows of the ``count`` lowest and highest values, the farthest first.

    Args:
        tables: parts; one is in memory at a time.
        count: at most so many rows each.
    """
    found: dict[str, tuple[pa.Table, pa.Table]] = {}
    for table in tables:
        for name in score_names(table):
            low, high = found.get(name, (table[:0], table[:0]))
            found[name] = (
                _first(pa.concat_tables([low, table]), name, "ascending", count),
                _first(pa.concat_tables([high, table]), name, "descending", count),
            )
    return found


def _first(table: pa.Table, name: str, order: str, count: int) -> pa.Table:
    # Equal scores in the images' order: the sheet is the same on every run.
    keys = [(name, order), (INDEX, "ascending")]
    return table.take(pc.sort_indices(table, sort_keys=keys)[:count])


def render_contact_sheet(
    tables: Iterable[pa.Table],
    source: ImageSource,
    run: Pretrained,
    title: str,
    count: int = IMAGES_SHOWN,
) -> str:
    """The page, with its pictures inside.

    Args:
        tables: parts of scores.
        source: where the images are read again.
        run: their size and channels.
        title: of the page.
        count: images in a view.

    Raises:
        UserError: what loading raises.
    """
    ends = extremes(tables, count)
    shown = sorted(
        {index for pair in ends.values() for side in pair for index in side[INDEX].to_pylist()}
    )
    pictures = _pictures(shown, source, run)
    views = []
    for name, sides in ends.items():
        titles = WORDS.get(name, (f"Lowest {name}", f"Highest {name}"))
        for view_title, side in zip(titles, sides, strict=True):
            tiles = [
                Tile(row["path"], f"{row[name]:.{ROUNDED}g}", pictures.get(row[INDEX], ""))
                for row in side.to_pylist()
            ]
            views.append(View(view_title, tiles))
    environment = Environment(loader=PackageLoader("backfold.inference", ""), autoescape=True)
    return environment.get_template("contact_sheet.html.jinja").render(
        title=title, views=views, images=len(source)
    )


def _pictures(indices: list[int], source: ImageSource, run: Pretrained) -> dict[int, str]:
    """Data URIs by index."""
    pictures = {}
    if not indices:
        return {}
    loader = evaluation_loader(source, run.image_size, run.channels, 16, indices=indices)
    for batch in loader:
        shown = to_display(run.statistics.normalize(batch.images), run.statistics)
        for index, image in zip(batch.indices.tolist(), shown, strict=True):
            buffer = io.BytesIO()
            to_pil_image(image).save(buffer, format="JPEG", quality=90)
            encoded = base64.b64encode(buffer.getvalue()).decode()
            pictures[index] = f"data:image/jpeg;base64,{encoded}"
    return pictures
