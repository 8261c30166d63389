"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const chosen = {run: null, step: null, prompt: 0, credit: "total"}; // in the rollouts

// An element. What files and models say enters the page here alone, as text and properties, never as HTML.
function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function draw(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function put(id, ...children) {
  document.getElementById(id).append(...children);
}

// Four digits and a true minus; what isn't known is never a zero.
function number(value, plus = "") {
  return value === null ? "missing" : (value > 0 ? plus : "") + String(Number(value.toPrecision(4))).replace("-", "−");
}

function range(values) {
  return [values.reduce((a, b) => Math.min(a, b), values[0] ?? 0), values.reduce((a, b) => Math.max(a, b), values[0] ?? 0)];
}

function colourOf(run) {
  return `run run${data.runs.findIndex(other => other.name === run) % 6}`;
}

// ---- Curves ----

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [360, 170, 48, 12, 8, 24]; // of a chart, and its margins

function showCurves() {
  const explained = metric => data.about.findIndex(([names]) => RegExp(names).test(`\`${metric}\``)) >>> 0; // last if -1
  const metrics = [...new Set(data.runs.flatMap(run => Object.keys(run.values)))];
  metrics.sort((a, b) => explained(a) - explained(b));
  const groups = Object.groupBy(metrics, metric => metric.includes("/") ? metric.split("/")[0] : "training");
  for (const [group, names] of Object.entries(groups)) {
    put("curves", make("h3", {}, group), make("div", {className: "charts"}, ...names.map(metric =>
      chart(metric, data.about[explained(metric)]?.[1] ?? ""))));
  }
  for (const {name, steps, logged} of data.runs) {
    put("curves", make("p", {className: "note"}, `${name}: ${steps.length} of ${logged} logged steps are drawn.`));
  }
}

function chart(metric, about) {
  const lines = data.runs.map(run => run.steps.map((step, i) => [step, run.values[metric]?.[i] ?? null]));
  const known = lines.flat().filter(([, value]) => value !== null);
  const [first, last] = range(known.map(([step]) => step));
  let [low, high] = range(known.map(([, value]) => value));
  if (low === high) high += Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10((high - low) / 3));
  const tick = power * [1, 2, 5, 10].find(factor => (high - low) / (factor * power) <= 4);
  [low, high] = [Math.floor(low / tick), Math.ceil(high / tick)];
  const x = step => LEFT + (step - first) / Math.max(last - first, 1) * (WIDTH - LEFT - RIGHT);
  const y = value => HEIGHT - BOTTOM - (value / tick - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
  const picture = draw("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": metric});
  for (let n = low; n <= high; n++) {
    picture.append(draw("path", {class: "grid", d: `M${LEFT} ${y(n * tick)}H${WIDTH - RIGHT}`}),
      draw("text", {x: LEFT - 6, y: y(n * tick) + 3.5, "text-anchor": "end"}, number(n * tick)));
  }
  picture.append(draw("text", {x: LEFT, y: HEIGHT - 7}, `step ${first}`),
    draw("text", {x: WIDTH - RIGHT, y: HEIGHT - 7, "text-anchor": "end"}, last));
  lines.forEach((points, i) => picture.append(draw("path", {class: `line ${colourOf(data.runs[i].name)}`, d: points.map(
    ([step, value], j) => value === null ? "" : `${j && points[j - 1][1] !== null ? "L" : "M"}${x(step)} ${y(value)}h0`
  ).join("")})));
  const rule = picture.appendChild(draw("path", {class: "rule"})), values = make("output");
  picture.onpointermove = event => {
    const box = picture.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    const pointed = known.map(([step]) => step).reduce((a, b) => // the step that is nearest
      Math.abs(b - first - share * (last - first)) < Math.abs(a - first - share * (last - first)) ? b : a);
    rule.setAttribute("d", `M${x(pointed)} ${TOP}V${HEIGHT - BOTTOM}`);
    values.replaceChildren(`step ${pointed}`, ...lines.flatMap((points, i) => points.filter(([step]) => step === pointed)
      .map(([, value]) => make("b", {className: colourOf(data.runs[i].name)}, number(value)))));
  };
  return make("figure", {}, make("figcaption", {}, make("b", {}, metric), values), picture, make("p", {}, about));
}

