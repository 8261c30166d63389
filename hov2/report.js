"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const chosen = {run: null, step: null, prompt: 0, credit: "total"}; // in the rollouts

// An element. What files and models say enters the page here alone, as text or an attribute's value, never as HTML.
function make(tag, attributes = {}, ...children) {
  const kind = ["svg", "path", "text"].includes(tag) ? "2000/svg" : "1999/xhtml";
  const node = document.createElementNS(`http://www.w3.org/${kind}`, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function put(id, ...children) {
  document.getElementById(id).append(...children);
}

// Four digits and a true minus; what isn't known is never a zero.
function number(value, plus = "") {
  if (value === null) return "missing";
  return (value > 0 ? plus : "") + String(Number(value.toPrecision(4))).replace("-", "−");
}

const least = values => values.reduce((a, b) => Math.min(a, b), Infinity);
const most = values => values.reduce((a, b) => Math.max(a, b), -Infinity);
const coloured = run => ({class: "run", style: `--run: oklch(0.64 0.15 ${255 + 137.5 * data.runs.indexOf(run)})`});

// ---- Curves ----

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [360, 170, 48, 12, 8, 24]; // of a chart, and its margins

function showCurves() {
  const row = metric => data.about.findIndex(([names]) => RegExp(names).test(`\`${metric}\``)) >>> 0; // unknown: last
  const metrics = [...new Set(data.runs.flatMap(run => Object.keys(run.values)))].sort((a, b) => row(a) - row(b));
  const groups = Object.groupBy(metrics, metric => metric.includes("/") ? metric.split("/")[0] : "training");
  for (const [group, names] of Object.entries(groups)) {
    put("curves", make("h3", {}, group), make("div", {class: "charts"}, ...names.map(metric =>
      chart(metric, data.about[row(metric)]?.[1] ?? ""))));
  }
}

function chart(metric, about) {
  const lines = data.runs.map(run => (run.values[metric] ?? []).map((value, i) => [run.steps[i], value]));
  const known = lines.flat().filter(([, value]) => value !== null);
  if (!known.length) return make("figure", {}, make("b", {}, metric), make("p", {}, `${about}: all are missing`));
  const steps = known.map(([step]) => step), values = known.map(([, value]) => value);
  const first = least(steps), last = most(steps);
  const span = most(values) - least(values) || Math.abs(most(values)) || 1;
  const power = 10 ** Math.floor(Math.log10(span / 3));
  const tick = power * [1, 2, 5, 10].find(factor => span / (factor * power) <= 4);
  const low = Math.floor(least(values) / tick), high = Math.ceil((least(values) + span) / tick);
  const x = step => LEFT + (step - first) / Math.max(last - first, 1) * (WIDTH - LEFT - RIGHT);
  const y = value => HEIGHT - BOTTOM - (value / tick - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
  const picture = make("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": metric});
  for (let n = low; n <= high; n++) {
    picture.append(make("path", {class: "grid", d: `M${LEFT} ${y(n * tick)}H${WIDTH - RIGHT}`}),
      make("text", {x: LEFT - 6, y: y(n * tick) + 3.5, "text-anchor": "end"}, number(n * tick)));
  }
  picture.append(make("text", {x: LEFT, y: HEIGHT - 7}, `step ${first}`),
    make("text", {x: WIDTH - RIGHT, y: HEIGHT - 7, "text-anchor": "end"}, last));
  lines.forEach((points, i) => {
    const pens = points.map(([, value], j) => value === null ? "" : (points[j - 1]?.[1] ?? null) === null ? "M" : "L");
    const path = points.map(([step, value], j) => pens[j] && `${pens[j]}${x(step)} ${y(value)}h0`).join("");
    picture.append(make("path", {...coloured(data.runs[i]), d: path}));
  });
  const rule = picture.appendChild(make("path", {class: "rule"})), said = make("output");
  picture.onpointermove = event => {
    const box = picture.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    const away = step => Math.abs(step - first - share * (last - first));
    const step = steps.reduce((a, b) => away(b) < away(a) ? b : a);
    rule.setAttribute("d", `M${x(step)} ${TOP}V${HEIGHT - BOTTOM}`);
    said.replaceChildren(`step ${step}`, ...lines.flatMap((points, i) => points.filter(point => point[0] === step)
      .map(([, value]) => make("b", coloured(data.runs[i]), number(value)))));
  };
  return make("figure", {}, make("figcaption", {}, make("b", {}, metric), said), picture, make("p", {}, about));
}

// ---- Rollouts ----

const ABOUT = {
  total: "The sum of all credits: the weight of this token's gradient in the loss.",
  full: "Format and accuracy, minus the group's mean. Every token carries it.",
  context: "The context score, minus the group's mean. Its judge has seen nothing after </context>, so nothing there "
    + "carries it.",
  logic: "The logic score, minus the group's mean. Nothing after </think> carries it.",
  KL: "Not a credit, but how far the policy is from the reference here: exp(d) − d − 1 with d = ref_logp − logp.",
};
const OPACITY = 0.75; // of the strongest tint

// A token's colour: green above zero, orange below, violet for KL, with an opacity of OPACITY * |value| / scale.
function tint(value, scale) {
  const colour = chosen.credit === "KL" ? "120 90 220" : value > 0 ? "0 150 110" : "230 95 20";
  return `rgb(${colour} / ${scale ? OPACITY * Math.abs(value) / scale : 0})`;
}

async function choose(choice) {
  Object.assign(chosen, choice);
  const runs = data.runs.filter(run => run.rollouts.dumped);
  if (!runs.length) return put("controls", "No run here has a rollouts.jsonl: only train_grpo.py writes one.");
  const {steps, dumped, prompts, clips} = (runs.find(run => run.name === chosen.run) ?? runs[0]).rollouts;
  if (!(chosen.step in steps)) chosen.step = Object.keys(steps)[0];
  const bytes = Uint8Array.from(atob(steps[chosen.step]), character => character.charCodeAt(0));
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const records = await new Response(inflated).json();
  const record = records[chosen.prompt] ?? records[chosen.prompt = 0];
  const select = (key, options) => make("label", {}, key, make("select", {
    name: key, onchange: event => choose({[key]: event.target.value})},
  ...options.map(([value, label]) => new Option(label, value, false, String(value) === String(chosen[key])))));
  document.getElementById("controls").replaceChildren(select("run", runs.map(run => [run.name, run.name])),
    select("step", Object.keys(steps).map(step => [step, step])),
    select("prompt", records.map(({sample}, i) => [i, sample])), make("span", {class: "note"},
      `${Object.keys(steps).length} of ${dumped} steps are shown, with ${records.length} of up to ${prompts} prompts`));
  document.getElementById("group").replaceChildren(
    make("div", {class: "prompt"}, make("div", {}, make("p", {class: "question"}, record.problem),
      make("p", {}, (record.options ?? []).join("\n")), make("p", {}, make("b", {}, "reference "), record.solution),
      make("p", {class: "note"}, `${record.problem_type}, a prompt of ${record.prompt_tokens} tokens`)),
    make("div", {}, ...Object.entries(record.media).flatMap(([kind, path]) => showClip(kind, clips[path])))),
    ...showGroup(record.completions));
}

function showClip(kind, {error, frames, fps, sound, seconds}) {
  if (error) return [make("p", {class: "note"}, `${kind} not shown: ${error}`)];
  return [make("div", {class: "frames"}, ...frames.map((src, i) =>
    make("img", {src, alt: `frame ${i + 1}`, title: fps ? `${number(i / fps)} s` : ""}))),
  ...(sound ? [make("audio", {controls: "", src: sound})] : []), make("p", {class: "note"},
    `What the model saw and heard: ${frames.length} frames, ${number(seconds ?? 0)} s of sound`)];
}

function showGroup(completions) {
  const values = completions.map(({tokens}) => { // of each completion: {view: a value for each token}
    const credits = Object.entries(tokens).filter(([name]) => name.startsWith("credit/"));
    const total = tokens.kl.map((_, t) => credits.reduce((sum, [, credit]) => sum + credit[t], 0));
    return {total, ...Object.fromEntries(credits.map(([name, credit]) => [name.slice(7), credit])), KL: tokens.kl};
  });
  const names = Object.keys(values[0]), isCredit = chosen.credit !== "KL";
  const compared = isCredit ? names.filter(name => name !== "KL") : ["KL"]; // one scale for all credits
  const scale = most(values.flatMap(of => compared.flatMap(name => of[name])).map(Math.abs));
  const ends = [isCredit ? -scale : 0, 0, scale].map(value => tint(value, scale));
  return [
    make("p", {class: "tints"}, "tint by ", ...names.map(credit => make("button", {
      onclick: () => choose({credit}), "aria-pressed": credit === chosen.credit}, credit))),
    make("p", {class: "legend"}, isCredit ? number(-scale) : "0",
      make("i", {style: `background: linear-gradient(90deg, ${ends})`}), number(scale, "+"),
      make("b", {}, ` ${chosen.credit} `), ABOUT[chosen.credit] ?? "",
      isCredit ? " Green: the update makes this token likelier; orange: less likely." : " The KL term pulls back.",
      scale ? "" : " All are 0: equal rewards teach nothing.",
      " ", make("span", {class: "clipped"}, "Dashed"), ": the clip took the token's gradient away."),
    make("div", {class: "completions"}, ...completions.map((completion, i) =>
      showCompletion(completion, `completion ${i + 1}`, values[i], scale)))];
}

function showCompletion({text, token_ends, token_ids, rewards, judge_replies, truncated, tokens, blocks}, title, values,
                        scale) {
  const row = (name, value, note) => make("tr", {}, make("th", {}, name), make("td", {class: value}, value),
    make("td", {class: "note"}, note));
  const table = make("table", {}, ...Object.keys(rewards).map(name =>
    row(name, number(rewards[name]), judge_replies[name] ? `judge: “${judge_replies[name]}”` : "")));
  let total = 0;
  for (const name of Object.keys(values).filter(name => name !== "total" && name !== "KL")) {
    const parts = Object.keys(rewards).filter(reward => reward === name || name === "full" && !(reward in values));
    const carrying = values[name].filter(credit => credit !== 0), missing = parts.some(part => rewards[part] === null);
    total += carrying[0] ?? 0;
    table.append(row(`A ${name}`, number(missing ? null : carrying[0] ?? 0, "+"),
      `on ${carrying.length} of ${token_ids.length} tokens`));
  }
  table.append(row("A, sum", number(total, "+"), ""));
  const body = make("div"), characters = [...text]; // offsets count characters; JavaScript's strings have emoji in two
  token_ends.forEach((end, t) => {
    const start = t ? token_ends[t - 1] : 0, piece = characters.slice(start, end).join("");
    const tag = Object.keys(blocks).find(name => start < blocks[name][1] && end > blocks[name][0]) ?? "outside";
    if (body.lastChild?.title !== tag) body.append(make("div", {class: `block ${tag}`, title: tag}));
    const facts = [`“${piece}”`, `id  ${token_ids[t]}`, ...Object.entries(tokens).map(([name, of]) =>
      `${name}  ${name === "clipped" ? of[t] : number(of[t])}`), `credit/total  ${number(values.total[t])}`];
    body.lastChild.append(make("span", {class: tokens.clipped[t] ? "token clipped" : "token",
      style: `background: ${tint(values[chosen.credit][t], scale)}`, "data-facts": facts.join("\n")}, piece));
  });
  return make("article", {}, make("h4", {}, title, truncated ? ", cut off" : ""), table, body);
}

// ---- Evaluation, and the whole page ----

put("runs", ...data.runs.map(run => make("b", coloured(run), run.name)));
showCurves();
choose({});
for (const [title, text] of data.evaluations) put("evaluation", make("h3", {}, title), make("pre", {}, text));
if (!data.evaluations.length) put("evaluation", "There is no results.txt of evaluate.py in these folders.");
location.hash ||= data.runs.some(run => run.rollouts.dumped) ? "#rollouts" : "#curves";
