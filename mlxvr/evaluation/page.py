"""The page of a report: one HTML file that needs nothing else, and whose every figure is in `report.json` too.

Tables and charts are written here, so that they are there without JavaScript and on paper; the script (`report.js`)
lists the gallery from the JSON block and moves the threshold along the curve. What comes from data is escaped here or
set as text there. The content security policy allows this style sheet and this script by their hashes, and pictures
that are in the page: nothing is loaded from anywhere, even if something slipped through.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

from mlxvr.evaluation import charts, numerals
from mlxvr.evaluation.calibrate import Calibration, Outcome
from mlxvr.evaluation.compare import Change, Comparison
from mlxvr.evaluation.judged import Judged
from mlxvr.evaluation.metrics import Distribution, Figures, Group, Summary, SweepRow
from mlxvr.evaluation.resampling import Estimate

__all__ = ["Against", "Content", "make_page", "score_name"]

_FEW_CLIPS = 50
_MOST_BARS = 30
_NARROW = 6  # columns that need not fill the page
_GOALS = {
    "no_loss": "no loss of score against always thinking, within {margin}",
    "ratio": "at most {budget:.0%} of the rows reason",
    "tokens": "at most {budget:g} mean tokens",
    "accuracy": "the best score",
}


@dataclass(frozen=True, kw_only=True)
class Against:
    """The run that this one is held against, and what changed from it to this one."""

    title: str
    comparison: Comparison
    rows: Sequence[Judged]
    summary: Summary
    curve: Sequence[SweepRow]


@dataclass(frozen=True, kw_only=True)
class Content:
    """All that a page shows.

    Attributes:
        title, settings: as `write_report` was given them.
        summary, curve, calibration: the figures.
        rows: every row with its grades.
        records, clips: the gallery's (`mlxvr.evaluation.gallery`); records know their clip.
        clips_left_out: how many clips have no frames in the page because it would grow too large.
        against: another run, or None.
    """

    title: str
    settings: Mapping[str, Any]
    summary: Summary
    curve: Sequence[SweepRow]
    rows: Sequence[Judged]
    records: Sequence[Mapping[str, Any]]
    clips: Sequence[Mapping[str, Any]]
    clips_left_out: int = 0
    calibration: Calibration | None = None
    against: Against | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


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
        f"<header><h1>{escape(content.title)}</h1>{_subtitle(content)}"
        f'<p class="lead">{lead(content.summary)}</p>{_verdict(content.summary)}{_tiles(content.summary)}'
        f"{_cautions(content)}</header>\n<nav>{menu}</nav>\n<main>{body}</main>"
        f'<script type="application/json" id="data">{_embedded(content)}</script><script>{script}</script>'
        "</body></html>\n"
    )


def lead(summary: Summary) -> str:
    """The operating point in one sentence, as HTML."""
    group = summary.overall
    if group is None:
        return f"No figure could be worked out: all {numerals.count(summary.count, 'row')} failed."
    size, auto = group.count, group.auto
    tau = numerals.confidence(summary.threshold)
    ratio = numerals.share(group.think_ratio, size)
    where = f"{numerals.count(size, 'question')} on {numerals.count(group.clips, 'clip')}"
    if auto.score is None:
        said = f"At threshold {tau} the model reasons on <b>{ratio}</b> of {where} (no labels, so nothing is graded)"
    else:
        said = (
            f"At threshold {tau} the model scores <b>{numerals.share(auto.score, auto.labelled)}</b>"
            f"{_named(group)} over {where}, reasoning on <b>{ratio}</b> of them"
        )
    said += f", with <b>{numerals.tokens(auto.tokens.mean)}</b> generated tokens a question on average"
    if group.think is None:
        return f"{said}; it stopped early for real, so what thinking would have given is not known."
    always = group.think.tokens.mean
    saved = 1 - auto.tokens.mean / always if always else 0.0
    said += f" against {numerals.tokens(always)} for always thinking"
    said += f": the early exit saves <b>{numerals.share(saved, 1)}</b> of the tokens"
    if group.auto_vs_think is None:
        return f"{said}."
    return f"{said} and {_cost(group)}."


def score_name(group: Group | None) -> str:
    """What the score of these rows is called."""
    figures = None if group is None else group.direct
    if figures is None or figures.miou is None:
        return "Accuracy"
    return "mIoU" if figures.accuracy is None else "Score"


def _named(group: Group) -> str:
    """The name of auto's score with its interval."""
    assert group.auto.score is not None
    told = numerals.interval(group.auto.score, group.auto.labelled)
    notes = ["mean of accuracy and IoU"] if score_name(group) == "Score" else []
    notes += [f"95% interval {told}"] if told else []
    name = "" if score_name(group) == "Score" else f" {_noun_short(group)}"
    return name + (f" ({'; '.join(notes)})" if notes else "")


