"""How a report begins: the operating point in one sentence, what its interval allows to say, what to be wary of."""

from html import escape

from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.bootstrap import Estimate
from mlxvr.evaluation.analysis.run_summary import GroupSummary, Summary
from mlxvr.evaluation.report.content import Content, score_name
from mlxvr.evaluation.report.markup import gallery_link

__all__ = ["cautions", "lead", "subtitle", "tiles", "verdict"]

_FEW_CLIPS = 50
_MODES = {
    "think": "every row answered once with reasoning; all modes are read from that",
    "live": "early exits for real",
}


def lead(summary: Summary) -> str:
    """The operating point in one sentence, as HTML."""
    group = summary.overall
    if group is None and not summary.count:
        return "There are no rows."
    if group is None:
        return f"No figure could be worked out: all {formatting.count(summary.count, 'row')} failed."
    size, auto = group.count, group.auto
    threshold = formatting.confidence(summary.threshold)
    ratio = formatting.share(group.think_ratio, size)
    where = f"{formatting.count(size, 'question')} on {formatting.count(group.clips, 'clip')}"
    if auto.score is None:
        said = (
            f"At threshold {threshold} the model reasons on <b>{ratio}</b> of {where} (no labels, so nothing is graded)"
        )
    else:
        said = (
            f"At threshold {threshold} the model scores <b>{formatting.share(auto.score, auto.labelled)}</b>"
            f"{_named(group)} over {where}, reasoning on <b>{ratio}</b> of them"
        )
    said += f", with <b>{formatting.tokens(auto.tokens.mean)}</b> generated tokens a question on average"
    if group.think is None:
        return f"{said}; it stopped early for real, so what thinking would have given is not known."
    always = group.think.tokens.mean
    saved = 1 - auto.tokens.mean / always if always else 0.0
    said += f" against {formatting.tokens(always)} for always thinking"
    said += f": the early exit saves <b>{formatting.share(saved, 1)}</b> of the tokens"
    if group.auto_vs_think is None:
        return f"{said}."
    return f"{said} and {_cost(group)}."


def _named(group: GroupSummary) -> str:
    """The name of auto's score with its interval."""
    assert group.auto.score is not None
    told = formatting.interval(group.auto.score, group.auto.labelled)
    notes = ["mean of accuracy and IoU"] if score_name(group) == "Score" else []
    notes += [f"95% interval {told}"] if told else []
    name = "" if score_name(group) == "Score" else f" {_noun(group)}"
    return name + (f" ({'; '.join(notes)})" if notes else "")


def _cost(group: GroupSummary) -> str:
    change = group.auto_vs_think
    assert change is not None
    rows = group.auto.labelled
    told = formatting.points_interval(change, rows)
    size = formatting.points(change, rows).lstrip("+−")
    if change.value == 0:
        said = f"costs <b>no</b> {_noun(group)}" + ("" if told or change.low is None else " (the same in every row)")
    else:
        unit = "point" if size == "1" else "points"
        said = f"{'gains' if change.value > 0 else 'costs'} <b>{size} {unit}</b> of {_noun(group)}"
    return said + (f" (difference {told})" if told else "")


def _noun(group: GroupSummary) -> str:
    return {"Accuracy": "accuracy", "mIoU": "mIoU", "Score": "score"}[score_name(group)]


def subtitle(content: Content) -> str:
    """What was asked of what, as far as the title does not say it."""
    known = [str(content.settings[name]) for name in ("model", "data", "task") if content.settings.get(name)]
    known = [value for value in known if value not in content.title]
    mode = content.settings.get("mode")
    known += [_MODES.get(str(mode), str(mode))] if mode else []
    return f'<p class="subtitle">{escape(" · ".join(known))}</p>' if known else ""


def verdict(summary: Summary) -> str:
    """What the interval of auto against think allows to say."""
    group = summary.overall
    change = None if group is None else group.auto_vs_think
    if group is None or change is None or change.low is None or change.high is None or change.low == change.high:
        return ""
    rows, name = group.auto.labelled, _noun(group)
    low, high = (formatting.points(Estimate(value=end, low=change.low, high=change.high), rows) for end in
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


def tiles(summary: Summary) -> str:
    """The operating point's figures, large."""
    group = summary.overall
    if group is None:
        return ""
    auto, think, rows = group.auto, group.think, group.auto.labelled
    tiles = []
    if auto.score is not None:
        versus = [f"direct {formatting.share(group.direct.score, rows)}"]
        versus += [f"think {formatting.share(think.score, rows)}"] if think is not None else []
        tiles.append((f"Auto {_noun(group)}", formatting.share(auto.score, rows), ", ".join(versus)))
    told = formatting.interval(group.think_ratio, group.count)
    tiles.append(("Think ratio", formatting.share(group.think_ratio, group.count), f"interval {told}" if told else ""))
    versus = [f"direct {formatting.tokens(group.direct.tokens.mean)}"]
    versus += [f"think {formatting.tokens(think.tokens.mean)}"] if think is not None else []
    tiles.append(("Tokens a question", formatting.tokens(auto.tokens.mean), ", ".join(versus)))
    shared = summary.shared["media_seconds"] + summary.shared["prefill_seconds"]
    if auto.seconds.mean or shared:
        parts = f"{formatting.seconds(auto.seconds.mean)} to generate, {formatting.seconds(shared)} to read the clip"
        parts += f"; think {formatting.seconds(shared + think.seconds.mean)}" if think is not None else ""
        tiles.append(("Time a question", formatting.seconds(shared + auto.seconds.mean), parts))
    if group.confidence is not None and group.confidence.auroc is not None:
        area = formatting.plain(group.confidence.auroc, group.confidence.count)
        tiles.append(("Confidence AUROC", area, "0.5 says nothing, 1 tells right from wrong"))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b><small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def cautions(content: Content) -> str:
    """What a reader should know before trusting the figures."""
    summary, group, told = content.summary, content.summary.overall, []
    if summary.errors:
        told.append(
            f"{formatting.count(len(summary.errors), 'row')} of {summary.count:,} failed and "
            f"{'is' if len(summary.errors) == 1 else 'are'} in no figure. {gallery_link('Show', result='failed')}"
        )
    if group is not None:
        auto = group.auto
        if group.clips == 1:
            told.append("One independent clip only: no interval can be given.")
        elif group.clips < _FEW_CLIPS:
            told.append(
                f"Only {formatting.count(group.clips, 'independent clip')}: the intervals are wide, and still "
                "narrower than they should be."
            )
        if auto.labelled and auto.labelled < group.count:
            told.append(
                f"{group.count - auto.labelled:,} of {group.count:,} rows have no label; they count as cost only."
            )
        if group.missing_boxes:
            told.append(
                f"{formatting.count(group.missing_boxes, 'row')} without a first answer box: these always reason. "
                f"{gallery_link('Show', format='no_box')}"
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
                f"{formatting.count(sure, 'answer')} given early {'is' if sure == 1 else 'are'} wrong. "
                f"{gallery_link('Show', result='wrong', decision='exited')}"
            )
    if not told:
        return ""
    return f'<ul class="cautions">{"".join(f"<li>{one}</li>" for one in told)}</ul>'
