"""The page of a report: one HTML file that needs nothing else, and whose every figure is in `report.json` too.

The template (`report.html.j2`) writes tables and charts, so that they are there without JavaScript and on paper; the
script (`report.js`) lists the gallery from the JSON block and moves the threshold along the curve. What comes from data
is escaped by the template or set as text by the script. The content security policy allows this style sheet and this
script by their hashes, and pictures that are in the page: nothing is loaded from anywhere, even if something slipped
through.
"""

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined

from mlxvr.evaluation.report.charts import MOST_BARS, WIDTH, Chart
from mlxvr.evaluation.report.content import Content
from mlxvr.evaluation.report.view import FILTERS, make_view

__all__ = ["make_page"]

_PACKAGE = "mlxvr.evaluation.report"


def make_page(content: Content, charts: Mapping[str, Chart]) -> str:
    """The page as text."""
    return _environment().get_template("report.html.j2").render(make_view(content, charts))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(_PACKAGE, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {**FILTERS, "place": _place}
    environment.globals |= {"zip": zip, "width": WIDTH, "most_bars": MOST_BARS}
    for name in ("style", "script"):
        text = (files(_PACKAGE) / {"style": "report.css", "script": "report.js"}[name]).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        environment.globals |= {name: text, f"{name}_hash": f"sha256-{digest}"}
    # the filter writes <, > and & as JSON escapes: nothing in the block can end the script or begin a comment
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    return environment


def _place(value: float) -> str:
    """A place in a drawing, to a hundredth of a unit."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