// ---- Rollouts ----

const ABOUT = {
  total: "The sum of all credits, which the loss weighs this token's gradient with.",
  full: "Format and accuracy, minus the group's mean. Every token carries it.",
  context: "The context score, minus the group's mean. What follows </context> doesn't carry it: its judge hasn't seen that.",
  logic: "The logic score, minus the group's mean. What follows </think> doesn't carry it.",
  KL: "Not a credit, but how far the policy is from the reference at this token: exp(d) − d − 1, d = ref_logp − logp.",
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
  if (!runs.length) return put("controls", "No run here has a rollouts.jsonl; train_grpo.py writes it every dump_every steps.");
  const {steps, dumped, most, clips} = (runs.find(run => run.name === chosen.run) ?? runs[0]).rollouts;
  if (!(chosen.step in steps)) chosen.step = Object.keys(steps)[0];
  const bytes = Uint8Array.from(atob(steps[chosen.step]), character => character.charCodeAt(0));
  const records = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
  const record = records[chosen.prompt] ?? records[chosen.prompt = 0];
  const select = (key, options) => make("label", {}, key, make("select", {name: key, onchange: event =>
    choose({[key]: event.target.value})}, ...options.map(([value, label]) =>
    new Option(label, value, false, String(value) === String(chosen[key])))));
  document.getElementById("controls").replaceChildren(select("run", runs.map(run => [run.name, run.name])),
    select("step", Object.keys(steps).map(step => [step, step])),
    select("prompt", records.map(({sample}, i) => [i, sample])), make("span", {className: "note"},
      `${Object.keys(steps).length} of ${dumped} steps are shown, with ${records.length} of at most ${most} prompts each`));
  document.getElementById("group").replaceChildren(
    make("div", {className: "prompt"}, make("div", {}, make("p", {className: "question"}, record.problem),
      make("p", {}, (record.options ?? []).join("\n")), make("p", {}, make("b", {}, "reference "), record.solution),
      make("p", {className: "note"}, `${record.problem_type}, a prompt of ${record.prompt_tokens} tokens`)),
    make("div", {}, ...Object.entries(record.media).flatMap(([kind, path]) => showClip(kind, clips[path])))),
    ...showGroup(record.completions));
}

function showClip(kind, {error, frames, fps, sound, seconds}) {
  if (error) return [make("p", {className: "note"}, `${kind} not shown: ${error}`)];
  return [make("div", {className: "frames"}, ...frames.map((src, i) =>
    make("img", {src, alt: `frame ${i + 1}`, title: fps ? `${number(i / fps)} s` : ""}))),
  ...(sound ? [make("audio", {controls: true, src: sound})] : []),
  make("p", {className: "note"}, `What the model saw and heard: ${frames.length} frames, ${number(seconds ?? 0)} s of sound`)];
}

function showGroup(completions) {
  const values = completions.map(({tokens}) => { // {view: the value of each token} of each completion
    const credits = Object.entries(tokens).filter(([name]) => name.startsWith("credit/"));
    const total = tokens.logp.map((_, t) => credits.reduce((sum, [, credit]) => sum + credit[t], 0));
    return {total, ...Object.fromEntries(credits.map(([name, credit]) => [name.slice(7), credit])), KL: tokens.kl};
  });
  const names = Object.keys(values[0]), isCredit = chosen.credit !== "KL"; // the credits have one scale, so that they compare
  const compared = isCredit ? names.filter(name => name !== "KL") : ["KL"];
  const scale = Math.max(...values.flatMap(of => compared.flatMap(name => range(of[name]))).map(Math.abs));
  return [
    make("p", {className: "tints"}, "tint by ", ...names.map(credit => make("button", {onclick: () => choose({credit}),
      ariaPressed: credit === chosen.credit}, credit))),
    make("p", {className: "legend"}, isCredit ? number(-scale) : "0", make("i", {style: "background: linear-gradient(90deg"
      + [isCredit ? -scale : 0, 0, scale].map(value => `, ${tint(value, scale)}`).join("")}), number(scale, "+"),
    make("b", {}, ` ${chosen.credit} `), ABOUT[chosen.credit] ?? "",
    isCredit ? " Green: the update makes this token more likely; orange: less." : " The KL term pulls violet tokens back.",
    scale ? "" : " All are 0: from equal rewards nothing is learned.",
    " ", make("span", {className: "clipped"}, "Dashed:"), " the clip took the token's gradient away."),
    make("div", {className: "completions"}, ...completions.map((of, i) => showCompletion(of, i, values[i], scale)))];
}