def _cost(group: Group) -> str:
    change = group.auto_vs_think
    assert change is not None
    rows = group.auto.labelled
    told = numerals.points_interval(change, rows)
    size = numerals.points(change, rows).lstrip("+−")
    if change.value == 0:
        said = f"costs <b>no</b> {_noun_short(group)}"
    else:
        unit = "point" if size == "1" else "points"
        said = f"{'gains' if change.value > 0 else 'costs'} <b>{size} {unit}</b> of {_noun_short(group)}"
    return said + (f" (difference {told})" if told else "")


def _noun_short(group: Group) -> str:
    return {"Accuracy": "accuracy", "mIoU": "mIoU", "Score": "score"}[score_name(group)]


def _subtitle(content: Content) -> str:
    known = [str(content.settings[name]) for name in ("model", "data", "task", "mode") if content.settings.get(name)]
    known = [value for value in known if value not in content.title]
    return f'<p class="subtitle">{escape(" · ".join(known))}</p>' if known else ""


def _verdict(summary: Summary) -> str:
    """What the interval of auto against think allows to say."""
    group = summary.overall
    change = None if group is None else group.auto_vs_think
    if group is None or change is None or change.low is None or change.high is None or change.low == change.high:
        return ""
    rows, name = group.auto.labelled, _noun_short(group)
    low, high = (numerals.points(Estimate(value=end, low=change.low, high=change.high), rows) for end in
                 (change.low, change.high))  # fmt: skip
    if change.high < 0:
        said = f"The early exit loses {name}: even the best end of the interval is {high} points."
        return f'<p class="verdict bad">{said}</p>'
    if change.low > 0:
        return f'<p class="verdict good">The early exit is better than always thinking, by {low} to {high} points.</p>'
    return (
        f'<p class="verdict">No difference from always thinking can be shown on these rows: '
        f"anything from {low} to {high} points of {name} would fit them.</p>"
    )


