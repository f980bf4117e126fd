"use strict";
// Lists the gallery from the JSON block and moves the tried threshold along the curve. Data is set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 24;

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  for (const child of children) if (child !== null && child !== undefined) element.append(child);
  return element;
}
function drawn(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}
function sureness(value) {
  if (value === null) return "none";
  if (value > 1) return "above 1";
  if (value === 0 || value === 1) return String(value);
  const digits = Math.min(9, Math.max(3, 1 - Math.floor(Math.log10(1 - value))));
  return value.toFixed(digits).replace(/0+$/, "").replace(/\.$/, "");
}
const percent = (value, digits) => `${(100 * value).toFixed(digits)}%`;
const tokens = (value) => (Math.abs(value) >= 20 ? Math.round(value).toLocaleString("en") : value.toFixed(1));

// The tried threshold.
const slider = document.getElementById("threshold");
if (slider && data.curve.length) {
  const chart = document.getElementById("cost-chart"), probe = document.getElementById("probe");
  const axis = (name) => chart.getAttribute(name).split(" ").map(Number);
  const at = ([low, high, start, end], value) => start + ((value - low) / (high - low)) * (end - start);
  const digits = data.digits;
  const move = () => {
    const row = data.curve[Number(slider.value)];
    const said = [`threshold ${sureness(row.threshold)}`];
    if (row.score !== null) said.push(`${data.score_name === "mIoU" ? "mIoU" : data.score_name.toLowerCase()} ${percent(row.score, digits)}`);
    said.push(`${percent(row.think_ratio, digits)} of rows reason`, `${tokens(row.mean_tokens)} tokens a question`);
    document.getElementById("tried").textContent = said.join(" · ");
    slider.setAttribute("aria-valuetext", said.join(", "));
    if (chart && probe && row.score !== null) {
      probe.setAttribute("cx", at(axis("data-x"), row.mean_tokens));
      probe.setAttribute("cy", at(axis("data-y"), row.score));
    }
  };
  slider.addEventListener("input", move);
  move();
}

// The gallery's filters: name, label, choices [value, label], and what a row must be.
const names = (key) => [...new Set(data.rows.map((row) => row[key]).filter(Boolean))].sort();
const problems = [...new Set(data.rows.flatMap((row) => row.problems))].sort();
const FILTERS = [
  ["task", "Task", names("task").map((name) => [name, name]), (row, value) => row.task === value],
  ["category", "Category", names("category").map((name) => [name, name]), (row, value) => row.category === value],
  ["result", "Auto’s answer", [["right", "right"], ["wrong", "wrong"], ["unlabelled", "no label"], ["failed", "row failed"]],
    (row, value) => value === "failed" ? row.error !== null : row.error === null
      && row.right.auto === { right: true, wrong: false, unlabelled: null }[value]],
  ["decision", "Decision", [["exited", "exited early"], ["reasoned", "reasoned"]],
    (row, value) => row.error === null && row.reasoned === (value === "reasoned")],
  ["thinking", "Thinking", [["changed", "changed the answer"], ["helped", "put it right"], ["hurt", "put it wrong"]],
    (row, value) => row.error === null && row.final !== null && (value === "changed" ? (row.first || "").trim() !== row.final.trim()
      : row.right.direct === (value === "hurt") && row.right.think === (value === "helped"))],
  ["format", "Format", [["fallback", "declined to answer"], ["no_box", "no first box"], ...problems.map((name) => [`problem:${name}`, name])],
    (row, value) => row.error === null && (value === "no_box" ? row.first === null
      : value === "fallback" ? row.fallback : row.problems.includes(value.slice(8)))],
];
if (data.against) {
  FILTERS.unshift(["against", `Against ${data.against.title}`, [["became_right", "became right"], ["became_wrong", "became wrong"],
    ["began_to_think", "began to think"], ["stopped_thinking", "stopped thinking"], ["answer_changed", "first answer changed"]],
    (row, value) => row.changes.includes(value)]);
}
const SORTS = [
  ["telling", "most telling first", (a, b) => a.interest - b.interest || level(b) - level(a)],
  ["sure", "most confident first", (a, b) => level(b) - level(a)],
  ["unsure", "least confident first", (a, b) => level(a) - level(b)],
  ["id", "by id", () => 0],
];
const level = (row) => (row.confidence === null ? -1 : row.confidence);
const PRESETS = [
  ["All", {}],
  ...(data.against ? [["Became wrong", { against: "became_wrong" }], ["Became right", { against: "became_right" }]] : []),
  ["Wrong and exited early", { result: "wrong", decision: "exited" }],
  ["Thinking put it right", { thinking: "helped" }],
  ["Thinking put it wrong", { thinking: "hurt" }],
  ["Failed", { result: "failed" }],
];

