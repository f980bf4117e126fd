"""The parts that a page is built of: tables, cells with intervals, figures, links into the gallery. HTML as text."""

import json
from collections.abc import Sequence
from html import escape

from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.bootstrap import Estimate

__all__ = ["difference_cell", "figures_of", "gallery_link", "share_cell", "table"]

_NARROW = 6  # columns that need not fill the page


def table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; cells are HTML, the first of each row is its name, columns are text."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    rows = "".join(
        f'<tr><th scope="row">{cells[0]}</th>{"".join(f"<td>{cell}</td>" for cell in cells[1:])}</tr>' for cells in body
    )
    kind = "wide narrow" if len(columns) <= _NARROW else "wide"
    return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def share_cell(estimate: Estimate | None, rows: int) -> str:
    """A share of so many rows with its interval in small print."""
    told = formatting.interval(estimate, rows)
    return formatting.share(estimate, rows) + (f" <small>{told}</small>" if told else "")


def difference_cell(estimate: Estimate | None, rows: int, *, is_cost: bool = False) -> str:
    """Points with their interval, coloured as better or worse unless they are a cost."""
    if estimate is None:
        return "–"
    told = formatting.points_interval(estimate, rows)
    kind = ""
    if estimate.low is not None and estimate.high is not None and told and not is_cost:
        kind = " class=better" if estimate.low > 0 else " class=worse" if estimate.high < 0 else ""
    return f"<span{kind}>{formatting.points(estimate, rows)}</span>" + (f" <small>{told}</small>" if told else "")


def figures_of(drawn: Sequence[tuple[str, str]]) -> str:
    """Charts side by side, each (SVG, caption as HTML); those without a drawing are left out."""
    inside = "".join(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in drawn if svg)
    return f'<div class="figures">{inside}</div>'


def gallery_link(label: str, rows: int = 1, **filters: str) -> str:
    """A link that sets the gallery's filters; the label alone where they would show no rows."""
    if not rows:
        return escape(label)
    return f'<a href="#gallery" data-show="{escape(json.dumps(filters))}">{escape(label)}</a>'
