// Put into a page by a test: walks through all moments with the keyboard and notes what the page shows.
addEventListener("load", () => {
  const press = (key, more = {}) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, ...more }));
  const data = (root, selector, read) => Array.from(root.querySelectorAll(selector), (node) => read(node.dataset, node));
  const panes = () => Array.from(document.querySelectorAll("[data-pane]"));
  const cells = (pane, name) => data(pane, "td", (set) => [Number(set.layer), Number(set.head), set[name]]);
  const numbers = (pane) => Object.fromEntries(data(pane, "[data-number]", (set) => [set.number, Number(set.value)]));
  const measure = (metric) => {
    const menu = document.getElementById("metric-0");
    menu.value = metric;
    menu.dispatchEvent(new Event("change"));
    return panes().map((pane) => cells(pane, "value"));
  };
  const click = (token) => document.querySelector(`[data-pane="0"] [data-token="${token}"]`).click();
  const look = (token, metrics) => {
    const seen = {
      hash: location.hash,
      moment: { ...document.getElementById("moment").dataset },
      overlap: document.getElementById("overlap").dataset.overlap,
      numbers: panes().map(numbers),
      counts: panes().map((pane) => data(pane, "[data-token]", (set) => Number(set.count))),
      values: Object.fromEntries(metrics.map((metric) => [metric, measure(metric)])),
    };
    measure("age");
    click(token);
    seen.until = panes().map((pane) => cells(pane, "until"));
    seen.held = panes().map((pane) => cells(pane, "held"));
    seen.chosenHash = location.hash;
    press("Escape");
    return seen;
  };
  const walk = () => {
    if (document.documentElement.dataset.ready !== "true") return setTimeout(walk, 20);
    const { metrics, tokens } = WALK;
    const last = Number(document.getElementById("slider").max);
    press("Home");
    const seen = [];
    for (let moment = 0; moment <= last; moment++) {
      seen.push(look(tokens[moment % tokens.length], metrics));
      press("ArrowRight");
    }
    press("ArrowRight");
    const note = document.createElement("pre");
    note.id = "walk";
    note.textContent = JSON.stringify({ seen, end: location.hash });
    document.body.append(note);
  };
  walk();
});
