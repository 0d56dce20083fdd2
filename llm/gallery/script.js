"use strict";
// The page: a table of all models, a time line, a family tree, and a view of one model, beside another where one is chosen.
// The address says what is shown: #qwen3-8b&vs=llama3.1-8b.

const $ = (id) => document.getElementById(id);
const BASELINE = "baseline";
const CARDS = [24, 80, 141]; // GB of memory
let data, byName, shown = null, versus = null;

async function start() {
  const packed = Uint8Array.from(atob($("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  data = JSON.parse(await new Response(stream).text());
  byName = new Map(data.models.map((model) => [model.name, model]));
  makeFilters();
  makeTable();
  makeTimeline();
  makeTree();
  addEventListener("hashchange", route);
  $("context").addEventListener("input", showCosts);
  $("versus").addEventListener("change", () => shown && go(shown.name, $("versus").value));
  $("size").addEventListener("change", () => go($("size").value, versus?.name));
  $("skip").addEventListener("click", (event) => { event.preventDefault(); $("main").focus(); });
  route();
  document.documentElement.dataset.ready = "yes";
}

// --- small helpers

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Three digits and a prefix, as `units` in llm/analysis/accounting.py.
function units(value) {
  let prefix = 0;
  while (value >= 999.5 && prefix < 4) { value /= 1000; prefix += 1; }
  return `${three(value)} ${["", "k", "M", "G", "T"][prefix]}`;
}

// Three digits. What lies halfway goes to the even digit as in Python, 4.125 to 4.12, and not up.
function three(value) {
  const digits = value.toPrecision(40).replace(".", "").replace(/^0+/, "");
  const down = /^\d\d[02468]50*$/.test(digits);
  return (down ? value * (1 - 1e-9) : value).toPrecision(3).replace(/\.$/, "");
}

const size = (n) => units(n).replace("G", "B").trim(); // of parameters, which are counted in billions
const count = (n) => n.toLocaleString("en-US");
const tokens = (n) => (n >= 2 ** 20 ? `${n / 2 ** 20} M` : `${n / 1024} K`);
const dated = ([year, month]) => (month ? `${year}-${String(month).padStart(2, "0")}` : `${year || "unknown"}`);
const link = (name) => element("a", { href: `#${name}` }, name);

function text(value) {
  if (value === null) return "none";
  if (Array.isArray(value)) return value.map(text).join(", ");
  if (typeof value === "object") return Object.entries(value).map(([name, inner]) => `${name} ${text(inner)}`).join(", ");
  return String(value);
}

const at = (values, k) => (values && values.length === 1 ? values[0] : values?.[k] ?? null);

function rows(pairs, differs = () => false) {
  const body = element("tbody");
  for (const [name, ...values] of pairs) {
    const row = element("tr", differs(name, values) ? { class: "differs" } : {}, element("th", { scope: "row" }, name));
    for (const value of values) row.append(element("td", {}, value));
    body.append(row);
  }
  return element("table", {}, body);
}

// --- the table

const k8 = 3; // the costs of the table are at 8 K tokens
const COLUMNS = [
  ["model", (m) => m.name], ["kind", (m) => m.kind], ["date", (m) => dated(m.date)],
  ["position", (m) => m.fields.position], ["norm", (m) => m.fields.norm], ["mixer", (m) => m.fields.mixer],
  ["feed-forward", (m) => m.fields.ffn], ["parameters", (m) => m.costs.parameters, size], ["active", (m) => m.costs.active, size],
  ["FLOPs / token at 8 K", (m) => at(m.costs.flops, k8), units], ["cache at 8 K, B", (m) => m.costs.cache[k8], units],
];
const FILTERS = { family: (m) => m.family, kind: (m) => m.kind, year: (m) => text(m.date[0]), position: (m) => m.fields.position,
  norm: (m) => m.fields.norm, mixer: (m) => m.fields.mixer, "feed-forward": (m) => m.fields.ffn };
let sorted = { column: null, down: false };

function makeFilters() {
  for (const [name, get] of Object.entries(FILTERS)) {
    const values = [...new Set(data.models.map(get))].sort();
    const select = element("select", { "data-filter": name }, element("option", { value: "" }, "all"));
    for (const value of values) select.append(element("option", {}, value));
    $("filters").append(element("label", {}, name, select));
  }
  $("filters").addEventListener("input", makeTable);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
}

function wanted() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = [...document.querySelectorAll("[data-filter]")].filter((select) => select.value);
  return data.models.filter((m) => {
    const hay = `${m.name} ${m.idea} ${m.outline} ${Object.values(m.fields).join(" ")}`.toLowerCase();
    return words.every((word) => hay.includes(word)) && chosen.every((s) => FILTERS[s.dataset.filter](m) === s.value);
  });
}

function makeTable() {
  const head = $("table").tHead.rows[0];
  head.replaceChildren(...COLUMNS.map(([name], i) => {
    const button = element("button", { type: "button" }, name);
    button.addEventListener("click", () => sortBy(i));
    const order = sorted.column === i ? (sorted.down ? "descending" : "ascending") : "none";
    return element("th", { scope: "col", "aria-sort": order }, button);
  }));
  const found = wanted();
  if (sorted.column !== null) {
    const get = COLUMNS[sorted.column][1], sign = sorted.down ? -1 : 1;
    found.sort((a, b) => sign * order(get(a), get(b)));
  }
  $("table").tBodies[0].replaceChildren(...found.map(tableRow));
  $("count").textContent = `${found.length} of ${data.models.length} pictures`;
}

function order(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
}

function sortBy(i) {
  sorted = { column: i, down: sorted.column === i ? !sorted.down : Boolean(COLUMNS[i][2]) };
  makeTable();
  $("table").tHead.rows[0].cells[i].firstChild.focus();
}

function tableRow(m) {
  const cells = COLUMNS.slice(1).map(([, get, number]) => {
    const value = get(m);
    return element("td", number ? { class: "number" } : {}, number ? (value === null ? "–" : number(value)) : value);
  });
  return element("tr", {}, element("th", { scope: "row" }, link(m.name)), ...cells);
}

// --- time line and family tree

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

function makeTimeline() {
  const models = [...data.models].sort((a, b) => order(dated(a.date), dated(b.date)));
  const years = groups(models, (m) => m.date[0]);
  for (const [year, members] of years) {
    const chips = members.map((m) => {
      const chip = link(m.name);
      if (m.date[1]) chip.dataset.month = MONTHS[m.date[1] - 1];
      return element("li", { class: m.kind === "ladder" ? "ladder" : "study" }, chip);
    });
    $("timeline").append(element("li", {}, element("h3", {}, text(year || "unknown")), element("ul", { class: "chips" }, ...chips)));
  }
}

function groups(values, key) {
  const found = new Map();
  for (const value of values) found.set(key(value), [...(found.get(key(value)) ?? []), value]);
  return found;
}

function makeTree() {
  const children = new Map(), placed = new Set();
  const put = (parent, child) => {  // once, although a class with two parents is reached twice
    if (!placed.has(child)) children.set(parent, [...(children.get(parent) ?? []), child]);
    placed.add(child);
  };
  const models = data.models.filter((model) => model.lineage);
  for (const m of models) put(m.lineage[0], m.name);
  for (const m of models) {
    const chain = [m.name, ...m.lineage];
    for (let i = 0; i + 1 < chain.length; i++) put(chain[i + 1], chain[i]);
  }
  const branch = (name) => {
    const m = byName.get(name), item = element("li", {}, m ? link(name) : element("strong", {}, name));
    if (m) item.append(" ", element("span", { class: "steps" }, changes(m)));
    const sizes = data.models.filter((other) => other.family === name && other.kind === "published");
    if (sizes.length) item.append(element("ul", { class: "chips" }, ...sizes.map((s) => element("li", { class: "study" }, link(s.name)))));
    if (children.has(name)) item.append(element("ul", {}, ...[...children.get(name)].map(branch)));
    return item;
  };
  $("tree").append(element("ul", {}, branch("Transformer")));
}

function changes(m) {
  const steps = m.steps.length ? `its own ${m.steps.join(", ")}` : "the same steps";
  return m.settings.length ? `${steps}; adds ${m.settings.join(", ")}` : steps;
}

// --- what is shown

function go(name, other) {
  location.hash = other && other !== name ? `${name}&vs=${other}` : name;
}

function route() {
  const [name, ...options] = decodeURIComponent(location.hash.slice(1)).split("&");
  const other = options.find((option) => option.startsWith("vs="))?.slice(3);
  const view = byName.has(name) ? "model" : ["timeline", "tree"].includes(name) ? name : "table";
  for (const id of ["table", "timeline", "tree", "model"]) $(`view-${id}`).hidden = id !== view;
  for (const id of ["table", "timeline", "tree"]) $(`nav-${id}`).setAttribute("aria-current", id === view ? "page" : "false");
  document.title = view === "model" ? `${name} – LLM architecture gallery` : "LLM architecture gallery";
  if (view === "model") showModel(byName.get(name), byName.get(other) ?? null);
  else shown = null;
}

function showModel(model, other) {
  const isNew = shown !== model;
  [shown, versus] = [model, other];
  $("model-title").textContent = other ? `${model.name} beside ${other.name}` : model.name;
  $("idea").textContent = model.idea;
  fillSelect($("versus"), [["", `${BASELINE}, in colours only`], ...data.models.map((m) => [m.name, m.name])], other?.name ?? "");
  const sizes = data.models.filter((m) => m.family === model.family).map((m) => [m.name, m.kind === "published" ? m.name : `${m.name}, for training`]);
  fillSelect($("size"), sizes, model.name);
  $("here").href = location.hash;
  showPictures();
  showBox(null);
  showDifferences();
  showCosts();
  showSights();
  showResults();
  showWhere();
  showConfig();
  if (isNew) { scrollTo(0, 0); $("main").focus({ preventScroll: true }); }
}

function fillSelect(select, options, value) {
  select.replaceChildren(...options.map(([id, name]) => element("option", { value: id }, name)));
  select.value = value;
}

// --- pictures

function showPictures() {
  const reference = versus ?? byName.get(BASELINE);
  const pictures = [picture(shown, reference)];
  if (versus) pictures.push(picture(versus, shown));
  $("pictures").replaceChildren(...pictures);
  $("pictures").classList.toggle("two", versus !== null);
  const same = reference === shown;
  $("legend").replaceChildren(...(same ? ["This is the baseline that the others are compared with."] : [
    `Compared with ${reference.name}:`, element("span", { class: "changed" }, "another part"),
    element("span", { class: "resized" }, "the same part, other numbers")]));
}

function picture(model, reference) {
  const figure = element("figure");
  figure.innerHTML = model.svg;
  figure.style.setProperty("--wide", figure.firstElementChild.getAttribute("width"));
  const found = marks(model, reference);
  for (const box of figure.querySelectorAll("[data-part], [data-block]")) {
    const mark = found.get(box.dataset.part ?? `block ${box.dataset.block}`);
    if (mark) {
      box.classList.add(mark);
      box.setAttribute("aria-label", `${box.getAttribute("aria-label")}, ${mark}`);
    }
    box.addEventListener("click", (event) => { event.stopPropagation(); choose(model, box); });
    box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      event.stopPropagation();
      choose(model, box);
    });
  }
  return figure;
}

