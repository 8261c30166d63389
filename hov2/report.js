"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const views = {}; // name: its section of the page

// ---- Building blocks ----

// An element. What files and models say enters the page here alone, as text nodes and properties, never as HTML.
function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// A number with four digits and a true minus; what isn't known is never a zero.
function number(value) {
  return value === null || value === undefined ? "missing" : String(Number(value.toPrecision(4))).replace("-", "−");
}

const classOf = run => `run run${data.runs.findIndex(other => other.name === run) % 6}`;
const signed = value => (value > 0 ? "+" : "") + number(value);

function addView(name, about) {
  views[name] = make("section", {id: name}, make("h2", {}, name), make("p", {className: "about"}, about));
  document.querySelector("main").append(views[name]);
  document.getElementById("views").append(make("button", {textContent: name, onclick: () => showView(name)}));
}

function showView(name) {
  for (const [other, section] of Object.entries(views)) section.classList.toggle("shown", other === name);
  for (const button of document.querySelectorAll("#views button")) {
    button.setAttribute("aria-pressed", button.textContent === name);
  }
}

// A row of buttons, one of which is pressed; `choose` is called with its label.
function choices(labels, pressed, choose) {
  return labels.map(label => {
    const button = make("button", {textContent: label, onclick: () => choose(label)});
    button.setAttribute("aria-pressed", label === pressed);
    return button;
  });
}

// ---- Curves ----

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [360, 170, 48, 12, 8, 24];

function showCurves() {
  addView("curves", "Each chart is one metric over the steps of training, and below it what it means. A gap in a line "
    + "is a value that could not be had. Point at a chart to read its values.");
  const metrics = new Set(data.runs.flatMap(run => Object.keys(run.values)));
  const groups = Object.groupBy(metrics, name => name.includes("/") ? name.split("/")[0] : "training");
  for (const [group, names] of Object.entries(groups)) {
    views.curves.append(make("h3", {}, group), make("div", {className: "charts"}, ...names.map(chart)));
  }
  for (const run of data.runs.filter(run => run.steps.length < run.logged)) {
    views.curves.append(make("p", {className: "note"}, `${run.name}: ${run.steps.length} of ${run.logged} steps drawn.`));
  }
}

