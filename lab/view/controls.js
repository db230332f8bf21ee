// A row of buttons, choices and a path, with progress, one line of state and one of error (details fold out).
function render({ model, el }) {
  const root = open(el, "vl-controls", model.get("title"));
  const row = make("div", { class: "vl-row" });
  const path = make("input", { type: "text", class: "vl-path", "aria-label": "File", spellcheck: "false" });
  const meter = make("progress", { max: 1, class: "vl-progress", "aria-label": "Progress" });
  const state = make("span", { class: "vl-state", role: "status", "aria-live": "polite" });
  const error = make("div", { class: "vl-error", role: "alert" });
  root.append(row, error);
  let buttons = {}, selects = {};

  function send(name, more = {}) { model.send({ do: name, ...more }); }
  function build() {
    buttons = {}; selects = {};
    const made = model.get("buttons").map(([name, words]) => {
      const b = button(words, words, () => send(name, model.get("with_path") ? { path: path.value } : {}));
      if (model.get("main") === name) b.classList.add("vl-main");
      return (buttons[name] = b);
    });
    const choices = model.get("choices").map(([name, words, options]) => {
      const s = make("select", { "aria-label": words }, ...options.map((o) => make("option", { value: o }, o)));
      s.addEventListener("change", () => send(name, { value: s.value }));
      selects[name] = s;
      return labelled(words, s);
    });
    row.replaceChildren(...choices, ...(model.get("with_path") ? [labelled("file", path)] : []), ...made, meter, state);
    ask();
  }
  function draw() {
    const idle = model.get("disabled"), value = model.get("progress");
    for (const [name, b] of Object.entries(buttons)) b.disabled = idle.includes(name);
    for (const [name, s] of Object.entries(selects)) s.value = model.get("chosen")[name] ?? s.value;
    if (document.activeElement !== path) path.value = model.get("path");
    meter.hidden = value < 0;
    if (value >= 0) meter.value = value;
    state.textContent = model.get("state");
    const wrong = model.get("error"), more = model.get("details");
    if (!wrong) error.replaceChildren();
    else error.replaceChildren(wrong, ...(more ? [make("details", {}, make("summary", {}, "details"), more)] : []));
  }
  const ask = painter(root, draw);
  path.addEventListener("change", () => { model.set("path", path.value); model.save_changes(); });
  model.on("change:buttons change:choices change:with_path", build);
  model.on("change:disabled change:progress change:state change:error change:details change:path change:chosen", ask);
  build();
}

export default { render };