// As `marks` in llm/gallery/compare.py.
function marks(model, other) {
  const found = new Map();
  if (model === other) return found;
  model.parts.forEach((part, i) => {
    const there = other.parts.filter((their) => their.slot === part.slot);
    if (!there.length) found.set(String(i), "new");
    else if (!there.some((their) => essence(their) === essence(part) && text(their.facts) === text(part.facts)))
      found.set(String(i), there.some((their) => essence(their) === essence(part)) ? "resized" : "changed");
  });
  const wirings = other.blocks.map((block) => block.title + block.equation);
  model.blocks.forEach((block, i) => { if (!wirings.includes(block.title + block.equation)) found.set(`block ${i}`, "changed"); });
  return found;
}

const isSize = (fact) => fact.split(" ").slice(1).some((word) => /^\d/.test(word));
const essence = (part) => [part.title, ...part.facts.filter((fact) => !isSize(fact))].join("\n");

function choose(model, box) {
  for (const other of document.querySelectorAll(".picture .chosen")) other.classList.remove("chosen");
  box.classList.add("chosen");
  showBox(model, box.dataset.part === undefined ? model.blocks[box.dataset.block] : model.parts[box.dataset.part]);
}

function showBox(model, part) {
  $("box").classList.toggle("filled", part !== undefined);
  if (!part) {
    $("box").replaceChildren(element("h3", {}, "Click a box"), "Its equation, its shapes, its costs and its source appear here. With the keyboard: Tab to a box, then Enter.");
    return;
  }
  const about = data.sources[part.source];
  const parts = [element("h3", {}, part.title), element("p", {}, about.sentence || about.idea)];
  if (about.sentence && about.idea && about.idea !== about.sentence) parts.push(element("p", { class: "small" }, about.idea));
  const formula = part.equation?.replaceAll("; ", "\n") ?? about.equation;
  if (formula) parts.push(element("pre", { tabindex: "0", "aria-label": "Equation" }, formula));
  parts.push(rows(boxRows(model, part).filter(([, value]) => value)), links(about));
  $("box").replaceChildren(...parts);
}