def _tiles(summary: Summary) -> str:
    group = summary.overall
    if group is None:
        return ""
    auto, think, rows = group.auto, group.think, group.auto.labelled
    tiles = []
    if auto.score is not None:
        versus = [f"direct {numerals.share(group.direct.score, rows)}"]
        versus += [f"think {numerals.share(think.score, rows)}"] if think is not None else []
        tiles.append((f"Auto {_noun_short(group)}", numerals.share(auto.score, rows), ", ".join(versus)))
    told = numerals.interval(group.think_ratio, group.count)
    tiles.append(("Think ratio", numerals.share(group.think_ratio, group.count), f"interval {told}" if told else ""))
    versus = [f"direct {numerals.tokens(group.direct.tokens.mean)}"]
    versus += [f"think {numerals.tokens(think.tokens.mean)}"] if think is not None else []
    tiles.append(("Tokens a question", numerals.tokens(auto.tokens.mean), ", ".join(versus)))
    shared = summary.shared["decode_seconds"] + summary.shared["prefill_seconds"]
    if auto.seconds.mean or shared:
        parts = f"{numerals.seconds(auto.seconds.mean)} to generate, {numerals.seconds(shared)} to read the clip"
        parts += f"; think {numerals.seconds(shared + think.seconds.mean)}" if think is not None else ""
        tiles.append(("Time a question", numerals.seconds(shared + auto.seconds.mean), parts))
    if group.confidence is not None and group.confidence.auroc is not None:
        area = numerals.plain(group.confidence.auroc, group.confidence.count)
        tiles.append(("Confidence AUROC", area, "0.5 says nothing, 1 tells right from wrong"))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b><small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _cautions(content: Content) -> str:
    """What a reader should know before trusting the figures."""
    summary, group, told = content.summary, content.summary.overall, []
    if summary.errors:
        told.append(
            f"{numerals.count(len(summary.errors), 'row')} of {summary.count:,} failed and "
            f"{'is' if len(summary.errors) == 1 else 'are'} in no figure. {_show('Show', result='failed')}"
        )
    if group is not None:
        auto = group.auto
        if group.clips == 1:
            told.append("One independent clip only: no interval can be given.")
        elif group.clips < _FEW_CLIPS:
            told.append(
                f"Only {numerals.count(group.clips, 'independent clip')}: the intervals are wide, and still "
                "narrower than they should be."
            )
        if auto.labelled and auto.labelled < group.count:
            told.append(
                f"{group.count - auto.labelled:,} of {group.count:,} rows have no label; they count as cost only."
            )
        if group.missing_boxes:
            told.append(
                f"{numerals.count(group.missing_boxes, 'row')} without a first answer box: these always reason. "
                f"{_show('Show', format='no_box')}"
            )
        if not summary.live and group.think_ratio.value == 1:
            told.append("Every row reasons at this threshold: the early exit does nothing here.")
        if not summary.live and group.think_ratio.value == 0:
            told.append("No row reasons at this threshold: auto is the same as direct.")
        sure = sum(
            record["error"] is None and not record["reasoned"] and record["right"]["auto"] is False
            for record in content.records
        )
        if sure:
            told.append(
                f"{numerals.count(sure, 'answer')} given early {'is' if sure == 1 else 'are'} wrong. "
                f"{_show('Show', result='wrong', decision='exited')}"
            )
    if not told:
        return ""
    return f'<ul class="cautions">{"".join(f"<li>{one}</li>" for one in told)}</ul>'


def _show(label: str, **filters: str) -> str:
    """A link that sets the gallery's filters."""
    return f'<a href="#gallery" data-show="{escape(json.dumps(filters))}">{escape(label)}</a>'


def _sections(content: Content) -> list[tuple[str, str, str, str]]:
    """(id, name in the menu, title, HTML) of each part; one without HTML is left out."""
    against = content.against.title if content.against else ""
    return [
        ("against", "Comparison", f"Against {against}", _against(content)),
        ("modes", "Modes", "Direct, think, auto", _modes(content)),
        ("cost", "Thresholds", "What a threshold buys", _costs(content)),
        ("confidence", "Confidence", "Can the confidence be trusted?", _confidence(content)),
        ("tasks", "Tasks", "By task", _breakdown(content.summary.per_task, "Task", "task", with_chart=True)),
        ("categories", "Categories", "By category", _breakdown(content.summary.per_category, "Category", "category")),
        ("calibration", "Calibration", "The calibrated threshold", _calibration(content)),
        ("format", "Failures", "Failures and format", _format(content.summary)),
        ("gallery", "Gallery", "Gallery", _gallery(content)),
        ("made", "Settings", "How this was made", _made(content)),
    ]


