"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const chosen = {run: null, step: null, prompt: 0, tint: "credit/total"}; // in the rollouts

// An element. What files and models say enters the page here alone, as text or an attribute's value, never as HTML.
function make(tag, attributes = {}, ...children) {
  const kind = ["svg", "path", "text"].includes(tag) ? "2000/svg" : "1999/xhtml";
  const node = document.createElementNS(`http://www.w3.org/${kind}`, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const put = (id, ...children) => document.getElementById(id).replaceChildren(...children);

// Four digits and a true minus; what isn't known is never a zero.
function number(value, plus = "") {
  if (typeof value !== "number") return String(value ?? "missing");
  return (value > 0 ? plus : "") + String(Number(value.toPrecision(4))).replace("-", "−");
}

const least = values => values.reduce((a, b) => Math.min(a, b));
const most = values => values.reduce((a, b) => Math.max(a, b));
const coloured = i => ({class: "run", style: `--run: oklch(0.64 0.15 ${255 + 137.5 * i})`}); // as the i-th run
const row = name => data.about.findIndex(([pattern]) => RegExp(`^${pattern}$`).test(name)) >>> 0; // unknown: last
const about = name => data.about[row(name)]?.[1] ?? "";

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [360, 170, 54, 352, 8, 146]; // of a chart, and its frame's sides

function chart(metric) {
  const lines = data.runs.map(run => run.metrics.map(record => [record.step, record[metric] ?? null]));
  const known = lines.flat().filter(([, value]) => value !== null);
  if (!known.length) return make("figure", {}, make("b", {}, metric), make("small", {}, "All are missing."));
  const steps = known.map(([step]) => step), values = known.map(([, value]) => value);
  const first = least(steps), last = most(steps), span = most(values) - least(values) || Math.abs(values[0]) || 1;
  const power = 10 ** Math.floor(Math.log10(span / 3));
  const tick = power * [1, 2, 5, 10].find(factor => span / (factor * power) <= 4);
  const low = Math.floor(least(values) / tick), high = Math.ceil((least(values) + span) / tick);
  const x = step => LEFT + (step - first) / Math.max(last - first, 1) * (RIGHT - LEFT);
  const y = value => BOTTOM - (value / tick - low) / (high - low) * (BOTTOM - TOP);
  const picture = make("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": metric});
  for (let n = low; n <= high; n++) {
    picture.append(make("path", {d: `M${LEFT} ${y(n * tick)}H${RIGHT}`}),
      make("text", {x: LEFT - 6, y: y(n * tick) + 3.5}, number(n * tick)));
  }
  picture.append(make("text", {x: RIGHT, y: HEIGHT - 7}, `steps ${first} to ${last}`));
  lines.forEach((points, i) => {
    const pen = j => (points[j - 1]?.[1] ?? null) === null ? "M" : "L"; // lifted over what is missing
    const path = points.map(([step, value], j) => value === null ? "" : `${pen(j)}${x(step)} ${y(value)}h0`);
    picture.append(make("path", {...coloured(i), d: path.join("")}));
  });
  const rule = picture.appendChild(make("path")), said = make("output");
  picture.onpointermove = ({offsetX}) => {
    const away = step => Math.abs(x(step) - offsetX / picture.clientWidth * WIDTH);
    const step = steps.reduce((a, b) => away(b) < away(a) ? b : a);
    rule.setAttribute("d", `M${x(step)} ${TOP}V${BOTTOM}`);
    said.replaceChildren(`step ${step}`, ...lines.map((points, i) =>
      make("b", coloured(i), number(new Map(points).get(step)))));
  };
  return make("figure", {}, make("b", {}, metric), said, picture, make("small", {}, about(metric)));
}

// A token's colour: green above zero, orange below, violet for KL; the largest |value|, the scale, has opacity 0.75.
function tint(value, scale) {
  const colour = chosen.tint === "kl" ? "120 90 220" : value > 0 ? "0 150 110" : "230 95 20";
  return `rgb(${colour} / ${scale ? 0.75 * Math.abs(value) / scale : 0})`;
}

async function choose(choice) {
  Object.assign(chosen, choice);
  const {steps, dumped, clips} = rolled.find(run => run.name === (chosen.run ??= rolled[0].name)).rollouts;
  if (!(chosen.step in steps)) chosen.step = Object.keys(steps)[0];
  const packed = await fetch(`data:;base64,${steps[chosen.step]}`);
  const records = await new Response(packed.body.pipeThrough(new DecompressionStream("deflate"))).json();
  const record = records[chosen.prompt] ?? records[chosen.prompt = 0];
  put("controls", select("run", rolled.map(run => run.name)), select("step", Object.keys(steps)),
    select("prompt", Object.keys(records), records.map(({sample}) => sample)),
    make("small", {}, `${Object.keys(steps).length} of ${dumped} steps are shown, with ${records.length} prompts`));
  put("group", make("div", {class: "prompt"}, make("div", {}, make("b", {}, record.problem),
    make("p", {}, [...record.options ?? [], `Reference: ${record.solution}`].join("\n")),
    make("small", {}, `${record.problem_type}, a prompt of ${record.prompt_tokens} tokens`)),
  make("div", {}, ...Object.values(record.media).flatMap(path => showClip(clips[path])))),
  ...showGroup(record.completions));
}

function select(name, values, labels = values) {
  const choices = make("select", {name}, ...values.map((value, i) => new Option(labels[i], value)));
  Object.assign(choices, {value: chosen[name], onchange: () => choose({[name]: choices.value})});
  return make("label", {}, `${name} `, choices);
}

function showClip({error, frames, sound, seconds = 0}) {
  if (error) return [make("small", {}, `Not shown: ${error}`)];
  return [...frames.map(src => make("img", {src, alt: ""})), sound ? make("audio", {controls: "", src: sound}) : "",
    make("small", {}, `What the model saw and heard: ${frames.length} frames, ${number(seconds)} s of sound`)];
}

function showGroup(completions) {
  const tints = Object.keys(completions[0].tokens).filter(name => name.startsWith("credit/") || name === "kl");
  if (!tints.includes(chosen.tint)) chosen.tint = tints[0];
  const compared = chosen.tint === "kl" ? ["kl"] : tints.filter(name => name !== "kl"); // one scale for all credits
  const values = completions.flatMap(({tokens}) => compared.flatMap(name => tokens[name]));
  const ends = [least(values), 0, most(values)], scale = most(ends.map(Math.abs));
  const buttons = tints.map(tint => Object.assign(make("button", {"aria-pressed": tint === chosen.tint},
    tint.replace("credit/", "")), {onclick: () => choose({tint})}));
  const bar = make("i", {style: `background: linear-gradient(90deg, ${ends.map(value => tint(value, scale))})`});
  return [make("p", {class: "tints"}, "tint by ", ...buttons),
    make("p", {class: "legend"}, number(ends[0]), bar, number(ends[2], "+"), ` ${about(chosen.tint)}`),
    make("div", {class: "completions"}, ...completions.map((completion, i) => showCompletion(completion, i, scale)))];
}

function showCompletion(completion, i, scale) {
  const {text, token_ends, token_ids, rewards, spans, judge_replies, truncated, tokens, blocks} = completion;
  const line = (name, value, note) => make("tr", {}, make("th", {}, name), make("td", {}, value), make("td", {}, note));
  const table = make("table", {}, ...Object.entries(rewards).map(([name, score]) =>
    line(name, number(score), name in judge_replies ? `judge: “${judge_replies[name]}”` : "")));
  for (const name of Object.keys(tokens).filter(name => name.startsWith("credit/") && name !== "credit/total")) {
    const span = name.replace("credit/", ""), carrying = tokens[name].filter(credit => credit !== 0);
    const known = Object.keys(rewards).every(reward => spans[reward] !== span || rewards[reward] !== null);
    table.append(line(`A ${span}`, number(known ? carrying[0] ?? 0 : null, "+"),
      `on ${carrying.length} of ${token_ids.length} tokens`));
  }
  const body = make("div"), characters = [...text]; // offsets count characters; JavaScript's strings have emoji in two
  token_ends.forEach((end, t) => {
    const start = t ? token_ends[t - 1] : 0, piece = characters.slice(start, end).join("");
    const tag = Object.keys(blocks).find(name => start < blocks[name][1] && end > blocks[name][0]) ?? "outside";
    if (body.lastChild?.title !== tag) body.append(make("div", {class: `block ${tag}`, title: tag}));
    const facts = Object.entries(tokens).map(([name, values]) => `${name}  ${number(values[t])}`);
    body.lastChild.append(make("span", {class: tokens.clipped[t] ? "token clipped" : "token",
      style: `background: ${tint(tokens[chosen.tint][t], scale)}`,
      "data-facts": [`“${piece}”`, `id  ${token_ids[t]}`, ...facts].join("\n")}, piece));
  });
  return make("article", {}, make("b", {}, `completion ${i + 1}`, truncated ? ", cut off" : ""), table, body);
}

const rolled = data.runs.filter(run => run.rollouts.dumped);
const names = new Set(data.runs.flatMap(run => run.metrics.flatMap(Object.keys)));
const metrics = [...names].filter(name => name !== "step").sort((a, b) => row(a) - row(b));
const groups = Object.groupBy(metrics, metric => metric.includes("/") ? metric.split("/")[0] : "training");
put("runs", ...data.runs.map((run, i) => make("b", coloured(i), run.name)));
put("charts", ...Object.entries(groups).flatMap(([group, names]) =>
  [make("h3", {}, group), make("div", {class: "charts"}, ...names.map(chart))]));
put("tables", ...data.evaluations.flatMap(([title, text]) => [make("h3", {}, title), make("pre", {}, text)]));
location.hash ||= rolled.length ? "#rollouts" : "#curves";
if (rolled.length) choose({});