function boxRows(model, part) {
  if (part.times) return [["layers", count(part.times)]];
  const k = Number($("context").value), flops = at(part.flops, k);
  const times = part.layers > 1 ? `, ${count(part.layers)} layers: ` : "";
  return [
    ["name", part.slot], ["says", part.facts.join(", ")], ["also", part.settings.join(", ")], ["weights", part.matrices.join(", ")],
    ["parameters", part.parameters ? count(part.parameters) + (times && times + count(part.parameters * part.layers)) : ""],
    ["FLOPs / token", flops ? `${units(flops)}${times && times + units(flops * part.layers)} at ${tokens(data.contexts[k])} tokens` : ""],
  ];
}

function links(about) {
  const line = element("p", {});
  for (const id of about.papers.slice(0, 4)) line.append(element("a", { href: `https://arxiv.org/abs/${id}` }, `arXiv ${id}`), ", ");
  if (about.blog) line.append(`Blog: ${about.blog}, `);
  line.append(element("a", { href: `../../${about.file}#L${about.line}` }, `${about.file}, line ${about.line}`));
  return line;
}

// --- the cards beside a picture

function showDifferences() {
  const reference = versus ?? byName.get(BASELINE);
  $("differences-title").textContent = reference === shown ? "What it is" : `What differs from ${reference.name}`;
  const pairs = ["position", "norm", "mixer", "ffn"].map((name) => [name === "ffn" ? "feed-forward" : name, shown.fields[name], reference.fields[name]]);
  pairs.push(["wiring", wiring(shown), wiring(reference)]);
  pairs.push(["parameters", size(shown.costs.parameters), size(reference.costs.parameters)]);
  pairs.push(["active", size(shown.costs.active), size(reference.costs.active)]);
  if (reference === shown) { $("differences").replaceChildren(rows(pairs.map(([name, value]) => [name, value]))); return; }
  $("differences").replaceChildren(titled(rows(pairs, (name, [a, b]) => a !== b), shown.name, reference.name), partList(reference));
}