def _modes(content: Content) -> str:
    group = content.summary.overall
    if group is None:
        return ""
    sizes = _sizes(content.rows)
    modes = [("direct", "first answer", group.direct), ("auto", "early exit", group.auto)]
    if group.think is not None:
        modes.insert(1, ("think", "always reasons", group.think))
    columns = ["Mode", *_score_columns(group.direct, sizes), "Tokens", "Seconds"]
    body = []
    for name, note, figures in modes:
        cells = [f"{name} <small>{note}</small>", *_score_cells(figures, group.direct, sizes)]
        cells += [_spread(figures.tokens, numerals.tokens), _spread(figures.seconds, numerals.seconds)]
        body.append(cells)
    notes = [
        "In small print 95% intervals; of tokens and seconds, which are those of generating, the 50th, 90th and 95th "
        "percentiles."
    ]
    rows = group.auto.labelled
    for label, estimate in (("Thinking gains", group.gain), ("Auto against think:", group.auto_vs_think)):
        if estimate is not None:
            told = numerals.points_interval(estimate, rows)
            notes.append(f"{label} {numerals.points(estimate, rows)} points{f' ({told})' if told else ''}, paired.")
    return _table(columns, body) + f'<p class="note">{" ".join(notes)}</p>'


def _spread(cost: Distribution, written: Callable[[float], str]) -> str:
    percentiles = " · ".join(written(value).removesuffix(" s") for value in (cost.p50, cost.p90, cost.p95))
    return f"{written(cost.mean)} <small>{percentiles}</small>"


def _sizes(rows: Sequence[Judged]) -> dict[str, int]:
    """How many rows, or pairs, each figure is over."""
    kept = [row for row in rows if row.sample.error is None]
    grades = [row.direct for row in kept if row.direct is not None]
    pairs: dict[str, list[bool]] = {}
    for row in kept:
        pairs.setdefault(row.sample.pair, []).append(row.direct is not None)
    return {
        "score": len(grades),
        "accuracy": sum(grade.accuracy is not None for grade in grades),
        "iou": sum(grade.iou is not None for grade in grades),
        "both": sum(grade.accuracy is not None and grade.iou is not None for grade in grades),
        "pairs": sum(name != "" and len(members) > 1 and all(members) for name, members in pairs.items()),
    }


def _score_columns(figures: Figures, sizes: Mapping[str, int]) -> list[str]:
    both = figures.accuracy is not None and figures.miou is not None
    columns = ["Score"] if both else []
    columns += [f"Accuracy (n {sizes['accuracy']:,})"] if figures.accuracy is not None else []
    columns += (
        [f"mIoU (n {sizes['iou']:,})", *(f"R@{least}" for least in figures.recall)] if figures.miou is not None else []
    )
    columns += ["Acc@GQA"] if figures.grounded_accuracy is not None else []
    return [*columns, *([f"Pairs (n {sizes['pairs']:,})"] if figures.pair_accuracy is not None else [])]


def _score_cells(figures: Figures, pattern: Figures, sizes: Mapping[str, int]) -> list[str]:
    """The cells of `_score_columns(pattern)`."""
    cells = []
    if pattern.accuracy is not None and pattern.miou is not None:
        cells.append(_cell(figures.score, sizes["score"]))
    if pattern.accuracy is not None:
        cells.append(_cell(figures.accuracy, sizes["accuracy"]))
    if pattern.miou is not None:
        overlaps = [figures.miou, *(figures.recall.get(least) for least in pattern.recall)]
        cells += [_cell(estimate, sizes["iou"]) for estimate in overlaps]
    if pattern.grounded_accuracy is not None:
        cells.append(_cell(figures.grounded_accuracy, sizes["both"]))
    if pattern.pair_accuracy is not None:
        cells.append(_cell(figures.pair_accuracy, sizes["pairs"]))
    return cells


def _cell(estimate: Estimate | None, rows: int) -> str:
    told = numerals.interval(estimate, rows)
    return numerals.share(estimate, rows) + (f" <small>{told}</small>" if told else "")


def _difference_cell(estimate: Estimate | None, rows: int, *, is_cost: bool = False) -> str:
    """Points with their interval, coloured as better or worse unless they are a cost."""
    if estimate is None:
        return "–"
    told = numerals.points_interval(estimate, rows)
    kind = ""
    if estimate.low is not None and estimate.high is not None and told and not is_cost:
        kind = " class=better" if estimate.low > 0 else " class=worse" if estimate.high < 0 else ""
    return f"<span{kind}>{numerals.points(estimate, rows)}</span>" + (f" <small>{told}</small>" if told else "")


