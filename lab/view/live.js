// A plotly figure. plotly.js comes from the kernel, once for a page, in a widget that every figure names.
const HEAD = "const define = undefined, module = { exports: {} }; let exports = module.exports;\n";
const TAIL = "\nexport default module.exports.newPlot ? module.exports : globalThis.Plotly;";

function plotly(model) {
  globalThis.vlPlotly ??= load(model).catch((error) => { delete globalThis.vlPlotly; throw error; });
  return globalThis.vlPlotly;
}

// Reading 5 MB of script keeps a slow machine's page busy for seconds; anywidget gives up on any other widget that is
// being made meanwhile. So it waits until the page has nothing else to do.
const idle = () => new Promise((done) => (globalThis.requestIdleCallback ?? setTimeout)(done, { timeout: 5000 }));

async function load(model) {
  await idle();
  const library = await model.widget_manager.get_model(model.get("library").replace("IPY_MODEL_", ""));
  const url = URL.createObjectURL(new Blob([HEAD, library.get("source"), TAIL], { type: "text/javascript" }));
  try { return (await import(/* webpackIgnore: true */ /* @vite-ignore */ url)).default; } finally { URL.revokeObjectURL(url); }
}

// A figure that follows the page: the text has the colour of JupyterLab's own.
function inked(layout, el) {
  const ink = getComputedStyle(el).getPropertyValue("--jp-ui-font-color1").trim();
  return ink ? { ...layout, font: { ...layout.font, color: ink } } : layout;
}

function place(point) {
  if (point.sourceLinks) return { point: point.pointNumber, part: "node" }; // of a Sankey diagram, which counts them apart
  return { point: Array.isArray(point.pointNumber) ? [...point.pointNumber] : point.pointNumber ?? point.pointIndex };
}

// JupyterLab's shortcuts (arrows, a, b ...) must not fire while the keyboard is in one of the view's controls.
function keep(event) {
  if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
}

async function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "vl-figure";
  root.setAttribute("role", "figure");
  root.dataset.paints = "0";
  el.append(root);

  let Plotly = null, own = [], busy = false, again = false, gone = false;
  const shapes = () => [...own, ...JSON.parse(model.get("shapes"))];

  async function draw() {
    const { data, layout } = JSON.parse(model.get("drawing"));
    own = layout.shapes ?? [];
    const dressed = { ...(model.get("theme") === "auto" ? inked(layout, el) : layout), shapes: shapes(), uirevision: "kept" };
    await Plotly.react(root, data, dressed, JSON.parse(model.get("config")));
    root.setAttribute("aria-label", model.get("alt"));
  }
  // One drawing at a time; of what comes meanwhile only the newest is drawn.
  async function paint(how = draw) {
    if (!Plotly || gone) return;
    if (busy) { again = true; return; }
    busy = true;
    try { await how(); } finally { busy = false; }
    root.dataset.paints = String(Number(root.dataset.paints) + 1);
    if (again) { again = false; await paint(); }
  }
  const whole = () => paint();
  const outline = () => paint(() => Plotly.relayout(root, { shapes: shapes() }));

  model.on("change:drawing change:theme", whole);
  model.on("change:shapes", outline);
  const size = new ResizeObserver(() => { if (Plotly && !busy && root.offsetParent) Plotly.Plots.resize(root); });
  const themes = new MutationObserver(whole);
  (async () => {
    Plotly = await plotly(model);
    await paint();
    root.on("plotly_click", ({ points }) => model.send({ do: "click", trace: points[0].curveNumber ?? 0, ...place(points[0]) }));
    el.closest(".vl-view")?.addEventListener("keydown", keep);
    size.observe(el);
    themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name"] });
  })();
  return () => {
    gone = true;
    size.disconnect();
    themes.disconnect();
    model.off("change:drawing change:theme", whole);
    model.off("change:shapes", outline);
    if (Plotly) Plotly.purge(root);
  };
}

export default { render };