function chart(metric) {
  const lines = data.runs.map(run => run.steps.map((step, i) => [step, run.values[metric]?.[i] ?? null]));
  const known = lines.flat().filter(([, value]) => value !== null);
  const [first, last] = bounds(known.map(([step]) => step));
  let [low, high] = bounds(known.map(([, value]) => value));
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const unit = 10 ** Math.floor(Math.log10((high - low) / 3));
  const tick = unit * [1, 2, 5, 10].find(factor => (high - low) / (factor * unit) <= 4);
  [low, high] = [Math.floor(low / tick), Math.ceil(high / tick)];
  const x = step => LEFT + (step - first) / Math.max(last - first, 1) * (WIDTH - LEFT - RIGHT);
  const y = value => HEIGHT - BOTTOM - (value / tick - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
  const picture = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": metric});
  for (let n = low; n <= high; n++) {
    picture.append(svg("path", {class: "grid", d: `M${LEFT} ${y(n * tick)}H${WIDTH - RIGHT}`}),
      svg("text", {x: LEFT - 6, y: y(n * tick) + 3.5, "text-anchor": "end"}, number(n * tick)));
  }
  picture.append(svg("text", {x: LEFT, y: HEIGHT - 7}, `step ${first}`),
    svg("text", {x: WIDTH - RIGHT, y: HEIGHT - 7, "text-anchor": "end"}, last));
  lines.forEach((points, i) => picture.append(svg("path", {class: `line ${classOf(data.runs[i].name)}`, d: points.map(
    ([step, value], j) => value === null ? "" : `${j && points[j - 1][1] !== null ? "L" : "M"}${x(step)} ${y(value)}h0`
  ).join("")})));
  const rule = picture.appendChild(svg("path", {class: "rule"})), values = make("output");
  picture.onpointermove = event => {
    const box = picture.getBoundingClientRect();
    const pointed = ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    const near = Math.round(first + Math.min(1, Math.max(0, pointed)) * (last - first));
    values.replaceChildren(`step ${near}`, ...data.runs.flatMap((run, i) => {
      const point = lines[i].find(([step]) => step === near);
      return point ? [make("b", {className: classOf(run.name)}, number(point[1]))] : [];
    }));
    rule.setAttribute("d", `M${x(near)} ${TOP}V${HEIGHT - BOTTOM}`);
  };
  picture.onpointerleave = () => { values.replaceChildren(); rule.removeAttribute("d"); };
  const about = data.about.find(([pattern]) => RegExp(pattern).test(metric));
  return make("figure", {}, make("figcaption", {}, make("b", {}, metric), values), picture,
    make("p", {}, about ? about[1] : ""));
}

const bounds = values => [values.reduce((a, b) => Math.min(a, b), values[0] ?? 0),
                          values.reduce((a, b) => Math.max(a, b), values[0] ?? 0)];

// ---- Rollouts ----

const CREDITS = {
  total: "the sum of the credits below: what the loss weighs this token's gradient with.",
  full: "format and accuracy, minus the group's mean. It reaches every token.",
  context: "the context score, minus the group's mean. It doesn't reach what follows </context>: its judge has not "
    + "seen that.",
  logic: "the logic score, minus the group's mean. It doesn't reach what follows </think>.",
  KL: "no reward, but the distance to the reference model at this token, exp(d) − d − 1 with d = ref_logp − logp. "
    + "The KL term of the loss pulls such tokens back.",
};
const OPACITY = 0.75; // of the strongest tint
const chosen = {run: null, step: null, prompt: 0, credit: "total"};

function showRollouts() {
  const runs = data.runs.filter(run => run.rollouts.dumped).map(run => run.name);
  addView("rollouts", "One group: a prompt, and all completions that the policy wrote for it. Each reward is compared "
    + "with the group's mean, and the difference is laid on the tokens that this reward may praise or blame.");
  views.rollouts.append(make("div", {id: "controls"}), make("div", {id: "group"}));
  if (!runs.length) return views.rollouts.append(make("p", {className: "note"}, "No run here has a rollouts.jsonl: "
    + "train_grpo.py writes it unless dump_every is 0, train_sft.py has none."));
  choose({run: runs.at(-1)});
  document.getElementById("group").onpointerover = event => {
    const tip = document.getElementById("tip");
    tip.hidden = !event.target.facts;
    tip.textContent = event.target.facts ?? "";
    tip.style.left = `${Math.min(event.clientX, innerWidth - 300)}px`;
    tip.style.top = `${event.clientY > innerHeight - 190 ? event.clientY - 170 : event.clientY + 20}px`;
  };
}

async function choose(choice) {
  Object.assign(chosen, choice);
  const {steps, dumped, most, clips} = data.runs.find(run => run.name === chosen.run).rollouts;
  const shown = Object.keys(steps).sort((a, b) => a - b);
  if (!(chosen.step in steps)) chosen.step = shown[0];
  const records = await inflate(steps[chosen.step]);
  chosen.prompt = Math.min(chosen.prompt, records.length - 1);
  const named = data.runs.filter(run => run.rollouts.dumped).map(run => [run.name, run.name]);
  const select = (key, options) => make("label", {}, key, make("select", {
    name: key, onchange: event => choose({[key]: event.target.value})},
    ...options.map(([value, label]) => new Option(label, value, false, String(value) === String(chosen[key])))));
  document.getElementById("controls").replaceChildren(
    ...(named.length > 1 ? [select("run", named)] : []),
    select("step", shown.map(step => [step, step])),
    select("prompt", records.map((record, i) => [i, `${i + 1}: ${record.sample}`])),
    make("span", {className: "note"}, `${shown.length} of ${dumped} steps are shown`
      + (most > records.length ? `, and ${records.length} of up to ${most} prompts of each.` : ".")));
  document.getElementById("group").replaceChildren(...group(records[chosen.prompt], clips));
}

// The JSON in deflated base64.
async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
}