def _table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    rows = "".join(
        f'<tr><th scope="row">{cells[0]}</th>{"".join(f"<td>{cell}</td>" for cell in cells[1:])}</tr>' for cells in body
    )
    kind = "wide narrow" if len(columns) <= _NARROW else "wide"
    return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _costs(content: Content) -> str:
    group = content.summary.overall
    if group is None or not content.curve:
        return ""
    runs = [charts.Curve(content.title, content.curve, _points(group))]
    if content.against is not None and content.against.curve and content.against.summary.overall is not None:
        runs.append(
            charts.Curve(content.against.title, content.against.curve, _points(content.against.summary.overall))
        )
    name = score_name(group)
    legend = ""
    if len(runs) > 1:
        legend = "".join(f'<span class="key run{number}">{escape(run.name)}</span>' for number, run in enumerate(runs))
        legend = f'<p class="legend">{legend}</p>'
    place = min(range(len(content.curve)), key=lambda index: abs(content.curve[index].tau - content.summary.threshold))
    slider = (
        '<div class="slider"><label for="tau">Try a threshold</label>'
        f'<input id="tau" type="range" min="0" max="{len(content.curve) - 1}" step="1" value="{place}">'
        '<output id="tried" for="tau"></output></div>'
    )
    reach = "" if content.curve[0].think_ratio == 0 else "Rows without a direct answer always reason."
    figures = [
        (charts.cost_chart(runs, name), f"{name} against cost at every threshold; bars are 95% intervals. {reach}"),
        (charts.ratio_chart(runs, content.summary.threshold), "How many rows reason at every threshold."),
    ]
    note = (
        "A threshold picked by eye from this curve looks better than it is on new clips: it was picked on these. "
        "Calibrating picks it with held-out folds."
    )
    return f'{legend}{_figures(figures)}{slider}<p class="note">{note}</p>'


def _points(group: Group) -> list[charts.Point]:
    modes = [("direct", group.direct), ("think", group.think), ("auto", group.auto)]
    return [
        charts.Point(name, mode.tokens.mean, mode.score)
        for name, mode in modes
        if mode is not None and mode.score is not None
    ]


def _figures(drawn: Sequence[tuple[str, str]]) -> str:
    inside = "".join(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in drawn if svg)
    return f'<div class="figures">{inside}</div>'


def _confidence(content: Content) -> str:
    group = content.summary.overall
    if group is None or group.confidence is None:
        return ""
    found = group.confidence
    graded = [
        row for row in content.rows
        if row.sample.error is None and row.sample.confidence is not None and row.direct is not None
    ]  # fmt: skip
    right = [row.sample.confidence or 0.0 for row in graded if row.direct is not None and row.direct.is_right]
    wrong = [row.sample.confidence or 0.0 for row in graded if row.direct is not None and not row.direct.is_right]
    drawn = [
        (
            charts.histogram_chart(right, wrong, content.summary.threshold),
            '<span class="key right">right</span> <span class="key wrong">wrong</span> first answers by confidence; '
            "right of the threshold they stand.",
        ),
        (
            charts.reliability_chart(found.bins),
            "On the diagonal a confidence means what it says. Numbers above: answers in each bin; bars: 95% Wilson "
            "intervals.",
        ),
    ]
    said = []
    if found.auroc is not None:
        area = numerals.plain(found.auroc, found.count)
        reach = ""
        if found.auroc.low is not None and found.auroc.high is not None and found.auroc.low < found.auroc.high:
            reach = (
                f" ({numerals.plain(found.auroc.low, found.count)} to {numerals.plain(found.auroc.high, found.count)})"
            )
        said.append(f"AUROC <b>{area}</b>{reach}: how often a right first answer is surer than a wrong one.")
    else:
        said.append("All first answers are right, or all are wrong: the confidence has nothing to tell apart.")
    said.append(
        f"ECE <b>{numerals.plain(found.ece, found.count)}</b>, Brier <b>{numerals.plain(found.brier, found.count)}</b>."
    )
    said.append(
        f"{numerals.count(found.count, 'graded first answer')} with a confidence, "
        f"{numerals.share(found.accuracy, found.count)} of them right."
    )
    return f"<p>{' '.join(said)}</p>{_figures(drawn)}"


