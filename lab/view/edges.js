// Edge editor: rows read, columns are read. Painted cells are shown at once; Python answers with how all cells stand.
const NO_EDGE = 0, ALLOWED = 1, PARTLY = 2, BLOCKED = 3;
const SIGN = ["", "·", "◐", "×"];
const SAID = ["no edge", "allowed", "partly blocked", "blocked"];

function render({ model, el }) {
  const root = open(el, "vl-edges", "Edge editor: which segments may read which");
  const title = make("div", { class: "vl-title" });
  const said = make("div", { class: "vl-said", role: "status", "aria-live": "polite" });
  const count = make("span", { class: "vl-count", "aria-live": "polite" });
  const error = make("div", { class: "vl-error", role: "alert" });
  const undo = button("Undo", "↶", () => send("undo")), redo = button("Redo", "↷", () => send("redo"));
  const reset = button("Reset", "Reset", () => send("reset"));
  const apply = button("Apply", "Apply", () => send("apply"));
  apply.classList.add("vl-main");
  const mode = make("select", { "aria-label": "What painting does" },
    ...[["toggle", "toggle"], ["block", "block ×"], ["allow", "allow ·"]].map(([v, t]) => make("option", { value: v }, t)));
  const first = make("input", { type: "number", min: 1, class: "vl-layer", "aria-label": "First layer of the brush" });
  const last = make("input", { type: "number", min: 1, class: "vl-layer", "aria-label": "Last layer of the brush" });
  const heads = make("div", { class: "vl-heads", role: "group", "aria-label": "Heads of the brush; none pressed: all" });
  const preset = make("select", { "aria-label": "Preset", class: "vl-preset" });
  const table = make("table", { class: "vl-grid", role: "grid", "aria-label": "Rows read, columns are read; Space or Enter paints, Shift and arrows choose more" });
  root.append(
    title,
    make("div", { class: "vl-row" }, labelled("paint", mode), labelled("layers", first), labelled("to", last), labelled("heads", heads), labelled("preset", preset)),
    make("div", { class: "vl-scroll" }, table),
    make("div", { class: "vl-row" }, undo, redo, reset, count, apply),
    said, error,
  );

  let cells = new Uint8Array(0), tds = [], focus = [0, 0], anchor = null, dragging = null, brush = new Set();
  const names = () => model.get("names"), labels = () => model.get("labels");
  function send(what, more = {}) { model.send({ do: what, ...more }); }

  function build() {
    const all = labels(), n = all.length;
    tds = [];
    const corner = make("th", {}, button("Choose every cell", "all", () => paint(rect([0, 0], [n - 1, n - 1]))));
    const head = make("tr", {}, corner, ...all.map((name, k) => make("th", { scope: "col" }, button(`Column: ${name} is read by all`, name, () => paint(rect([0, k], [n - 1, k]))))));
    const body = all.map((name, q) => {
      tds.push(all.map((_, k) => make("td", { role: "gridcell", tabindex: -1, "data-q": q, "data-k": k })));
      return make("tr", {}, make("th", { scope: "row" }, button(`Row: ${name} reads all`, name, () => paint(rect([q, 0], [q, n - 1])))), ...tds[q]);
    });
    table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
    root.style.setProperty("--vl-cell", n > 24 ? "16px" : "22px");
    preset.replaceChildren(make("option", { value: "" }, "choose …"), ...model.get("presets").map((p) => make("option", { value: p }, p)));
    heads.replaceChildren(...Array.from({ length: model.get("n_heads") }, (_, h) => button(`Head ${h}`, String(h), () => toggleHead(h))));
    first.max = last.max = model.get("n_layers");
    load();
  }

  function load() {
    cells = numbers(model.get("cells"), Uint8Array).slice();
    if (said.textContent) tell(...focus);
    ask();
  }

  function draw() {
    const n = names().length, pair = model.get("pair");
    for (let q = 0; q < n; q++) {
      for (let k = 0; k < n; k++) {
        const td = tds[q]?.[k], state = cells[q * n + k] ?? NO_EDGE;
        if (!td) continue;
        const chosen = pair && pair[0] === names()[q] && pair[1] === names()[k];
        const now = `vl-c${state}${brush.has(q * n + k) ? " vl-brushed" : ""}${chosen ? " vl-chosen" : ""}`;
        if (td.className !== now) {
          td.className = now; td.textContent = SIGN[state];
          td.setAttribute("aria-label", `${labels()[q]} reads ${labels()[k]}: ${SAID[state]}`);
        }
        td.tabIndex = q === focus[0] && k === focus[1] ? 0 : -1;
      }
    }
    title.textContent = model.get("title");
    count.textContent = model.get("count");
    error.textContent = model.get("error");
    undo.disabled = !model.get("can_undo"); redo.disabled = !model.get("can_redo");
    apply.setAttribute("aria-busy", String(model.get("busy")));
    [first, last].forEach((input, i) => { if (document.activeElement !== input) input.value = model.get("layers")[i]; });
    const on = new Set(model.get("heads"));
    [...heads.children].forEach((b, h) => b.setAttribute("aria-pressed", String(on.has(h))));
  }
  const ask = painter(root, draw);

  function rect(a, b) {
    const found = [];
    for (let q = Math.min(a[0], b[0]); q <= Math.max(a[0], b[0]); q++) {
      for (let k = Math.min(a[1], b[1]); k <= Math.max(a[1], b[1]); k++) found.push([q, k]);
    }
    return found;
  }

  // What Python will say is shown before it says it.
  function paint(chosen) {
    const n = names().length, some = chosen.filter(([q, k]) => cells[q * n + k] !== NO_EDGE);
    if (!some.length) { said.textContent = "these cells have no edge: a key stands after its query"; return; }
    const how = mode.value, all = some.every(([q, k]) => cells[q * n + k] === BLOCKED);
    const to = how === "allow" || (how === "toggle" && all) ? ALLOWED : BLOCKED;
    for (const [q, k] of some) cells[q * n + k] = to;
    ask();
    tell(...focus);
    send("paint", { cells: some, how });
  }

  function choose(q, k) {
    focus = [q, k];
    model.set("pair", [names()[q], names()[k]]);
    model.save_changes();
    tell(q, k);
    ask();
  }
  function tell(q, k) {
    const n = names().length;
    said.textContent = `${labels()[q]} reads ${labels()[k]}: ${SAID[cells[q * n + k]]} in layers ${first.value}–${last.value}`;
  }
  function cell(event) {
    const td = document.elementFromPoint(event.clientX, event.clientY)?.closest?.("td[data-q]");
    return td && table.contains(td) ? [Number(td.dataset.q), Number(td.dataset.k)] : null;
  }
  function brushed(a, b) { const n = names().length; brush = new Set(rect(a, b).map(([q, k]) => q * n + k)); ask(); }

  table.addEventListener("pointerdown", (e) => {
    const at = e.button === 0 && cell(e);
    if (!at) return;
    e.preventDefault();
    dragging = anchor = at;
    brushed(at, at);
    choose(...at);
    tds[at[0]][at[1]].focus({ preventScroll: true });
  });
  function moved(e) {
    const at = cell(e);
    if (!at) return;
    if (dragging) { brushed(dragging, at); focus = at; } else tell(...at);
  }
  function dropped(e) {
    if (!dragging) return;
    const to = cell(e) ?? focus, from = dragging;
    dragging = null; brush = new Set();
    paint(rect(from, to));
  }
  table.addEventListener("pointermove", moved);
  document.addEventListener("pointerup", dropped);

  root.addEventListener("keydown", (event) => {
    const key = event.key.toLowerCase(), typing = ["INPUT", "SELECT"].includes(event.target.tagName);
    if ((event.ctrlKey || event.metaKey) && (key === "z" || key === "y") && event.target.tagName !== "INPUT") {
      event.preventDefault();
      send(key === "y" || event.shiftKey ? "redo" : "undo");
      return;
    }
    if (typing || event.target.tagName === "BUTTON") return;
    const n = names().length, move = ARROWS[event.key];
    if (move) {
      event.preventDefault();
      const to = [Math.min(n - 1, Math.max(0, focus[0] + move[0])), Math.min(n - 1, Math.max(0, focus[1] + move[1]))];
      if (!event.shiftKey) anchor = null; else anchor = anchor ?? focus;
      choose(...to);
      if (anchor) brushed(anchor, to); else { brush = new Set(); }
      tds[to[0]][to[1]].focus();
    } else if (key === " " || key === "enter") {
      event.preventDefault();
      paint(anchor ? rect(anchor, focus) : [focus]);
      anchor = null; brush = new Set();
    }
  });

  function layersTyped() { send("brush", { layers: [parseInt(first.value) || 0, parseInt(last.value) || 0] }); }
  first.addEventListener("change", layersTyped);
  last.addEventListener("change", layersTyped);
  function toggleHead(h) {
    const on = new Set(model.get("heads"));
    if (on.has(h)) on.delete(h); else on.add(h);
    send("brush", { heads: [...on] });
  }
  preset.addEventListener("change", () => { if (preset.value) send("preset", { name: preset.value }); preset.value = ""; });

  model.on("change:names change:labels change:presets change:n_heads change:n_layers", build);
  model.on("change:cells", load);
  model.on("change:layers change:heads change:count change:error change:can_undo change:can_redo change:busy change:pair change:title", ask);
  build();
  const stop = follow(root, ask);
  return () => { stop(); document.removeEventListener("pointerup", dropped); };
}

export default { render };