function group(record, clips) {
  const values = record.completions.map(creditsOf);
  const credits = Object.keys(values[0]);
  const isCredit = chosen.credit !== "KL";
  const scale = bounds(values.flatMap(of => isCredit ? credits.filter(c => c !== "KL").flatMap(c => of[c]) : of.KL)
    .map(Math.abs))[1];
  const ends = [isCredit ? -scale : 0, 0, scale];
  const legend = make("p", {className: "legend"}, isCredit ? number(-scale) : "0",
    make("i", {style: `background: linear-gradient(90deg, ${ends.map(value => tint(value, scale))})`}),
    isCredit ? signed(scale) : number(scale), make("b", {}, ` ${chosen.credit}: `), CREDITS[chosen.credit] ?? "",
    isCredit ? " Green: the update raises the token's probability. Orange: it lowers it." : "",
    scale ? "" : " All are 0 here, so there is no tint: equal rewards in a group teach nothing.",
    " ", make("span", {className: "token clipped"}, "Dashed"), " tokens lost their gradient to the clip.");
  return [
    make("div", {className: "prompt"}, make("div", {}, make("p", {className: "question"}, record.problem),
      ...(record.options ?? []).map(option => make("p", {}, option)),
      make("p", {className: "reference"}, make("b", {}, "reference "), record.solution),
      make("p", {className: "note"}, `${record.problem_type}, ${record.prompt_tokens} tokens of prompt`)),
    make("div", {}, ...Object.entries(record.media).flatMap(([kind, path]) => clip(kind, path, clips[path])))),
    make("div", {className: "tints"}, "tint the tokens by ", ...choices(credits, chosen.credit,
      credit => choose({credit}))), legend,
    make("div", {className: "completions"}, ...record.completions.map((completion, i) =>
      card(completion, i, values[i], scale)))];
}

// {view: a value for each token}: the sum of the credits, each of them, and the KL term.
function creditsOf({tokens}) {
  const named = Object.entries(tokens).filter(([name]) => name.startsWith("credit/"));
  const total = tokens.logp.map((_, t) => named.reduce((sum, [, values]) => sum + values[t], 0));
  return {total, ...Object.fromEntries(named.map(([name, values]) => [name.slice(7), values])), KL: tokens.kl};
}

// A token's colour: green above zero, orange below, violet for KL; its opacity is OPACITY * |value| / scale.
function tint(value, scale) {
  const colour = chosen.credit === "KL" ? "120 90 220" : value > 0 ? "0 150 110" : "230 95 20";
  return `rgb(${colour} / ${scale ? OPACITY * Math.abs(value) / scale : 0})`;
}

function clip(kind, path, {error, frames, fps, sound, seconds}) {
  if (error) return [make("p", {className: "note"}, `${kind} not shown: ${error}`)];
  const parts = [make("div", {className: "frames"}, ...frames.map((src, i) =>
    make("img", {src, alt: `frame ${i + 1}`, title: fps ? `${number(i / fps)} s` : ""})))];
  if (sound) parts.push(make("audio", {controls: true, src: sound}));
  return [...parts, make("p", {className: "note"}, `What the model saw and heard: ${frames.length} frames`
    + (sound ? `, ${number(seconds)} s of sound${seconds > 60 ? " (the first 60 here)" : ""}.` : ", no sound."))];
}

