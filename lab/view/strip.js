// Frame strip: the chosen frame large, all frames small below it, the values of their tokens on both.
const GAP = 6, HEAD = 16;

function render({ model, el }) {
  const root = open(el, "vl-strip", "Frame strip with the values of the video's tokens");
  const title = make("div", { class: "vl-title" });
  const said = make("div", { class: "vl-said", role: "status", "aria-live": "polite" });
  const big = make("canvas", { class: "vl-strip-main", tabindex: 0, role: "img" });
  const all = make("canvas", { class: "vl-strip-canvas", tabindex: 0, role: "img", "aria-label": "All frames; arrow keys choose a patch" });
  const slider = make("input", { type: "range", min: 0, step: 1, "aria-label": "Frame", class: "vl-frame" });
  const play = button("Play", "▶", () => (timer ? pause() : start()));
  const opacity = make("input", { type: "range", min: 0, max: 1, step: 0.05, "aria-label": "Opacity of the values" });
  const threshold = make("input", { type: "range", min: 0, max: 1, step: 0.01, "aria-label": "Hide values below this share of the scale" });
  const scale = make("select", { "aria-label": "Colour scale" }, make("option", { value: "all" }, "one scale"), make("option", { value: "each" }, "a scale for each frame"));
  const bar = scaleBar(model, () => paint());
  root.append(
    title,
    make("div", { class: "vl-row" }, play, slider, said),
    make("div", { class: "vl-strip-panes" }, big, all),
    make("div", { class: "vl-row" }, bar.node, labelled("scale", scale), labelled("opacity", opacity), labelled("hide below", threshold)),
  );

  let pictures = [], heats = [], values = new Float32Array(0), tokens = new Int32Array(0), timer = 0, shown = 0, box = null;

  function size() { return model.get("shape"); }
  function frame() { return Math.min(model.get("frame") ?? 0, Math.max(0, size()[0] - 1)); }
  function put(changes) {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  }

  async function decode() {
    const blobs = model.get("frames").map((b) => new Blob([b], { type: "image/jpeg" }));
    pictures = await Promise.all(blobs.map((b) => createImageBitmap(b)));
    slider.max = String(Math.max(0, pictures.length - 1));
    paint();
  }

  // The values of each frame as a picture of one pixel a token.
  function heat() {
    const [n, rows, cols] = size(), table = numbers(model.get("colours"), Uint8Array), steps = table.length / 4;
    const ends = model.get("limits"), cover = model.get("opacity"), least = model.get("threshold"), middle = (steps - 1) / 2;
    heats = [];
    for (let f = 0; f < n; f++) {
      const [low, high] = model.get("per_frame") ? own(f, rows * cols, ends) : ends;
      const image = new ImageData(cols, rows);
      for (let i = 0; i < rows * cols; i++) {
        const at = step(values[f * rows * cols + i], low, high, steps);
        const strength = model.get("diverging") ? Math.abs(at - middle) / middle : at / (steps - 1);
        if (at < 0 || strength < least) continue;
        for (let c = 0; c < 3; c++) image.data[4 * i + c] = table[4 * at + c];
        image.data[4 * i + 3] = table[4 * at + 3] * cover;
      }
      const small = new OffscreenCanvas(cols, rows);
      small.getContext("2d").putImageData(image, 0, 0);
      heats.push(small);
    }
  }

  function own(f, n, ends) {
    const mine = Array.from(values.subarray(f * n, (f + 1) * n)).filter(Number.isFinite);
    if (!mine.length) return ends;
    const top = Math.max(...mine.map(Math.abs)) || 1;
    return model.get("diverging") ? [-top, top] : [Math.min(0, ...mine), Math.max(...mine) || 1];
  }

  function tile(pen, f, x, y, w, h, chosen) {
    pen.imageSmoothingEnabled = pictures[f] ? pictures[f].width > w : false;
    if (pictures[f]) pen.drawImage(pictures[f], x, y, w, h);
    pen.imageSmoothingEnabled = false;
    if (heats[f]) pen.drawImage(heats[f], x, y, w, h);
    const patch = model.get("patch"), [, rows, cols] = size();
    if (chosen && patch) {
      const [a, b] = [w / cols, h / rows], ink = [["#000", 3], ["#fff", 1.5]];
      for (const [colour, width] of ink) {
        pen.strokeStyle = colour; pen.lineWidth = width;
        pen.strokeRect(x + patch[1] * a, y + patch[0] * b, a, b);
      }
    }
  }

  function layout() {
    const n = size()[0], ratio = pictures[0] ? pictures[0].height / pictures[0].width : 1;
    const wide = Math.max(320, root.clientWidth - 8), main = Math.min(300, wide * 0.36);
    const room = wide - main - 16, least = Math.max(34, Math.min(130, room / Math.ceil(Math.sqrt(n * ratio)) - GAP));
    const across = Math.max(1, Math.min(n, Math.floor((room + GAP) / (least + GAP))));
    const w = Math.min(130, (room + GAP) / across - GAP), h = w * ratio, down = Math.ceil(n / across);
    return { n, main, mainHeight: main * ratio, across, w, h, room, height: down * (h + HEAD + GAP) };
  }

  function place(f) { return [(f % box.across) * (box.w + GAP), Math.floor(f / box.across) * (box.h + HEAD + GAP) + HEAD]; }

  function drawBig(f) {
    const pen = sized(big, box.main, box.mainHeight);
    tile(pen, f, 0, 0, box.main, box.mainHeight, f === frame());
    big.setAttribute("aria-label", `${model.get("labels")[f] ?? `frame ${f}`}, large; arrow keys choose a patch`);
    slider.value = String(f);
  }

  function draw() {
    box = layout();
    shown = timer ? shown : frame();
    heat();
    drawBig(shown);
    const pen = sized(all, Math.max(box.room, 10), box.height);
    pen.clearRect(0, 0, box.room, box.height);
    const ink = styleOf(root, "--vl-ink", "#222"), mark = styleOf(root, "--vl-accent", "#0b62a4");
    pen.font = "11px system-ui, sans-serif";
    for (let f = 0; f < box.n; f++) {
      const [x, y] = place(f);
      tile(pen, f, x, y, box.w, box.h, f === frame());
      pen.fillStyle = ink;
      pen.fillText(box.w < 60 ? String(f) : (model.get("labels")[f] ?? String(f)), x, y - 4, box.w);
      if (f === shown) { pen.strokeStyle = mark; pen.lineWidth = 3; pen.strokeRect(x - 1, y - 1, box.w + 2, box.h + 2); }
    }
    title.textContent = model.get("title");
    opacity.value = model.get("opacity"); threshold.value = model.get("threshold");
    scale.value = model.get("per_frame") ? "each" : "all";
    bar.draw();
    if (!hovered) tell(shown, model.get("patch"));
  }
  const paint = painter(root, draw);

  function tell(f, patch) {
    const [, rows, cols] = size(), label = model.get("labels")[f] ?? `frame ${f}`;
    if (!patch) { said.textContent = label; return; }
    const i = (f * rows + patch[0]) * cols + patch[1], at = tokens.length ? `, token ${tokens[i]}` : "";
    const value = Number.isFinite(values[i]) ? `: ${short(values[i])} ${model.get("unit")}` : "";
    said.textContent = `${label}, row ${patch[0]}, column ${patch[1]}${at}${value}`;
  }

  // Which frame and patch the pointer is over; null between frames.
  function under(event, canvas) {
    const rect = canvas.getBoundingClientRect(), [, rows, cols] = size();
    const x = event.clientX - rect.left, y = event.clientY - rect.top;
    if (!box || !rect.width) return null;
    if (canvas === big) return spot(shown, x / box.main, y / box.mainHeight, rows, cols);
    for (let f = 0; f < box.n; f++) {
      const [left, top] = place(f);
      const found = spot(f, (x - left) / box.w, (y - top) / box.h, rows, cols);
      if (found) return found;
    }
    return null;
  }
  function spot(f, x, y, rows, cols) {
    if (x < 0 || y < 0 || x >= 1 || y >= 1) return null;
    return { f, patch: [Math.floor(y * rows), Math.floor(x * cols)] };
  }

  let hovered = false;
  for (const canvas of [big, all]) {
    canvas.addEventListener("pointermove", (e) => { const at = under(e, canvas); hovered = Boolean(at); if (at) tell(at.f, at.patch); });
    canvas.addEventListener("pointerleave", () => { hovered = false; tell(shown, model.get("patch")); });
    canvas.addEventListener("click", (e) => {
      const at = under(e, canvas);
      if (at) { pause(); put({ frame: at.f, patch: at.patch }); paint(); }
    });
    canvas.addEventListener("keydown", keys);
  }

  function keys(event) {
    const [n, rows, cols] = size(), move = ARROWS[event.key];
    if (event.key === " ") { event.preventDefault(); timer ? pause() : start(); return; }
    const jump = { PageUp: -1, PageDown: 1 }[event.key];
    if (jump) { event.preventDefault(); go(frame() + jump, n); return; }
    if (!move) return;
    event.preventDefault();
    const [row, col] = model.get("patch") ?? [0, -1];
    put({ frame: frame(), patch: [Math.min(rows - 1, Math.max(0, row + move[0])), Math.min(cols - 1, Math.max(0, col + move[1]))] });
    paint();
  }
  function go(f, n) { put({ frame: Math.min(n - 1, Math.max(0, f)) }); paint(); }

  // Played here: the kernel hears of the frame when it stops.
  function start() {
    shown = frame(); play.textContent = "❚❚"; play.setAttribute("aria-label", "Pause");
    timer = setInterval(() => { shown = (shown + 1) % Math.max(1, size()[0]); paint(); }, 160);
  }
  function pause() {
    if (!timer) return;
    clearInterval(timer); timer = 0; play.textContent = "▶"; play.setAttribute("aria-label", "Play");
    put({ frame: shown }); paint();
  }

  slider.addEventListener("input", () => { pause(); go(Number(slider.value), size()[0]); });
  opacity.addEventListener("input", () => { put({ opacity: Number(opacity.value) }); paint(); });
  threshold.addEventListener("input", () => { put({ threshold: Number(threshold.value) }); paint(); });
  scale.addEventListener("change", () => { put({ per_frame: scale.value === "each" }); paint(); });

  function load() {
    values = numbers(model.get("values"), Float32Array);
    tokens = numbers(model.get("tokens"), Int32Array);
    paint();
  }
  model.on("change:values change:tokens change:shape", load);
  model.on("change:frames", decode);
  model.on("change:frame change:patch change:limits change:colours change:opacity change:threshold change:per_frame change:title change:unit change:labels change:pinned", paint);
  load();
  decode();
  const stop = follow(root, paint);
  return () => { clearInterval(timer); stop(); };
}

export default { render };