def _breakdown(groups: Mapping[str, Group], title: str, key: str, *, with_chart: bool = False) -> str:
    if not groups:
        return ""
    has_think = all(group.think is not None for group in groups.values())
    has_labels = any(group.auto.labelled for group in groups.values())
    columns = [title, "Rows", "Clips"]
    columns += ["Direct", *(["Think"] if has_think else []), "Auto"] if has_labels else []
    columns += ["Gain of thinking", "Auto − think"] if has_labels and has_think else []
    columns += ["Think ratio", "Tokens", *(["of think’s"] if has_think else [])]
    body = []
    for name, group in groups.items():
        rows, think = group.auto.labelled, group.think if has_think else None
        cells = [_show(name, **{key: name}), f"{group.count:,}", f"{group.clips:,}"]
        if has_labels:
            modes = [group.direct, *([think] if think is not None else []), group.auto]
            cells += [_cell(figures.score, rows) for figures in modes]
        if has_labels and think is not None:
            cells += [_difference_cell(group.gain, rows), _difference_cell(group.auto_vs_think, rows)]
        cells += [_cell(group.think_ratio, group.count), numerals.tokens(group.auto.tokens.mean)]
        if think is not None:
            always = think.tokens.mean
            cells.append(numerals.share(group.auto.tokens.mean / always, 1) if always else "–")
        body.append(cells)
    chart = ""
    if with_chart:
        bars = sorted(
            ((name, group.think_ratio, group.count) for name, group in groups.items()),
            key=lambda bar: (-bar[1].value, bar[0]),
        )
        left = f" The {_MOST_BARS} that think most; the table has all." if len(bars) > _MOST_BARS else ""
        drawn = charts.bars_chart(bars[:_MOST_BARS], "rows that reason")
        chart = _figures([(drawn, f"Think ratio with 95% intervals.{left}")])
    kinds = {score_name(group) for group in groups.values() if group.auto.labelled}
    note = f"Direct, think and auto: {' or '.join(sorted(one if one == 'mIoU' else one.lower() for one in kinds))}"
    note += "; differences in points, coloured where the 95% interval leaves out zero. Of many rows some do so by luck."
    note = note if has_labels else ""
    return f'{_table(columns, body)}<p class="note">{note}</p>{chart}'


def _calibration(content: Content) -> str:
    found = content.calibration
    if found is None:
        return ""
    margin = None if found.margin is None else f"{100 * found.margin:g} points"
    goal = _GOALS[found.goal].format(margin=margin, budget=found.budget)
    spread = sorted({numerals.confidence(one) for one in found.fold_thresholds})
    said = [
        f"Goal: {goal}. All rows choose <b>{numerals.confidence(found.threshold)}</b>; "
        f"the {found.folds} folds chose {_between(spread)}."
    ]
    if found.threshold > 1:
        said.append("No direct answer may stand: only always thinking meets the goal.")
    if found.threshold != content.summary.threshold:
        said.append(
            f"The other figures of this page are those of threshold {numerals.confidence(content.summary.threshold)}."
        )
    table = _table(
        ["", *("Auto", "Think", "Direct", "Auto − think", "Think ratio", "Tokens", "Always thinking")],
        [_outcome("held-out folds", found.held_out), _outcome("the rows that chose it", found.in_sample)],
    )
    note = "The held-out row is the honest one: each fold is decided by the threshold of the others."
    parts = [f"<p>{' '.join(said)}</p>{table}<p class=note>{note}</p>"]
    parts.append(_task_thresholds(found))
    if found.temperature is not None:
        fit = found.temperature
        before, after = ((numerals.plain(one, fit.count) for one in pair) for pair in
                         ((fit.ece, fit.brier), (fit.ece_scaled, fit.brier_scaled)))  # fmt: skip
        parts.append(f"<h3>Temperature scaling</h3><p>T = {fit.temperature:.3g}, over {fit.count:,} answers, held out. "
                     "It changes what a confidence reads as, not which answers stand.</p>")  # fmt: skip
        parts.append(_table(["Confidence", "ECE", "Brier"], [["raw", *before], ["scaled", *after]]))
    return "".join(parts)


