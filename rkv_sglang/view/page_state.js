"use strict";

// The state of the page, how it is changed, and what both traces share.

const PLAY_MS = 700;

function colours() {
  const style = getComputedStyle(document.documentElement);
  const rgb = (name) => {
    const value = style.getPropertyValue(name).trim();
    return [1, 3, 5].map((start) => parseInt(value.slice(start, start + 2), 16));
  };
  const steps = Array.from({ length: STEPS }, (_, index) => rgb(`--s${index + 1}`));
  return { future: rgb("--card"), steps: [rgb("--gone-map"), ...steps] };
}

function metricMenu(index) {
  const menu = element("select", { "aria-label": "Figure in the heat map", id: `metric-${index}` });
  for (const name of metricNames()) menu.append(element("option", { value: name }, METRICS[name].label));
  menu.value = state.metric;
  menu.addEventListener("change", () => {
    go({ metric: menu.value });
    document.getElementById(`metric-${index}`).focus();
  });
  return menu;
}

/** Two traces of one shape can be compared; others, and one alone, cannot. */
function comparable() {
  return caches.length === 2 && caches[0].layers === caches[1].layers && caches[0].heads === caches[1].heads;
}

function metricNames() {
  return Object.keys(METRICS).filter((name) => name !== "overlap" || comparable());
}

function momentName(index) {
  if (index === 0) return moments.length === 1 ? "never compacted" : "before the first compaction";
  const [first, ...others] = moments[index].compactions;
  return others.length ? `at ${moments[index].length} tokens` : `after compaction ${first} of ${moments.length - 1}`;
}

function renderMoment() {
  const { length, compactions } = moments[state.moment];
  const output = document.getElementById("moment");
  output.dataset.moment = state.moment;
  output.dataset.length = length;
  const name = momentName(state.moment);
  const seen = caches[0].subject === "answer" ? "generated" : `of the ${caches[0].subject}`;
  const more = caches.length === 1 || state.moment === 0
    ? `${length} tokens ${seen}` : `compactions ${compactions.join(" and ")}`;
  output.replaceChildren(element("b", {}, name[0].toUpperCase() + name.slice(1)), `, ${more}`);
  slider.value = state.moment;
  slider.setAttribute("aria-valuetext", `${name}, ${more}`);
}

function renderOverlap() {
  const box = document.getElementById("overlap");
  if (caches.length < 2) return;
  box.hidden = false;
  if (!comparable()) {
    box.textContent = "The traces have different layers or KV heads, so their kept sets have no overlap to show.";
    return;
  }
  const found = overlaps(moments[state.moment]);
  const sum = (key) => found.reduce((total, entry) => total + entry[key], 0);
  const part = sum("both") / sum("either");
  box.dataset.common = common;
  box.dataset.overlap = Number.isFinite(part) ? part : "";
  const share = Number.isFinite(part) ? `${(100 * part).toFixed(1)}%` : "none";
  box.replaceChildren("Overlap ", element("b", {}, share),
    `: of what either trace holds, the share that both hold, over all pairs and the ${common} tokens with which both ` +
    "traces start (a bar marks where they part).");
}

function render() {
  const values = panes.map((pane) => heat[state.metric](pane.cache, moments[state.moment], pane.compaction()));
  const finite = values.flat().filter(Number.isFinite);
  // One scale for both panes, so that their colours compare.
  const range = finite.length
    ? finite.reduce(({ low, high }, value) => ({ low: Math.min(low, value), high: Math.max(high, value) }),
      { low: Infinity, high: -Infinity })
    : { low: 0, high: 0 };
  renderMoment();
  renderOverlap();
  panes.forEach((pane, index) => pane.render(values[index], range));
}

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const number = (key, least, most, otherwise) => {
    const text = given.get(key);
    return text !== null && /^\d+$/.test(text) ? Math.min(most, Math.max(least, Number(text))) : otherwise;
  };
  const longest = Math.max(...caches.map((cache) => cache.length));
  return {
    moment: number("c", 0, moments.length - 1, moments.length - 1),
    token: number("t", 0, longest - 1, null),
    metric: metricNames().includes(given.get("m")) ? given.get("m") : "age",
  };
}