function wiring(model) {
  return [...new Set(model.blocks.map((block) => block.equation.replaceAll("; ", ", then ").replaceAll("(", "(\u200b")))].join(" | ");
}

function titled(table, ...names) {
  const head = element("tr", {}, element("td", {}), ...names.map((name) => element("th", { scope: "col" }, name)));
  table.prepend(element("thead", {}, head));
  return table;
}

// The boxes that one has and the other has not, or has otherwise, in words.
function partList(reference) {
  const mine = marks(shown, reference), theirs = marks(reference, shown), list = element("ul", { class: "small" });
  const say = (model, found, kinds, verb) => found.forEach((mark, i) => {
    const part = model.parts[i];
    if (part && kinds.includes(mark)) list.append(element("li", {}, `${verb}: ${part.slot}, ${[part.title, ...part.facts].join(", ")}`));
  });
  say(shown, mine, ["new"], "only here");
  say(shown, mine, ["changed"], "another part here");
  say(reference, theirs, ["new"], `only in ${reference.name}`);
  const lines = [...new Set([...list.children].map((item) => item.textContent))];
  list.replaceChildren(...lines.map((line) => element("li", {}, line)));
  return lines.length ? element("details", lines.length < 16 ? { open: "" } : {}, element("summary", {}, `In words: ${lines.length}`), list) : list;
}