function card({text, token_ends, token_ids, rewards, judge_replies, truncated, tokens, blocks}, i, values, scale) {
  const scores = Object.entries(rewards).map(([name, score]) => make("tr", {}, make("th", {}, name),
    make("td", {className: score === null ? "missing" : ""}, number(score)),
    make("td", {className: "reply"}, name in judge_replies ? `judge: “${judge_replies[name]}”` : "")));
  const advantages = Object.keys(values).filter(name => name !== "KL").map(name => {
    const [low, high] = bounds(values[name]), reached = values[name].filter(Boolean).length;
    const missing = name in rewards ? rewards[name] === null
      : Object.keys(rewards).some(other => rewards[other] === null && (name === "total" || !(other in values)));
    return make("tr", {}, make("th", {}, `A ${name}`), make("td", {className: missing ? "missing" : ""},
      missing && name !== "total" ? "missing" : signed(-low > high ? low : high)),
    make("td", {className: "reply"}, `on ${reached} of ${token_ids.length} tokens`));
  });
  const body = make("div", {className: "text"});
  let part = null;
  token_ends.forEach((end, t) => {
    const start = t ? token_ends[t - 1] : 0;
    const tag = Object.keys(blocks).find(name => start < blocks[name][1] && end > blocks[name][0]) ?? "outside";
    if (part?.dataset.tag !== tag) part = body.appendChild(make("div", {className: `block ${tag}`}));
    part.dataset.tag = tag;
    const facts = Object.entries({id: token_ids[t], ...Object.fromEntries(Object.entries(tokens).filter(
      ([name]) => name !== "clipped").map(([name, of]) => [name, of[t]])), "credit, total": values.total[t]});
    const node = part.appendChild(make("span", {className: tokens.clipped[t] ? "token clipped" : "token",
      textContent: text.slice(start, end),
      facts: [`“${text.slice(start, end)}”`, ...facts.map(([name, value]) => `${name}  ${number(value)}`)].join("\n")}));
    node.style.backgroundColor = tint(values[chosen.credit][t], scale);
  });
  return make("article", {}, make("h4", {}, `completion ${i + 1}`, make("span", {}, truncated ? "cut off" : "")),
    make("table", {}, ...scores, ...advantages), body);
}

// ---- Evaluation ----

function showEvaluation() {
  addView("evaluation", "Held-out questions. An interval holds the mean in 95 of 100 draws of as many questions: two "
    + "scores whose intervals overlap widely may well be equal.");
  const said = r => `${r.error ?? r.parsed ?? r.answer ?? "no answer"} (${number(r.accuracy)})`;
  for (const {run, name, text} of data.evaluations) {
    views.evaluation.append(make("h3", {className: classOf(run)}, `${run} ${name}`), make("pre", {}, text));
  }
  for (const c of data.changes) {
    const interval = c.interval ? `, 95 % interval ${signed(c.interval[0])} to ${signed(c.interval[1])}` : "";
    views.evaluation.append(make("h3", {}, `What changed from ${c.runs[0]} to ${c.runs[1]} ${c.name}`),
      make("p", {className: "about"}, `Of ${c.pairs} questions in both, ${c.better} are better and ${c.worse} worse; mean `
        + `accuracy ${signed(c.difference)}${interval}. ${c.questions.length} of ${c.changed} changed ones are shown.`),
      ...c.questions.map(([before, after]) => make("details", {}, make("summary", {}, make("b", {}, before.id),
        ` ${said(before)} → ${said(after)}`), make("p", {}, before.problem),
      ...[["reference", before.solution], [c.runs[0], before.completion], [c.runs[1], after.completion]].map(
        ([who, text]) => make("p", {}, make("b", {}, `${who}: `), text ?? "missing")))));
  }
  if (!data.evaluations.length) views.evaluation.append(make("p", {className: "note"},
    "No results.txt of evaluate.py in these runs' folders or in folders in them."));
}

document.getElementById("runs").append(...data.runs.map(run => make("b", {className: classOf(run.name)}, run.name)));
showCurves();
showRollouts();
showEvaluation();
showView(data.runs.some(run => run.rollouts.dumped) ? "rollouts" : data.runs.some(run => run.logged) ? "curves" : "evaluation");
