// What the widgets' scripts share. No module of its own: it stands before each of them.

// A typed array over the bytes a trait carries (a DataView, which need not start at 0 nor be aligned).
function numbers(view, kind) {
  if (!view || !view.byteLength) return new kind(0);
  return new kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, fn] of Object.entries(value)) node.addEventListener(event, fn);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function button(label, words, fn) {
  return make("button", { type: "button", "aria-label": label, title: label, class: "vl-button", on: { click: fn } }, words);
}

function labelled(words, control) {
  return make("label", { class: "vl-label" }, words, control);
}

// Jupyter's own shortcuts (a, b, arrows, Ctrl+Z ...) must not fire while the keyboard is inside a widget. The attribute
// does not suffice: a shortcut whose selector fits the focused element itself is found before the attribute is.
function keep(event) {
  const held = event.ctrlKey || event.metaKey || event.altKey;
  if (!held || ["z", "y"].includes(event.key.toLowerCase())) event.stopPropagation();
}

function open(el, name, label) {
  const root = make("div", { class: `vl-view ${name}`, role: "group", "aria-label": label, "data-lm-suppress-shortcuts": "true" });
  root.addEventListener("keydown", keep);
  el.append(root);
  return root;
}

function short(x) {
  if (!Number.isFinite(x)) return "–";
  const size = Math.abs(x);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return x.toExponential(2);
  return String(Number(x.toPrecision(4)));
}

// The pixels of a canvas follow its size on the page and the screen's density.
function sized(canvas, width, height) {
  const dense = window.devicePixelRatio || 1;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const w = Math.max(1, Math.round(width * dense)), h = Math.max(1, Math.round(height * dense));
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  const pen = canvas.getContext("2d");
  pen.setTransform(dense, 0, 0, dense, 0, 0);
  return pen;
}

function styleOf(el, name, otherwise) {
  return getComputedStyle(el).getPropertyValue(name).trim() || otherwise;
}

// Which of the scale's colours a value has; -1: missing.
function step(value, low, high, steps) {
  if (!Number.isFinite(value)) return -1;
  const share = high > low ? (value - low) / (high - low) : 0;
  return Math.round(Math.min(1, Math.max(0, share)) * (steps - 1));
}

// The scale with its limits, which can be typed, and a box that keeps them for the values to come.
function scaleBar(model, changed) {
  const bar = make("canvas", { class: "vl-bar", role: "img" });
  const low = make("input", { type: "number", step: "any", "aria-label": "Lower limit of the colour scale", class: "vl-limit" });
  const high = make("input", { type: "number", step: "any", "aria-label": "Upper limit of the colour scale", class: "vl-limit" });
  const pin = make("input", { type: "checkbox", "aria-label": "Keep these limits" });
  const unit = make("span", { class: "vl-unit" });
  const typed = () => {
    const ends = [parseFloat(low.value), parseFloat(high.value)];
    if (!(ends[0] < ends[1])) { draw(); return; }
    model.set("limits", ends); model.set("pinned", true); model.save_changes(); changed();
  };
  low.addEventListener("change", typed);
  high.addEventListener("change", typed);
  pin.addEventListener("change", () => { model.set("pinned", pin.checked); model.save_changes(); });
  const node = make("div", { class: "vl-scale" }, make("div", { class: "vl-ends" }, low, bar, high, labelled("keep", pin)), unit);
  function draw() {
    const table = numbers(model.get("colours"), Uint8Array), steps = table.length / 4;
    const pen = sized(bar, 120, 12);
    for (let i = 0; i < steps; i++) {
      pen.fillStyle = `rgb(${table[4 * i]} ${table[4 * i + 1]} ${table[4 * i + 2]})`;
      pen.fillRect((i * 120) / steps, 0, 120 / steps + 1, 12);
    }
    const [a, b] = model.get("limits");
    for (const [input, end] of [[low, a], [high, b]]) if (document.activeElement !== input) input.value = short(end);
    pin.checked = model.get("pinned");
    unit.textContent = model.get("unit");
    bar.setAttribute("aria-label", `Colour scale from ${short(a)} to ${short(b)} ${model.get("unit")}`);
  }
  return { node, draw };
}

// Paints at most once a frame of the screen; counts what it painted in data-paints, which tests wait for.
function painter(root, draw) {
  let asked = 0;
  root.dataset.paints = "0";
  return () => {
    if (asked) return;
    asked = requestAnimationFrame(() => {
      asked = 0;
      draw();
      root.dataset.paints = String(Number(root.dataset.paints) + 1);
    });
  };
}

// Redraw when the widget's width or the page's theme changes; returns what ends that.
function follow(root, paint) {
  const size = new ResizeObserver(paint);
  size.observe(root);
  const theme = new MutationObserver(paint);
  theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"] });
  return () => { size.disconnect(); theme.disconnect(); };
}

const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