function showCosts() {
  const k = Number($("context").value), context = data.contexts[k];
  $("context-label").textContent = `Context: ${tokens(context)} tokens`;
  $("context").setAttribute("aria-valuetext", `${tokens(context)} tokens`);
  const models = versus ? [shown, versus] : [shown];
  const cell = (get) => models.map((m) => { const value = get(m.costs); return value === null ? "no such position" : value; });
  const told = (value, end) => (value === null ? null : units(value) + end);
  const pairs = [
    ["parameters", ...cell((c) => size(c.parameters))], ["active in a token", ...cell((c) => size(c.active))],
    ["forward pass, a token", ...cell((c) => told(at(c.flops, k), "FLOPs"))],
    ["whole cache, bf16", ...cell((c) => told(at(c.cache, k), "B"))],
    ["cache, a token", ...cell((c) => told(c.cache[k] === null ? null : c.cache[k] / context, "B"))],
  ];
  const table = rows(pairs);
  const beyond = models.filter((m) => context > m.config.max_seq_len).map((m) => `${m.name} was made for ${count(m.config.max_seq_len)} tokens`);
  $("costs").replaceChildren(models.length > 1 ? titled(table, ...models.map((m) => m.name)) : table,
    element("p", { class: "small" }, beyond.length ? `${beyond.join("; ")}: longer contexts show how its costs would grow.` : "Within the context that it was made for."),
    ...models.map((m) => memory(m, k)),
    element("div", { class: "sights" }, chart(models, "flops", "FLOPs a token", k), chart(models, "cache", "bytes of the cache", k)));
}

// Weights and cache in bf16 beside the memory of common accelerators.
function memory(model, k) {
  const weights = 2 * model.costs.parameters, cache = model.costs.cache[k] ?? 0, box = element("div", { class: "memory" });
  for (const card of CARDS) {
    const space = card * 1e9, fits = weights + cache <= space;
    const share = (bytes) => `width:${Math.min(100, (100 * bytes) / Math.max(space, weights + cache)).toFixed(1)}%`;
    box.append(element("span", {}, `${card} GB`), element("i", {}, element("b", { style: share(weights) }), element("b", { style: share(cache) })),
      element("span", {}, fits ? "fits" : `${Math.ceil((weights + cache) / space)} needed`));
  }
  const title = `${model.name}: weights ${units(weights)}B and cache ${units(cache)}B for one text, in bf16`;
  return element("div", {}, element("p", { class: "small" }, title), box);
}