const form = document.getElementById("filters");
if (form) {
  const fields = {};
  const place = (name, label, control) => {
    fields[name] = control;
    control.id = `filter-${name}`;
    form.append(make("label", { for: control.id }, label, control));
  };
  const choice = (choices) => make("select", {}, ...choices.map(([value, label]) => make("option", { value }, label)));
  for (const [name, label, choices] of FILTERS) {
    const used = ["task", "category"].includes(name) ? choices.length > 1 : true;
    if (used) place(name, label, choice([["", "all"], ...choices]));
  }
  place("text", "Text", make("input", { type: "search", placeholder: "question, answers, reasoning, id" }));
  place("sort", "Order", choice(SORTS));
  const haystacks = new Map();
  const haystack = (row) => {
    if (!haystacks.has(row)) {
      const parts = [row.id, row.question, ...row.options, row.gold, row.first, row.final, row.reasoning, row.media, row.error];
      haystacks.set(row, parts.filter(Boolean).join("\n").toLowerCase());
    }
    return haystacks.get(row);
  };
  const matching = (values) => data.rows.filter((row) => FILTERS.every(([name, , , fits]) => !values[name] || fits(row, values[name])));
  const cards = document.getElementById("cards"), more = document.getElementById("more");
  let found = [], shown = 0;
  const extend = () => {
    const next = found.slice(shown, shown + PAGE);
    cards.append(...next.map(card));
    shown += next.length;
    more.replaceChildren();
    if (shown < found.length) {
      const button = make("button", { type: "button" }, `Show more (${(found.length - shown).toLocaleString("en")} left)`);
      button.addEventListener("click", extend);
      more.append(button);
    }
  };
  const list = () => {
    const values = Object.fromEntries(Object.entries(fields).map(([name, control]) => [name, control.value]));
    const words = values.text.trim().toLowerCase().split(/\s+/).filter(Boolean);
    found = matching(values).filter((row) => words.every((word) => haystack(row).includes(word)));
    found.sort(SORTS.find(([name]) => name === values.sort)[2]);
    document.getElementById("found").textContent = `${found.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} rows`;
    shown = 0;
    cards.replaceChildren();
    if (found.length) extend();
    else { cards.append(make("p", { class: "none" }, "No row is like that.")); more.replaceChildren(); }
    for (const button of document.querySelectorAll("#presets button")) {
      const wanted = JSON.parse(button.dataset.show);
      const same = Object.entries(values).every(([name, value]) => name === "sort" || (wanted[name] || "") === value.trim());
      button.setAttribute("aria-pressed", String(same));
    }
  };
  const show = (wanted) => {
    for (const [name, control] of Object.entries(fields)) {
      if (name === "sort") continue;
      control.value = wanted[name] || "";
      if (control.selectedIndex === -1) control.value = "";
    }
    list();
  };
  for (const [label, wanted] of PRESETS) {
    const count = matching(wanted).length;
    if (!count) continue;
    const button = make("button", { type: "button" }, `${label} ${count.toLocaleString("en")}`);
    button.dataset.show = JSON.stringify(wanted);
    button.addEventListener("click", () => show(wanted));
    document.getElementById("presets").append(button);
  }
  let waiting = 0;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(list, 120); });
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const link of document.querySelectorAll("a[data-show]")) link.addEventListener("click", () => show(JSON.parse(link.dataset.show)));
  new IntersectionObserver((seen) => { if (seen[0].isIntersecting && shown >= PAGE && shown < found.length) extend(); },
    { rootMargin: "600px" }).observe(more);
  list();
}

