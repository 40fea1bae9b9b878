"use strict";

// One trace on the page.

const STEPS = 8;
const MOST_BINS = 1600;
const MOST_NUMBERED_LAYERS = 40;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function step(count, pairs) {
  if (count <= 0) return 0;
  return count === pairs ? STEPS : 1 + Math.floor((count / pairs) * (STEPS - 1));
}

/** A token's text so that blanks and line ends can be seen and clicked. */
function shown(text) {
  return text === "" ? "\u00b7" : text.replaceAll("\n", "\u21b5\n");
}

/** One trace on the page. */
class Pane {
  constructor(cache, index) {
    this.cache = cache;
    this.index = index;
    this.root = document.getElementById("pane").content.firstElementChild.cloneNode(true);
    this.root.dataset.pane = index;
    this.fillAbout();
    this.makeNumbers();
    this.makeTable();
    this.makeTokens();
    this.makeHistory();
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  fillAbout() {
    const { cache } = this;
    // Of a path or a hub's name the last part says which model it is.
    this.find("h2").textContent = `${cache.model.split("/").findLast(Boolean) ?? "?"}, ${cache.policy}`;
    this.find("h2").title = cache.model;
    const rank = cache.tp_size > 1 ? ` of the first of ${cache.tp_size} ranks` : "";
    const pairs = `${cache.layers} layers x ${cache.heads} KV heads${rank} = ${cache.pairs} pairs`;
    if (cache.subject !== "answer") {
      this.find(".settings").textContent = `of the ${cache.length} tokens of the ${cache.subject} each pair keeps ` +
        `${cache.budget}, the last ${cache.window} among them; ${pairs}`;
      this.find("details").remove();
      return;
    }
    this.find(".settings").textContent =
      `budget ${cache.budget}, buffer ${cache.buffer}, window ${cache.window} tokens; ${pairs}; ` +
      `${cache.prompt_len} prompt tokens (always kept), ${cache.length} generated, ${cache.totals.length} compactions`;
    this.find("summary").textContent = `Prompt: ${cache.prompt_len} tokens, always kept`;
    this.find("details pre").textContent = cache.prompt;
  }

  makeNumbers() {
    const names = { generated: this.cache.subject === "answer" ? "generated" : "tokens", held: "held per pair",
      evicted: "evicted per pair", all: "kept by all pairs", none: "kept by no pair" };
    for (const [name, label] of Object.entries(names)) {
      this.find(".numbers").append(
        element("div", {}, element("dt", {}, label), element("dd", { "data-number": name })));
    }
  }

  makeTable() {
    const { layers, heads } = this.cache;
    const table = this.find(".heat table");
    table.style.setProperty("--cell", `${Math.max(9, Math.min(22, Math.floor(220 / heads)))}px`);
    table.append(element("colgroup", {}, element("col", { class: "name" }), element("col", { span: layers })));
    const every = layers > 50 ? 10 : 5;
    const top = element("tr", {}, element("th", { scope: "row" }, "layer"));
    for (let layer = 0; layer < layers; layer++) {
      top.append(element("th", { scope: "col" }, layer % every ? "" : String(layer)));
    }
    table.append(element("thead", {}, top), element("tbody"));
    this.cells = new Array(this.cache.pairs);
    for (let head = 0; head < heads; head++) {
      const row = element("tr", {}, element("th", { scope: "row" }, `head ${head}`));
      for (let layer = 0; layer < layers; layer++) {
        const cell = element("td", { "data-layer": layer, "data-head": head });
        this.cells[layer * heads + head] = cell;
        row.append(cell);
      }
      table.tBodies[0].append(row);
    }
    table.addEventListener("pointerover", (event) => {
      if (event.target.title) this.find(".readout").textContent = event.target.title;
    });
  }

  makeTokens() {
    const box = this.find(".tokens");
    this.spans = this.cache.tokens.map((text, token) => element("span", { "data-token": token }, shown(text)));
    box.append(...this.spans);
    // A mark where the other answer goes its own way.
    if (caches.length === 2 && common < this.spans.length) this.spans[common].dataset.fork = "";
    const tokenOf = (event) => event.target.dataset.token;
    box.addEventListener("click", (event) => {
      if (tokenOf(event) === undefined) return;
      const token = Number(tokenOf(event));
      go({ token: token === state.token ? null : token });
    });
    box.addEventListener("pointerover", (event) => {
      if (tokenOf(event) !== undefined) this.find(".hover").textContent = this.describe(Number(tokenOf(event)));
    });
  }

  makeHistory() {
    this.find(".history figcaption").textContent =
      "All moments at once: tokens from left to right, compactions from top to bottom";
    const canvas = this.find("canvas");
    canvas.setAttribute("aria-label", "For every moment and token, the share of pairs that hold it");
    canvas.width = Math.min(this.cache.length, MOST_BINS);
    canvas.height = moments.length;
    canvas.style.height = `${Math.max(24, Math.min(160, 14 * moments.length))}px`;
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      const part = (at, from, size) => Math.min(0.9999, Math.max(0, (at - from) / size));
      go({
        moment: Math.floor(part(event.clientY, box.top, box.height) * moments.length),
        token: Math.floor(part(event.clientX, box.left, box.width) * this.cache.length),
      });
    });
  }

  compaction() {
    return moments[state.moment].compactions[this.index];
  }

  describe(token) {
    const moment = moments[state.moment];
    const count = this.cache.count(token, this.compaction(), this.cache.generated(moment));
    const told = count < 0 ? "not generated yet" : `held by ${count} of ${this.cache.pairs} pairs`;
    return `token ${token} ${JSON.stringify(this.cache.tokens[token])}: ${told}`;
  }

  /** Colours of every moment and token, once: the mean share over the tokens of a pixel. */
  drawHistory() {
    const { cache } = this;
    const canvas = this.find("canvas");
    const palette = colours();
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    moments.forEach((moment, row) => {
      const compaction = moment.compactions[this.index];
      const length = cache.generated(moment);
      for (let bin = 0; bin < canvas.width; bin++) {
        const from = Math.floor((bin * cache.length) / canvas.width);
        const to = Math.max(from + 1, Math.floor(((bin + 1) * cache.length) / canvas.width));
        let sum = 0, seen = 0;
        for (let token = from; token < Math.min(to, length); token++, seen++) sum += cache.count(token, compaction, length);
        const colour = seen === 0 ? palette.future : palette.steps[step(sum, seen * cache.pairs)];
        image.data.set([...colour, 255], 4 * (row * canvas.width + bin));
      }
    });
    context.putImageData(image, 0, 0);
  }

  render(values, range) {
    this.renderNumbers();
    this.renderTokens();
    this.renderMarks();
    this.renderHeat(values, range);
    this.renderToken();
  }

  renderNumbers() {
    const found = numbers(this.cache, moments[state.moment], this.compaction());
    for (const [name, value] of Object.entries(found)) {
      const box = this.find(`[data-number="${name}"]`);
      box.dataset.value = value;
      box.replaceChildren(String(value));
      if (name !== "generated") box.append(element("small", {}, ` ${((100 * value) / found.generated).toFixed(1)}%`));
    }
  }

  renderTokens() {
    const length = this.cache.generated(moments[state.moment]);
    this.spans.forEach((span, token) => {
      const count = this.cache.count(token, this.compaction(), length);
      const look = count < 0 ? "future" : `s${step(count, this.cache.pairs)}`;
      span.className = token === state.token ? `${look} selected` : look;
      span.dataset.count = count;
    });
    this.find(".hover").textContent = "";
  }

  renderMarks() {
    const now = this.find(".now").style;
    now.top = `${(100 * state.moment) / moments.length}%`;
    now.height = `${100 / moments.length}%`;
    const chosen = this.find(".chosen");
    chosen.hidden = state.token === null || state.token >= this.cache.length;
    chosen.style.left = `${(100 * ((state.token ?? 0) + 0.5)) / this.cache.length}%`;
  }

  renderHeat(values, range) {
    const chosen = state.token !== null && state.token < this.cache.length;
    this.find(".heat table").classList.toggle("by-token", chosen);
    this.find(".readout").textContent = "Point at a cell to read it.";
    if (chosen) this.renderLives();
    else this.renderMetric(values, range);
  }

  renderMetric(values, range) {
    const metric = METRICS[state.metric];
    this.cells.forEach((cell, pair) => {
      const value = values[pair];
      cell.className = "";
      cell.textContent = "";
      delete cell.dataset.until;
      delete cell.dataset.held;
      cell.dataset.value = Number.isFinite(value) ? value : "";
      cell.title = `layer ${cell.dataset.layer}, head ${cell.dataset.head}: ` +
        (Number.isFinite(value) ? metric.text(value) : "nothing to compare");
      const part = range.high > range.low ? (value - range.low) / (range.high - range.low) : 0;
      cell.style.setProperty("--part", `${Number.isFinite(part) ? 100 * part : 0}%`);
    });
    this.find(".what").replaceChildren("Heat map: ", metricMenu(this.index));
    this.find(".scale").replaceChildren(
      metric.text(range.low), element("span", { class: "bar" }), metric.text(range.high), element("span", {}, metric.explain));
  }

  renderLives() {
    const { cache } = this;
    const compaction = this.compaction();
    const generated = state.token < cache.generated(moments[state.moment]);
    this.cells.forEach((cell, pair) => {
      const until = cache.until(state.token, pair, compaction);
      const held = generated && cache.holds(state.token, pair, compaction);
      cell.className = !generated ? "future" : !held ? "" : until ? "held" : "held last";
      cell.dataset.until = until || "";
      cell.dataset.held = Number(held);
      delete cell.dataset.value;
      cell.textContent = until && cache.layers <= MOST_NUMBERED_LAYERS ? String(until) : "";
      cell.title = `layer ${cell.dataset.layer}, head ${cell.dataset.head}: ` +
        (until ? `evicted by compaction ${until}, at ${cache.total(until)} tokens` : "held to the end");
    });
    const key = (style, label) => element("span", {}, element("i", { class: `key ${style}` }), ` ${label}`);
    this.find(".what").textContent = `Which pairs hold token ${state.token}`;
    this.find(".scale").replaceChildren(
      key("s7", "holds it to the end"), key("s3", "holds it, until that compaction"), key("s0", "has evicted it, by that compaction"));
  }

  renderToken() {
    const box = this.find(".token-info");
    box.replaceChildren();
    const { cache } = this;
    if (state.token === null || state.token >= cache.length) {
      box.append(state.token === null ? "No token selected." : `There is no token ${state.token} here.`);
      return;
    }
    const close = element("button", { "aria-label": "Select no token", title: "Select no token (Esc)" }, "\u00d7");
    close.addEventListener("click", () => go({ token: null }));
    const name = element("code", {}, shown(cache.tokens[state.token]).trimEnd() || "\u2423");
    box.append(element("h3", {}, `Token ${state.token}`, name, `id ${cache.ids[state.token]}`, close));
    const told = moments.map((moment) =>
      cache.count(state.token, moment.compactions[this.index], cache.generated(moment)));
    const gone = told.findIndex((count) => count === 0);
    const now = told[state.moment];
    const final = told[told.length - 1];
    const status = now < 0 ? "Not generated at this moment." : `Held by ${now} of ${cache.pairs} pairs now`;
    const end = gone >= 0 && final === 0
      ? `; no pair holds it after compaction ${moments[gone].compactions[this.index]}.`
      : `; ${Math.max(final, 0)} hold it after the last compaction.`;
    box.append(element("p", { "data-held-by": now }, now < 0 ? status : status + end));
    box.append(this.bars(told), element("small", {}, "Pairs that hold it, from the first compaction to the last."));
  }

  /** For the selected token, how many pairs hold it, moment by moment. */
  bars(told) {
    const bars = element("div", { class: "bars", role: "img", "aria-label": "Pairs that hold the token, by moment" });
    told.forEach((count, index) => {
      const bar = element("i", { title: `${momentName(index)}: ${count < 0 ? "not generated" : `${count} pairs`}` });
      bar.style.setProperty("--part", `${(100 * Math.max(count, 0)) / this.cache.pairs}%`);
      bar.className = index === state.moment ? "current" : count <= 0 ? "none" : "";
      bar.addEventListener("click", () => go({ moment: index }));
      bars.append(bar);
    });
    return bars;
  }
}