function chart(models, field, name, k) {
  const values = models.map((m) => data.contexts.map((_, i) => at(m.costs[field], i)));
  const logs = values.flat().filter((v) => v).map(Math.log10), low = Math.floor(Math.min(...logs)), high = Math.ceil(Math.max(...logs) + 0.01);
  const last = data.contexts.length - 1;
  const lines = values.map((list) => list.flatMap((v, i) => (v ? [[i / last, (Math.log10(v) - low) / (high - low)]] : [])));
  const power = (n) => units(10 ** n).replace(".00", "").trim();
  return plot(lines, `${name}, from 1 K to 1 M tokens`, ["1 K", "1 M tokens"], [power(low), power(high)], { now: k / last });
}

// Lines of points [x, y] from 0 to 1, in a frame with a label at both ends of each axis. `now` marks a place.
function plot(lines, caption, [left, right], [low, high], { now = null, dashed = true } = {}) {
  const x = (v) => (52 + 276 * v).toFixed(1), y = (v) => (110 - 100 * v).toFixed(1);
  const path = (points) => `M${points.map(([a, b]) => `${x(a)} ${y(b)}`).join("L")}`;
  const paths = lines.map((points, n) => (points.length ? `<path class="${n && dashed ? "second" : ""}" d="${path(points)}"/>` : ""));
  const figure = element("figure");
  figure.innerHTML = `<svg class="chart" viewBox="0 0 340 130" role="img" aria-label="${caption}"><path class="axis" d="M52 10V110H328"/>
    ${now === null ? "" : `<path class="now" d="M${x(now)} 10V110"/>`}${paths.join("")}
    <text x="46" y="17" text-anchor="end">${high}</text><text x="46" y="111" text-anchor="end">${low}</text>
    <text x="52" y="125">${left}</text><text x="328" y="125" text-anchor="end">${right}</text></svg>`;
  figure.append(element("figcaption", {}, caption));
  return figure;
}

function showSights() {
  const box = element("div", { class: "sights" }), { masks, ropes, biases, decays } = shown.sights;
  for (const mask of masks) {
    const figure = element("figure");
    figure.innerHTML = maskPicture(mask);
    figure.append(element("figcaption", {}, `${mask.name}, the first ${count(mask.length)} tokens`));
    box.append(figure);
  }
  box.append(...ropes.map(rotation), ...biases.map(bias), ...decays.map(decay));
  if (!box.childElementCount) box.append("Its mixers have no mask and no rotation: what a token sees is in their state.");
  $("sights").replaceChildren(box);
}

// `scaled` from 0 to 1 between the smallest and the largest of all values.
function within(lists) {
  const all = lists.flat(), low = Math.min(...all), high = Math.max(...all);
  return { low, high, scaled: (v) => (high > low ? (v - low) / (high - low) : 0.5) };
}

function rotation(rope) {
  const lists = [rope.plain, rope.scaled].filter(Boolean).map((list) => list.map(Math.log10)), { low, high, scaled } = within(lists);
  const lines = lists.map((list) => list.map((v, i) => [i / Math.max(1, list.length - 1), scaled(v)]));
  const caption = `RoPE: tokens for a full turn of each pair of channels, theta ${count(rope.theta)}${rope.scaled ? "; dashed: with its scaling" : ""}`;
  return plot(lines, caption, ["first pair", `pair ${rope.plain.length}`], [low, high].map((v) => units(10 ** v).trim()));
}

function bias({ caption, curves }) {
  const { low, high, scaled } = within(curves.map((points) => points.map(([, v]) => v))), last = curves[0].at(-1)[0];
  const lines = curves.map((points) => points.map(([distance, v]) => [distance / last, scaled(v)]));
  return plot(lines, caption, ["0", `${last} tokens back`], [low, high].map((v) => String(Number(v.toPrecision(2)))), { dashed: false });
}

