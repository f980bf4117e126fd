"""The parts of a page about one run: its modes, thresholds, confidence, tasks, failures."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.run_summary import Distribution, Figures, GroupSummary, Summary
from mlxvr.evaluation.graded_rows import Judged
from mlxvr.evaluation.report import charts
from mlxvr.evaluation.report.content import Content, score_name
from mlxvr.evaluation.report.markup import difference_cell, figures_of, gallery_link, share_cell, table

__all__ = ["breakdown_section", "confidence_section", "cost_section", "format_section", "modes_section"]

_MOST_BARS = 30


def modes_section(content: Content) -> str:
    """The three modes side by side."""
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
        cells += [_spread(figures.tokens, formatting.tokens), _spread(figures.seconds, formatting.seconds)]
        body.append(cells)
    notes = [
        "In small print 95% intervals; of tokens and seconds, which are those of generating, the 50th, 90th and 95th "
        "percentiles."
    ]
    rows = group.auto.labelled
    for label, estimate in (("Thinking gains", group.gain), ("Auto against think:", group.auto_vs_think)):
        if estimate is not None:
            told = formatting.points_interval(estimate, rows)
            notes.append(f"{label} {formatting.points(estimate, rows)} points{f' ({told})' if told else ''}, paired.")
    return table(columns, body) + f'<p class="note">{" ".join(notes)}</p>'


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
        cells.append(share_cell(figures.score, sizes["score"]))
    if pattern.accuracy is not None:
        cells.append(share_cell(figures.accuracy, sizes["accuracy"]))
    if pattern.miou is not None:
        overlaps = [figures.miou, *(figures.recall.get(least) for least in pattern.recall)]
        cells += [share_cell(estimate, sizes["iou"]) for estimate in overlaps]
    if pattern.grounded_accuracy is not None:
        cells.append(share_cell(figures.grounded_accuracy, sizes["both"]))
    if pattern.pair_accuracy is not None:
        cells.append(share_cell(figures.pair_accuracy, sizes["pairs"]))
    return cells


def cost_section(content: Content) -> str:
    """Score and think ratio at every threshold, and a slider along them."""
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
    place = min(
        range(len(content.curve)), key=lambda index: abs(content.curve[index].threshold - content.summary.threshold)
    )
    slider = (
        '<div class="slider"><label for="threshold">Try a threshold</label>'
        f'<input id="threshold" type="range" min="0" max="{len(content.curve) - 1}" step="1" value="{place}">'
        '<output id="tried" for="threshold"></output></div>'
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
    return f'{legend}{figures_of(figures)}{slider}<p class="note">{note}</p>'


def _points(group: GroupSummary) -> list[charts.Point]:
    modes = [("direct", group.direct), ("think", group.think), ("auto", group.auto)]
    return [
        charts.Point(name, mode.tokens.mean, mode.score)
        for name, mode in modes
        if mode is not None and mode.score is not None
    ]


def confidence_section(content: Content) -> str:
    """How well the confidence tells right from wrong."""
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
        area = formatting.plain(found.auroc, found.count)
        reach = ""
        if found.auroc.low is not None and found.auroc.high is not None:
            low, high = (formatting.plain(end, found.count) for end in (found.auroc.low, found.auroc.high))
            reach = f" ({low} to {high})"
        said.append(f"AUROC <b>{area}</b>{reach}: how often a right first answer is surer than a wrong one.")
    else:
        said.append("All first answers are right, or all are wrong: the confidence has nothing to tell apart.")
    said.append(
        f"ECE <b>{formatting.plain(found.ece, found.count)}</b>, "
        f"Brier <b>{formatting.plain(found.brier, found.count)}</b>."
    )
    said.append(
        f"{formatting.count(found.count, 'graded first answer')} with a confidence, "
        f"{formatting.share(found.accuracy, found.count)} of them right."
    )
    return f"<p>{' '.join(said)}</p>{figures_of(drawn)}"


def breakdown_section(groups: Mapping[str, GroupSummary], title: str, key: str, *, with_chart: bool = False) -> str:
    """The figures by task or category; `key` is the gallery's filter of that name."""
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
        cells = [gallery_link(name, rows=group.count, **{key: name}), f"{group.count:,}", f"{group.clips:,}"]
        if has_labels:
            modes = [group.direct, *([think] if think is not None else []), group.auto]
            cells += [share_cell(figures.score, rows) for figures in modes]
        if has_labels and think is not None:
            cells += [difference_cell(group.gain, rows), difference_cell(group.auto_vs_think, rows)]
        cells += [share_cell(group.think_ratio, group.count), formatting.tokens(group.auto.tokens.mean)]
        if think is not None:
            always = think.tokens.mean
            cells.append(formatting.share(group.auto.tokens.mean / always, 1) if always else "–")
        body.append(cells)
    chart = ""
    if with_chart:
        bars = sorted(
            ((name, group.think_ratio, group.count) for name, group in groups.items()),
            key=lambda bar: (-bar[1].value, bar[0]),
        )
        left = f" The {_MOST_BARS} that think most; the table has all." if len(bars) > _MOST_BARS else ""
        drawn = charts.bars_chart(bars[:_MOST_BARS], "rows that reason")
        chart = figures_of([(drawn, f"Think ratio with 95% intervals.{left}")])
    kinds = {score_name(group) for group in groups.values() if group.auto.labelled}
    note = f"Direct, think and auto: {' or '.join(sorted(one if one == 'mIoU' else one.lower() for one in kinds))}"
    note += (
        "; differences in points, coloured where the 95% interval leaves out zero (of many rows some do so by luck), "
        "without an interval where they are the same in every row."
    )
    note = note if has_labels else ""
    return f'{table(columns, body)}<p class="note">{note}</p>{chart}'


def format_section(summary: Summary) -> str:
    """Rows that failed, and departures from the format."""
    parts = []
    group = summary.overall
    if group is not None:
        body = [
            [
                "first answer declines (“Let's analyze …”)",
                f"{group.fallbacks:,}",
                gallery_link("show", format="fallback") if group.fallbacks else "",
            ],
            [
                "no first answer box",
                f"{group.missing_boxes:,}",
                gallery_link("show", format="no_box") if group.missing_boxes else "",
            ],
        ]
        body += [
            [f"<code>{escape(name)}</code>", f"{number:,}", gallery_link("show", format=f"problem:{name}")]
            for name, number in group.problems.items()
        ]
        parts.append(table(["Departure", f"Rows of {group.count:,}", ""], body))
    if summary.errors:
        items = "".join(
            f"<li><code>{escape(name)}</code> {escape(reason)}</li>" for name, reason in summary.errors.items()
        )
        is_open = " open" if len(summary.errors) <= 10 else ""
        parts.append(
            f"<details{is_open}><summary>{formatting.count(len(summary.errors), 'row')} failed</summary>"
            f"<ul class=errors>{items}</ul></details>"
        )
    elif summary.count:
        parts.append("<p>No row failed.</p>")
    return "".join(parts)
