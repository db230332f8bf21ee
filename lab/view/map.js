// Map: values of layers (the first one at the bottom) by something else, as cells on a canvas.
const LEFT = 64, TOP = 6;

function render({ model, el }) {
  const root = open(el, `vl-map ${model.get("name")}`, model.get("title"));
  const title = make("div", { class: "vl-title" });
  const said = make("div", { class: "vl-said", role: "status", "aria-live": "polite" });
  const canvas = make("canvas", { class: "vl-map-canvas", tabindex: 0, role: "img" });
  const bar = scaleBar(model, () => paint());
  root.append(title, canvas, said, bar.node);

  let values = new Float32Array(0), box = null, hovered = null;
  const rows = () => model.get("rows"), columns = () => model.get("columns");

  function draw() {
    const n = rows().length, m = columns().length, wide = Math.max(260, root.clientWidth - 8);
    const w = Math.min(46, Math.max(4, (wide - LEFT) / Math.max(1, m))), h = Math.min(24, Math.max(7, 260 / Math.max(1, n)));
    const words = m ? Math.max(...columns().map((c) => c.length)) : 0, foot = w < 30 || words > 3 ? Math.min(170, 12 + 6.2 * words) : 18;
    box = { w, h, n, m };
    const pen = sized(canvas, LEFT + m * w + 8, TOP + n * h + foot);
    pen.clearRect(0, 0, LEFT + m * w + 8, TOP + n * h + foot);
    const table = numbers(model.get("colours"), Uint8Array), steps = table.length / 4, [low, high] = model.get("limits");
    const ink = styleOf(root, "--vl-ink", "#222"), missing = model.get("diverging") ? "#8c8c8c" : "#d9d9d9";
    pen.font = "11px system-ui, sans-serif";
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < m; j++) {
        const s = step(values[i * m + j], low, high, steps);
        pen.fillStyle = s < 0 ? missing : `rgb(${table[4 * s]} ${table[4 * s + 1]} ${table[4 * s + 2]})`;
        pen.fillRect(LEFT + j * w, y(i), w - 0.5, h - 0.5);
        if (s < 0) { pen.strokeStyle = "#555"; pen.lineWidth = 0.5; pen.beginPath(); pen.moveTo(LEFT + j * w, y(i) + h); pen.lineTo(LEFT + (j + 1) * w, y(i)); pen.stroke(); }
      }
    }
    pen.fillStyle = ink; pen.textAlign = "right"; pen.textBaseline = "middle";
    const every = Math.max(1, Math.ceil(13 / h));
    for (let i = 0; i < n; i += every) pen.fillText(`layer ${rows()[i]}`, LEFT - 5, y(i) + h / 2);
    const each = Math.max(1, Math.ceil(13 / w));
    for (let j = 0; j < m; j += each) {
      pen.save();
      pen.translate(LEFT + (j + 0.5) * w, TOP + n * h + 5);
      if (foot > 18) { pen.rotate(-Math.PI / 2); pen.textAlign = "right"; pen.textBaseline = "middle"; } else { pen.textAlign = "center"; pen.textBaseline = "top"; }
      pen.fillText(columns()[j], 0, 0);
      pen.restore();
    }
    mark(pen, rows().indexOf(model.get("layer")), columns().indexOf(chosen()));
    title.textContent = model.get("title");
    canvas.setAttribute("aria-label", `${model.get("title")}: ${n} layers by ${m}; arrow keys choose a cell`);
    bar.draw();
    if (!hovered) tell(rows().indexOf(model.get("layer")), columns().indexOf(chosen()));
  }
  const paint = painter(root, draw);
  function y(i) { return TOP + (box.n - 1 - i) * box.h; }
  function chosen() { return model.get("column"); }

  function mark(pen, i, j) {
    const { w, h, n, m } = box;
    for (const [colour, width] of [["#fff", 4], ["#000", 1.5]]) {  // seen on every colour and on both themes
      pen.strokeStyle = colour; pen.lineWidth = width;
      if (i >= 0 && j >= 0) pen.strokeRect(LEFT + j * w, y(i), w, h);
      else if (i >= 0) pen.strokeRect(LEFT, y(i), m * w, h);
      else if (j >= 0) pen.strokeRect(LEFT + j * w, TOP, w, n * h);
    }
  }
  function tell(i, j) {
    if (i < 0 || j < 0 || i >= box.n || j >= box.m) { said.textContent = ""; return; }
    const value = values[i * box.m + j];
    said.textContent = `layer ${rows()[i]}, ${columns()[j]}: ${Number.isFinite(value) ? `${short(value)} ${model.get("unit")}` : "not there"}`;
  }
  function under(event) {
    const rect = canvas.getBoundingClientRect();
    const j = Math.floor((event.clientX - rect.left - LEFT) / box.w), i = box.n - 1 - Math.floor((event.clientY - rect.top - TOP) / box.h);
    return i >= 0 && i < box.n && j >= 0 && j < box.m ? [i, j] : null;
  }
  function choose(i, j) { model.set("layer", rows()[i]); model.set("column", columns()[j]); model.save_changes(); tell(i, j); paint(); }
  canvas.addEventListener("pointermove", (e) => { hovered = under(e); if (hovered) tell(...hovered); });
  canvas.addEventListener("pointerleave", () => { hovered = null; paint(); });
  canvas.addEventListener("click", (e) => { const at = under(e); if (at) choose(...at); });
  canvas.addEventListener("keydown", (event) => {
    const move = ARROWS[event.key];
    if (!move || !box?.n || !box.m) return;
    event.preventDefault();
    const i = Math.max(0, rows().indexOf(model.get("layer"))), j = Math.max(0, columns().indexOf(chosen()));
    choose(Math.min(box.n - 1, Math.max(0, i - move[0])), Math.min(box.m - 1, Math.max(0, j + move[1])));
  });

  function load() { values = numbers(model.get("values"), Float32Array); paint(); }
  model.on("change:values", load);
  model.on("change:rows change:columns change:limits change:colours change:title change:unit change:layer change:column change:pinned change:diverging", paint);
  load();
  return follow(root, paint);
}

export default { render };