def _task_thresholds(found: Calibration) -> str:
    if not found.per_task:
        return ""
    body = [
        [
            escape(name),
            numerals.confidence(task.threshold),
            f"{task.count:,}",
            _difference_cell(task.held_out.difference, task.held_out.count),
            _cell(task.held_out.think_ratio, task.held_out.count),
            numerals.tokens(task.held_out.tokens.value),
        ]
        for name, task in found.per_task.items()
        if task.held_out is not None
    ]
    others = len(found.per_task) - len(body)
    table = (
        _table(["Task", "Threshold", "Rows", "Auto − think, held out", "Think ratio", "Tokens"], body) if body else ""
    )
    said = f"{numerals.count(others, 'task')} with too few rows take the common threshold." if others else ""
    return f"<h3>Thresholds of tasks</h3>{table}<p class=note>{said}</p>"


def _between(spread: Sequence[str]) -> str:
    return spread[0] if len(spread) == 1 else f"from {spread[0]} to {spread[-1]}"


def _outcome(name: str, found: Outcome) -> list[str]:
    rows = found.count
    return [
        name,
        _cell(found.auto, rows),
        _cell(found.think, rows),
        _cell(found.direct, rows),
        _difference_cell(found.difference, rows),
        _cell(found.think_ratio, rows),
        numerals.tokens(found.tokens.value),
        numerals.tokens(found.always_tokens),
    ]


def _against(content: Content) -> str:
    if content.against is None:
        return ""
    found, before = content.against.comparison, content.against.title
    body = []
    for name, change in (("direct", found.direct), ("think", found.think), ("auto", found.auto)):
        if change is not None:
            body.append([name, *_change_cells(change)])
    table = _table(["Score", before, content.title, "Difference", "Became right", "Became wrong"], body) if body else ""
    before_costs, after_costs = _means(content.against.rows, found, 0), _means(content.rows, found, 1)
    costs = _table(
        ["Auto", before, content.title, "Difference"],
        [
            ["think ratio", numerals.share(before_costs[0], found.count), numerals.share(after_costs[0], found.count),
             _difference_cell(found.think_ratio, found.count, is_cost=True)],
            ["tokens a question", numerals.tokens(before_costs[1]), numerals.tokens(after_costs[1]),
             _tokens_cell(found)],
        ],
    )  # fmt: skip
    began, stopped = len(found.began_to_think), len(found.stopped_thinking)
    said = [f"{numerals.count(found.count, 'row')} in both runs, on {numerals.count(found.clips, 'clip')}."]
    if found.thresholds[0] != found.thresholds[1]:
        told = " and ".join(numerals.confidence(one) for one in found.thresholds)
        said.append(f"Thresholds: {told}.")
    said.append(
        f"<b>{numerals.share(found.flipped, found.count)}</b> of the decisions flipped: "
        f"{_show(f'{began:,} began to think', against='began_to_think')}, "
        f"{_show(f'{stopped:,} stopped', against='stopped_thinking')}. "
        f"{_show(f'{found.answers_changed:,} first answers read otherwise', against='answer_changed')}."
    )
    if found.confidence_drift is not None:
        said.append(f"Confidences moved by {numerals.confidence(round(found.confidence_drift.value, 6))} on average.")
    if found.only_first or found.only_second:
        said.append(
            f"Left out, since the other run lacks them or failed there: {len(found.only_first):,} of {escape(before)}, "
            f"{len(found.only_second):,} of this run."
        )
    sentence = _difference_sentence(found, before)
    note = "Differences are this run minus the other, paired row by row, with 95% intervals over clips."
    return f'{sentence}{table}{costs}<p>{" ".join(said)}</p><p class="note">{note}</p>'