function writeHash() {
  const parts = [`c=${state.moment}`];
  if (state.token !== null) parts.push(`t=${state.token}`);
  if (state.metric !== "age") parts.push(`m=${state.metric}`);
  history.replaceState(null, "", `#${parts.join("&")}`);
}

/** Change the state and show it. */
function go(change) {
  state = { ...state, ...change };
  state.moment = Math.min(moments.length - 1, Math.max(0, state.moment));
  writeHash();
  render();
}

function moveToken(by) {
  if (state.token === null) return;
  const longest = Math.max(...caches.map((cache) => cache.length));
  go({ token: Math.min(longest - 1, Math.max(0, state.token + by)) });
}

function togglePlay() {
  const button = document.getElementById("play");
  if (playing !== null) {
    clearInterval(playing);
    playing = null;
  } else {
    if (state.moment === moments.length - 1) go({ moment: 0 });
    playing = setInterval(() => {
      go({ moment: state.moment + 1 });
      if (state.moment === moments.length - 1) togglePlay();
    }, PLAY_MS);
  }
  button.textContent = playing === null ? "Play" : "Pause";
  button.setAttribute("aria-pressed", String(playing !== null));
}

function onKey(event) {
  if (event.target.matches?.("select") || event.ctrlKey || event.altKey || event.metaKey) return;
  const actions = {
    ArrowLeft: () => (event.shiftKey ? moveToken(-1) : go({ moment: state.moment - 1 })),
    ArrowRight: () => (event.shiftKey ? moveToken(1) : go({ moment: state.moment + 1 })),
    Home: () => go({ moment: 0 }),
    End: () => go({ moment: moments.length - 1 }),
    Escape: () => go({ token: null }),
    " ": togglePlay,
  };
  // A button or summary in focus takes the space bar itself.
  if (!(event.key in actions) || (event.key === " " && event.target.matches?.("button, summary"))) return;
  event.preventDefault();
  actions[event.key]();
}

function makeLegend() {
  const ramp = element("span", { class: "ramp" });
  for (let index = 1; index < STEPS; index++) ramp.append(element("i", { class: `s${index}` }));
  const legend = document.getElementById("legend");
  legend.setAttribute("aria-label",
    "Legend: struck out, held by no pair; light to dark, by few to most; darkest, by all; grey, not generated yet");
  legend.append(element("span", { class: "s0" }, "none"), "few", ramp, "most", element("span", { class: `s${STEPS}` }, "all pairs"),
    element("span", { class: "future" }, "not yet"));
}

function listen() {
  slider.max = moments.length - 1;
  slider.disabled = moments.length === 1;
  slider.addEventListener("input", () => go({ moment: Number(slider.value) }));
  document.getElementById("back").addEventListener("click", () => go({ moment: state.moment - 1 }));
  document.getElementById("forward").addEventListener("click", () => go({ moment: state.moment + 1 }));
  document.getElementById("play").addEventListener("click", togglePlay);
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => {
    state = readHash();
    render();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => panes.forEach((pane) => pane.drawHistory()));
}

const slider = document.getElementById("slider");
let caches, moments, common, panes, state;
let playing = null;

async function main() {
  const raws = JSON.parse(document.getElementById("data").textContent);
  caches = await Promise.all(raws.map(async (raw) => new Cache(raw, await Promise.all(raw.epochs.map(readLives)))));
  moments = allMoments();
  common = commonStart();
  state = readHash();
  panes = caches.map((cache, index) => new Pane(cache, index));
  document.title = `${caches.map((cache) => `${cache.policy} ${cache.budget}`).join(" | ")}: KV cache view`;
  const main = document.getElementById("panes");
  main.className = caches.length === 1 ? "one" : "two";
  main.append(...panes.map((pane) => pane.root));
  makeLegend();
  listen();
  render();
  panes.forEach((pane) => pane.drawHistory());
  document.documentElement.dataset.ready = "true";
}

main();
