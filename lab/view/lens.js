// Logit-lens table: rows are layers (the last one on top), columns are tokens, cells say the best word there.
function render({ model, el }) {
  const root = open(el, "vl-lens", "Logit lens: the best word at each layer and token");
  const title = make("div", { class: "vl-title" });
  const badge = make("span", { class: "vl-badge" });
  const table = make("table", { class: "vl-lens-table", role: "grid" });
  const best = make("table", { class: "vl-best", "aria-label": "Best words of the chosen cell" });
  const said = make("div", { class: "vl-said", role: "status", "aria-live": "polite" });
  const word = make("select", { "aria-label": "Word whose rank is followed" });
  const side = make("div", {}, said, best);
  root.append(title, make("div", { class: "vl-row" }, badge, labelled("follow", word)),
    make("div", { class: "vl-lens-panes" }, make("div", { class: "vl-scroll" }, table), side));

  let tds = [], p = new Float32Array(0), ranks = new Int32Array(0), hover = null, focus = null;
  const layers = () => model.get("layers"), columns = () => model.get("columns");
  const top = () => model.get("top");
  function at(i, j) { return (i * columns().length + j) * top(); }

  function build() {
    const n = layers().length;
    p = numbers(model.get("p"), Float32Array);
    ranks = numbers(model.get("ranks"), Int32Array);
    tds = layers().map((layer, i) => columns().map((c, j) => make("td", { role: "gridcell", tabindex: -1, "data-i": i, "data-j": j })));
    const head = make("tr", {}, make("th", { scope: "col" }, "layer"), ...columns().map((c) => make("th", { scope: "col", title: c }, c)));
    const rows = tds.map((row, i) => make("tr", {}, make("th", { scope: "row" }, String(layers()[i])), ...row)).reverse();
    table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
    word.replaceChildren(make("option", { value: "" }, "no word: best ones"), ...model.get("words").map((w) => make("option", { value: w }, w)));
    if (focus && (focus[0] >= n || focus[1] >= columns().length)) focus = null;
    ask();
  }

  function rank(i, j) {
    const w = model.get("words").indexOf(model.get("followed"));
    return w < 0 ? 0 : ranks[(w * layers().length + i) * columns().length + j];
  }

  // 1 is the top of the scale; beyond rank 1000 all are at its lower end.
  function share(i, j) {
    const r = rank(i, j);
    return r > 0 ? 1 - Math.min(1, Math.log10(r) / 3) : p[at(i, j)];
  }

  function draw() {
    const colours = numbers(model.get("colours"), Uint8Array), steps = colours.length / 4, texts = model.get("texts");
    const followed = model.get("followed"), layer = model.get("layer"), token = model.get("token"), tokens = model.get("tokens");
    for (let i = 0; i < tds.length; i++) {
      for (let j = 0; j < columns().length; j++) {
        const td = tds[i][j], s = step(share(i, j), 0, 1, steps), [r, g, b] = s < 0 ? [128, 128, 128] : colours.slice(4 * s, 4 * s + 3);
        td.style.background = `rgb(${r} ${g} ${b})`;
        td.style.color = 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#000" : "#fff";
        td.textContent = rank(i, j) ? `#${rank(i, j)}` : texts[at(i, j)] || "·";
        td.className = layers()[i] === layer && (token === null || tokens[j] === token) ? "vl-chosen" : "";
        td.setAttribute("aria-label", `layer ${layers()[i]}, ${columns()[j]}: ${td.textContent}`);
        td.tabIndex = focus && focus[0] === i && focus[1] === j ? 0 : -1;
      }
    }
    if (!focus && tds.length && tds[0].length) tds[tds.length - 1][0].tabIndex = 0;
    title.textContent = followed ? `Rank of "${followed}" (1: the most probable word)` : model.get("title");
    badge.textContent = model.get("mode");
    word.value = followed;
    list(hover ?? cellOf(layer, token));
  }
  const ask = painter(root, draw);

  function cellOf(layer, token) {
    const i = layers().indexOf(layer), j = token === null ? 0 : model.get("tokens").indexOf(token);
    return i >= 0 && j >= 0 ? [i, j] : null;
  }

  function list(cell) {
    if (!cell || !columns().length) { best.replaceChildren(); said.textContent = columns().length ? "point at a cell" : "no tokens chosen"; return; }
    const [i, j] = cell, texts = model.get("texts"), known = new Set(model.get("words"));
    said.textContent = `layer ${layers()[i]}, ${columns()[j]}`;
    best.replaceChildren(...Array.from({ length: top() }, (_, k) => {
      const text = texts[at(i, j) + k];
      const follow = known.has(text) ? button(`Follow ${text}`, "follow", () => put({ followed: text })) : "";
      return make("tr", {}, make("td", {}, `${k + 1}`), make("td", {}, text || "·"), make("td", {}, short(p[at(i, j) + k])), make("td", {}, follow));
    }));
  }

  function put(changes) {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
    ask();
  }
  function choose(i, j) { focus = [i, j]; hover = null; put({ layer: layers()[i], token: model.get("tokens")[j] }); }
  function under(event) {
    const td = event.target.closest?.("td[data-i]");
    return td ? [Number(td.dataset.i), Number(td.dataset.j)] : null;
  }
  table.addEventListener("pointermove", (e) => { const c = under(e); if (c && String(c) !== String(hover)) { hover = c; list(c); } });
  table.addEventListener("pointerleave", () => { hover = null; list(cellOf(model.get("layer"), model.get("token"))); });
  table.addEventListener("click", (e) => { const c = under(e); if (c) choose(...c); });
  table.addEventListener("keydown", (event) => {
    const move = ARROWS[event.key];
    if (!move || !tds.length) return;
    event.preventDefault();
    const [i, j] = focus ?? [tds.length - 1, 0];
    const to = [Math.min(tds.length - 1, Math.max(0, i - move[0])), Math.min(columns().length - 1, Math.max(0, j + move[1]))];
    choose(...to);
    tds[to[0]][to[1]].focus();
  });
  word.addEventListener("change", () => put({ followed: word.value }));

  model.on("change:texts change:p change:ranks change:layers change:columns change:tokens change:words", build);
  model.on("change:title change:mode change:colours change:followed change:layer change:token", ask);
  build();
  const stop = follow(root, ask);
  return stop;
}

export default { render };