function card(row) {
  const meta = make("div", { class: "meta" });
  if (row.error !== null) meta.append(make("span", { class: "badge bad" }, "failed"));
  else {
    const right = row.right.auto;
    meta.append(make("span", { class: `badge ${right === null ? "" : right ? "good" : "bad"}` },
      right === null ? "no label" : right ? "✓ right" : "✗ wrong"));
    meta.append(make("span", { class: "badge" }, row.reasoned ? "reasoned" : "exited early"));
    meta.append(make("span", {}, `confidence ${sureness(row.confidence)}`));
  }
  for (const change of row.changes || []) meta.append(make("span", { class: "badge" }, change.replaceAll("_", " ")));
  for (const text of [row.id, row.task, row.category, row.pair && `pair ${row.pair}`]) if (text) meta.append(make("span", {}, text));
  for (const problem of row.problems) meta.append(make("span", {}, `⚠ ${problem}`));
  const text = make("div", {}, make("p", { class: "question" }, row.question));
  if (row.options.length) {
    text.append(make("ol", { class: "options" }, ...row.options.map((option, index) =>
      make("li", index === row.gold_option ? { class: "gold" } : {}, `${String.fromCharCode(65 + index)}. ${option}`))));
  }
  if (row.error !== null) text.append(make("p", {}, row.error));
  else text.append(answers(row, true));
  if (row.spans) text.append(spans(row.spans));
  if (row.reasoning) text.append(folded("Reasoning", row.reasoning));
  if (row.other) {
    const other = make("div", { class: "other" }, make("p", { class: "dim" }, `${data.against.title}: ${row.other.reasoned ? "reasoned" : "exited early"}, confidence ${sureness(row.other.confidence)}`), answers(row.other, false));
    if (row.other.reasoning) other.append(folded("Its reasoning", row.other.reasoning));
    text.append(other);
  }
  return make("article", { class: "card" }, meta, pictures(row), text);
}
function answers(row, withGold) {
  const list = make("dl", { class: "answers" });
  const line = (label, value, right, taken, count, score) => {
    const cell = make("dd", taken ? { class: "taken" } : {});
    if (right !== null) cell.append(make("span", { class: right ? "tick-right" : "tick-wrong" }, right ? "✓" : "✗"));
    cell.append(value === null ? "no box" : value === "" ? "(empty)" : value);
    const notes = [];
    if (score !== null && score !== undefined && score > 0 && score < 1) notes.push(score.toFixed(2));
    if (count) notes.push(`${count.toLocaleString("en")} tokens`);
    if (taken) notes.push("auto’s answer");
    cell.append(make("span", { class: "dim" }, `  ${notes.join(" · ")}`));
    list.append(make("dt", {}, label), cell);
  };
  if (withGold) list.append(make("dt", {}, "truth"), make("dd", row.gold === null ? { class: "dim" } : {}, row.gold === null ? "no label" : row.gold));
  line("first", row.first, row.right.direct, !row.reasoned, row.first_tokens, row.score.direct);
  if (row.final !== null) line("after thinking", row.final, row.right.think, row.reasoned, row.total_tokens, row.score.think);
  return list;
}
function folded(label, content) {
  return make("details", {}, make("summary", {}, label), make("div", { class: "reasoning" }, content));
}
function spans(found) {
  const rows = [["truth", found.gold, "gold"], ["first", found.first ? [found.first] : [], "first"], ["final", found.final ? [found.final] : [], "final"]];
  const end = Math.max(1, ...rows.flatMap(([, parts]) => parts.map((part) => part[1]))) * 1.08;
  const svg = drawn("svg", { viewBox: "0 0 400 66", class: "span-chart", role: "img", "aria-label": "intervals in seconds" });
  rows.forEach(([label, parts, kind], index) => {
    svg.append(drawn("text", { x: 0, y: 14 + 18 * index }, label));
    for (const [from, to] of parts) {
      svg.append(drawn("rect", { class: kind, x: 44 + (from / end) * 356, y: 5 + 18 * index, width: Math.max(2, ((to - from) / end) * 356), height: 11, rx: 2 }));
    }
  });
  svg.append(drawn("text", { x: 44, y: 64 }, "0 s"), drawn("text", { x: 400, y: 64, "text-anchor": "end" }, `${end.toFixed(0)} s`));
  return svg;
}
function pictures(row) {
  const clip = row.clip === null || row.clip === undefined ? null : data.clips[row.clip];
  if (clip === null) return make("div", { class: "placeholder" }, row.media ? `${row.media} (frames left out)` : "text only, no clip");
  if (!clip.frames.length) return make("div", { class: "placeholder" }, `No frames: ${clip.note}`);
  return make("div", { class: clip.frames.length === 1 ? "frames one" : "frames" }, ...clip.frames.map((frame) => {
    const figure = make("figure", {}, make("img", { src: `data:image/jpeg;base64,${frame.jpeg}`, alt: `frame of ${row.media}`, loading: "lazy" }));
    if (frame.seconds !== null) figure.append(make("figcaption", {}, `${frame.seconds.toFixed(1)} s`));
    return figure;
  }));
}