def _difference_sentence(found: Comparison, before: str) -> str:
    change = found.auto
    if change is None:
        return ""
    difference = change.difference
    told = numerals.points_interval(difference, change.labelled)
    said = f"{numerals.points(difference, change.labelled)} points" + (f" ({told})" if told else "")
    kind = ""
    verdict = "no difference can be shown on these rows"
    if difference.low is not None and difference.high is not None and told:
        if difference.low > 0:
            kind, verdict = " good", "this run is better"
        elif difference.high < 0:
            kind, verdict = " bad", "this run is worse"
    elif difference.value == 0:
        verdict = "the same score in both"
    return f'<p class="verdict{kind}">Auto scores {said} against {escape(before)}: {verdict}.</p>'


def _change_cells(change: Change) -> list[str]:
    rows = change.labelled
    return [
        _cell(change.first, rows),
        _cell(change.second, rows),
        _difference_cell(change.difference, rows),
        f"{len(change.became_right):,}",
        f"{len(change.became_wrong):,}",
    ]


def _means(rows: Sequence[Judged], found: Comparison, run: int) -> tuple[float, float]:
    """Think ratio and mean tokens of auto over the rows that both runs have."""
    apart = {*found.only_first, *found.only_second}
    kept = [row for row in rows if row.sample.error is None and row.sample.id not in apart]
    spent = sum(row.sample.total_tokens if row.reasoned else row.sample.first_tokens for row in kept)
    return sum(row.reasoned for row in kept) / len(kept), spent / len(kept)


def _tokens_cell(found: Comparison) -> str:
    def signed(value: float) -> str:
        text = numerals.tokens(abs(value))
        return text if value == 0 else f"{'+' if value > 0 else '−'}{text}"

    change = found.tokens
    if change.low is None or change.high is None or change.low == change.high:
        return signed(change.value)
    return f"{signed(change.value)} <small>{signed(change.low)} to {signed(change.high)}</small>"


def _format(summary: Summary) -> str:
    parts = []
    group = summary.overall
    if group is not None:
        body = [
            ["first answer declines (“Let's analyze …”)", f"{group.fallbacks:,}", _show("show", format="fallback")],
            ["no first answer box", f"{group.missing_boxes:,}", _show("show", format="no_box")],
        ]
        body += [
            [f"<code>{escape(name)}</code>", f"{number:,}", _show("show", format=f"problem:{name}")]
            for name, number in group.problems.items()
        ]
        parts.append(_table(["Departure", f"Rows of {group.count:,}", ""], body))
    if summary.errors:
        items = "".join(
            f"<li><code>{escape(name)}</code> {escape(reason)}</li>" for name, reason in summary.errors.items()
        )
        is_open = " open" if len(summary.errors) <= 10 else ""
        parts.append(
            f"<details{is_open}><summary>{numerals.count(len(summary.errors), 'row')} failed</summary>"
            f"<ul class=errors>{items}</ul></details>"
        )
    elif summary.count:
        parts.append("<p>No row failed.</p>")
    return "".join(parts)


def _gallery(content: Content) -> str:
    if not content.records:
        return ""
    note = ""
    if content.clips_left_out:
        shown = sum(bool(clip["frames"]) for clip in content.clips)
        note = (
            f"<p class=note>Frames of {numerals.count(shown, 'clip')} are in the page, those whose rows tell most; "
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
        ("95% interval", "percentile bootstrap over clips: questions on one clip and minimal pairs are drawn together"),
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
        "digits": numerals.decimals(*_scored(content.summary.overall)),
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


def _scored(group: Group | None) -> tuple[Estimate | float, int]:
    if group is None or group.auto.score is None:
        return 0.0, 0 if group is None else group.count
    return group.auto.score, group.auto.labelled


def _resource(name: str) -> str:
    return (files("mlxvr.evaluation") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
