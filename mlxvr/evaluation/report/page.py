"""The page of a report: one HTML file that needs nothing else, and whose every figure is in `report.json` too.

Tables and charts are written here, so that they are there without JavaScript and on paper; the script (`report.js`)
lists the gallery from the JSON block and moves the threshold along the curve. What comes from data is escaped here or
set as text there. The content security policy allows this style sheet and this script by their hashes, and pictures
that are in the page: nothing is loaded from anywhere, even if something slipped through.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.bootstrap import Estimate
from mlxvr.evaluation.analysis.run_summary import GroupSummary
from mlxvr.evaluation.report.content import Content, score_name
from mlxvr.evaluation.report.opening import cautions, lead, subtitle, tiles, verdict
from mlxvr.evaluation.report.outcomes import calibration_section, comparison_section
from mlxvr.evaluation.report.sections import (
    breakdown_section,
    confidence_section,
    cost_section,
    format_section,
    modes_section,
)

__all__ = ["make_page"]


def make_page(content: Content) -> str:
    """The page as text."""
    style, script = (_resource(name) for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = [section for section in _sections(content) if section[3]]
    menu = "".join(f'<a href="#{name}">{short}</a>' for name, short, _, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>{inside}</section>' for name, _, title, inside in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{escape(content.title)}</title><style>{style}</style></head>\n<body>"
        f"<header><h1>{escape(content.title)}</h1>{subtitle(content)}"
        f'<p class="lead">{lead(content.summary)}</p>{verdict(content.summary)}{tiles(content.summary)}'
        f"{cautions(content)}</header>\n<nav>{menu}</nav>\n<main>{body}</main>"
        f'<script type="application/json" id="data">{_embedded(content)}</script><script>{script}</script>'
        "</body></html>\n"
    )


def _sections(content: Content) -> list[tuple[str, str, str, str]]:
    """(id, name in the menu, title, HTML) of each part; one without HTML is left out."""
    against = content.against.title if content.against else ""
    tasks = breakdown_section(content.summary.per_task, "Task", "task", with_chart=True)
    categories = breakdown_section(content.summary.per_category, "Category", "category")
    return [
        ("against", "Comparison", f"Against {against}", comparison_section(content)),
        ("modes", "Modes", "Direct, think, auto", modes_section(content)),
        ("cost", "Thresholds", "What a threshold buys", cost_section(content)),
        ("confidence", "Confidence", "Can the confidence be trusted?", confidence_section(content)),
        ("tasks", "Tasks", "By task", tasks),
        ("categories", "Categories", "By category", categories),
        ("calibration", "Calibration", "The calibrated threshold", calibration_section(content)),
        ("format", "Failures", "Failures and format", format_section(content.summary)),
        ("gallery", "Gallery", "Gallery", _gallery(content)),
        ("made", "Settings", "How this was made", _made(content)),
    ]


def _gallery(content: Content) -> str:
    if not content.records:
        return ""
    note = ""
    if content.clips_left_out:
        shown = sum(bool(clip["frames"]) for clip in content.clips)
        note = (
            f"<p class=note>Frames of {formatting.count(shown, 'clip')} are in the page, those whose rows tell most; "
            f"those of {content.clips_left_out:,} more would make it too large.</p>"
        )
    return (
        '<form id="filters"></form><p id="presets" class="presets"></p><p id="found" aria-live="polite"></p>'
        f'{note}<div id="cards"></div><div id="more"></div>'
        "<noscript><p>The gallery needs JavaScript; samples.jsonl has every row.</p></noscript>"
    )


def _made(content: Content) -> str:
    summary = content.summary
    listed = [*_flat(content.settings), ("threshold", repr(summary.threshold))]
    listed += [
        ("rows", str(summary.count)),
        ("resamples behind intervals", str(summary.bootstrap)),
        ("seed", str(summary.seed)),
    ]
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in listed)
    terms = (
        ("direct", "the first answer, given before any reasoning"),
        ("think", "the answer after the whole chain of thought, always"),
        ("auto", "the first answer where its confidence is at least the threshold, else the answer after reasoning"),
        ("think ratio", "share of rows that reason in auto"),
        (
            "95% interval",
            "percentile bootstrap over clips: questions on one clip and minimal pairs are drawn together; where all "
            "rows agree, which leaves nothing to draw from, Wilson's for as many rows as there are clips",
        ),
        ("points", "percentage points; differences are taken row by row before they are averaged"),
        ("score", "accuracy of an answer, temporal IoU of an interval, the mean of both for grounded questions"),
        ("right", "where right or wrong must be said of an interval: an IoU of at least 0.5"),
    )
    words = "".join(f"<div><dt>{name}</dt><dd>{meaning}</dd></div>" for name, meaning in terms)
    return (
        f'<dl class="settings">{cells}</dl><details><summary>Words and methods</summary>'
        f'<dl class="settings">{words}</dl></details>'
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    listed = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            listed += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            listed.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)))
    return listed


def _embedded(content: Content) -> str:
    data = {
        **content.figures,
        "digits": formatting.decimals(*_scored(content.summary.overall)),
        "score_name": score_name(content.summary.overall),
        "rows": list(content.records),
        "clips": list(content.clips),
        "against": None if content.against is None else {"title": content.against.title},
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # within a script nothing is escaped by HTML: what could end it, or begin a comment, is written as JSON escapes
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _scored(group: GroupSummary | None) -> tuple[Estimate | float, int]:
    if group is None or group.auto.score is None:
        return 0.0, 0 if group is None else group.count
    return group.auto.score, group.auto.labelled


def _resource(name: str) -> str:
    return (files("mlxvr.evaluation") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