function showCompletion({text, token_ends, token_ids, rewards, judge_replies, truncated, tokens, blocks}, i, values, scale) {
  const row = (name, value, note) => make("tr", {}, make("th", {}, name), make("td", {className: value}, value),
    make("td", {className: "note"}, note));
  const scores = Object.keys(rewards).map(name =>
    row(name, number(rewards[name]), judge_replies[name] ? `judge: “${judge_replies[name]}”` : ""));
  const advantages = Object.keys(values).filter(name => name !== "KL").map(name => {
    const parts = Object.keys(rewards).filter(reward => reward === name || name === "full" && !(reward in values));
    const advantage = parts.some(reward => rewards[reward] === null) ? null
      : range(values[name]).reduce((a, b) => Math.abs(b) > Math.abs(a) ? b : a);
    const reached = values[name].filter(value => value !== 0).length;
    return row(`A ${name}`, number(advantage, "+"), `on ${reached} of ${token_ids.length} tokens`);
  });
  const body = make("div"), characters = [...text]; // offsets count characters, JavaScript's strings half of an emoji
  token_ends.forEach((end, t) => {
    const start = t ? token_ends[t - 1] : 0, piece = characters.slice(start, end).join("");
    const tag = Object.keys(blocks).find(name => start < blocks[name][1] && end > blocks[name][0]) ?? "outside";
    if (body.lastChild?.title !== tag) body.append(make("div", {className: `block ${tag}`, title: tag}));
    const token = make("span", {className: tokens.clipped[t] ? "token clipped" : "token"}, piece);
    const facts = Object.entries(tokens).map(([name, of]) => `${name}  ${name === "clipped" ? of[t] : number(of[t])}`);
    token.dataset.facts = [`“${piece}”`, `id  ${token_ids[t]}`, ...facts, `credit/total  ${number(values.total[t])}`].join("\n");
    token.style.backgroundColor = tint(values[chosen.credit][t], scale);
    body.lastChild.append(token);
  });
  return make("article", {}, make("h4", {}, `completion ${i + 1}`, truncated ? ", cut off" : ""),
    make("table", {}, ...scores, ...advantages), body);
}

// ---- Evaluation ----

function showEvaluation() {
  const said = record => `${record.error ?? record.parsed ?? record.answer ?? "no answer"} (${number(record.accuracy)})`;
  if (!data.evaluations.length) put("evaluation", "No results.txt of evaluate.py in these folders.");
  for (const {run, name, text} of data.evaluations) {
    put("evaluation", make("h3", {className: colourOf(run)}, `${run} ${name}`), make("pre", {}, text));
  }
  for (const {runs, name, pairs, better, worse, difference, interval, count, changed} of data.changes) {
    put("evaluation", make("h3", {}, `${name}: what changed from ${runs[0]} to ${runs[1]}`), make("p", {className: "about"},
      `Of ${pairs} questions in both, ${better} are better and ${worse} worse; mean accuracy ${number(difference, "+")}, `
      + `95 % interval ${(interval ?? [null, null]).map(bound => number(bound, "+")).join(" to ")}. ${changed.length} of `
      + `${count} changed questions are listed.`),
    ...changed.map(([before, after]) => make("details", {}, make("summary", {}, make("b", {}, before.id),
      ` ${said(before)} → ${said(after)}`), ...[["question", before.problem], ["reference", before.solution],
      [runs[0], before.completion], [runs[1], after.completion]].map(([who, text]) =>
      make("p", {}, make("b", {}, `${who} `), text ?? "missing")))));
  }
}

put("runs", ...data.runs.map(({name}) => make("b", {className: colourOf(name)}, name)));
showCurves();
showEvaluation();
choose({});
location.hash ||= data.runs.some(run => run.rollouts.dumped) ? "#rollouts" : "#curves";