// What is left of a state, exp(-rate n), over n from 1 to 2^16 tokens on a logarithmic axis.
function decay({ name, rates, distinct }) {
  const steps = [...Array(65).keys()].map((i) => i / 64);
  const lines = rates.map((rate) => steps.map((x) => [x, Math.exp(-rate * 2 ** (16 * x))]));
  const which = distinct > rates.length ? `${rates.length} of its ${count(distinct)} decays, from the slowest to the fastest` :
    distinct > 1 ? `a line for each of its ${distinct} decays` : rates[0] ? "all of it decays alike" : "nothing decays, so only writing changes it";
  return plot(lines, `${name}: what is left of its state after tokens of zeros, before training; ${which}`, ["1 token", "65,536 tokens"], ["0", "1"], { dashed: false });
}

function maskPicture(mask) {
  const cells = mask.rows.flatMap((row, y) => [...row].map((digit, x) => [Number(digit), x, y])).filter(([digit]) => digit);
  const levels = groups(cells, ([digit]) => digit);
  const paths = [...levels].map(([digit, list]) => `<path fill-opacity="${(digit / 9).toFixed(2)}" d="${list.map(([, x, y]) => `M${x} ${y}h1v1h-1z`).join("")}"/>`);
  return `<svg class="mask" viewBox="0 0 ${mask.rows.length} ${mask.rows.length}" role="img" aria-label="${mask.name}: queries from top to bottom, keys from left to right">${paths.join("")}</svg>`;
}

function showResults() {
  const tables = shown.results.map(({ page, title, head, rows: lines }) => {
    const table = rows(lines), link = element("a", { href: `../../${page}` }, page);
    if (head.length) table.prepend(element("thead", {}, element("tr", {}, ...head.map((name) => (name ? element("th", { scope: "col" }, name) : element("td"))))));
    return element("div", { class: "result" }, element("p", { class: "small" }, title ? `${title}: ` : "", link), element("div", { class: "rolling", tabindex: "0", role: "region", "aria-label": title || page }, table));
  });
  const printed = element("pre", { tabindex: "0", "aria-label": "Costs as training prints them" }, shown.costs.printed.join("\n"));
  const note = element("p", { class: "small" }, "As a training script prints it, with fp32 weights:");
  $("results").replaceChildren(...(tables.length ? tables : [element("p", { class: "small" }, "No results are recorded for it yet.")]), note, printed);
}

function showWhere() {
  const { source, command, tests } = shown.where, picture = `python -m llm.gallery ${shown.name}${versus ? ` --vs ${versus.name}` : ""} --out ${shown.name}.svg`;
  const file = (path) => element("a", { href: `../../${path}` }, path);
  const tested = element("span", {});
  tests.forEach((path, i) => tested.append(i ? ", " : "", file(path)));
  $("where").replaceChildren(rows([["source", file(source)], ["tests", tested],
    ...(command ? [["train", element("code", {}, command)]] : []), ["this picture", element("code", {}, picture)]]));
}

function showConfig() {
  const names = [...new Set([...Object.keys(shown.config), ...Object.keys(versus?.config ?? {})])];
  const value = (m, name) => (name in m.config ? text(m.config[name]) : "–");
  const models = versus ? [shown, versus] : [shown];
  const table = rows(names.map((name) => [name, ...models.map((m) => value(m, name))]), (_, [a, b]) => versus && a !== b);
  $("config").replaceChildren(versus ? titled(table, shown.name, versus.name) : table);
}

// --- light and dark

const THEMES = ["auto", "light", "dark"];
const darkSystem = matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";
try { theme = localStorage.getItem("gallery-theme") ?? "auto"; } catch { /* a browser may forbid storage to files */ }

function paint(chosen = theme) {
  document.documentElement.className = chosen === "auto" ? (darkSystem.matches ? "dark" : "light") : chosen;
  $("theme").textContent = `Theme: ${theme}`;
}

$("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  try { localStorage.setItem("gallery-theme", theme); } catch { /* see above */ }
  paint();
});
darkSystem.addEventListener("change", () => paint());
addEventListener("beforeprint", () => paint("light"));
addEventListener("afterprint", () => paint());
paint();
start();
