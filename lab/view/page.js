"use strict";
(() => {
  const config = JSON.parse(document.getElementById("plot-config").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const themed = (layout) => {
    const look = {
      "font.color": css("--ink"), "legend.font.color": css("--ink"),
      "hoverlabel.bgcolor": css("--panel"), "hoverlabel.font.color": css("--ink"), "hoverlabel.bordercolor": css("--line"),
    };
    for (const axis of ["xaxis", "yaxis"]) {
      if (!layout[axis] || layout[axis].visible === false) continue;
      look[axis + ".gridcolor"] = css("--line");
      look[axis + ".linecolor"] = css("--line");
    }
    return look;
  };

  const charts = [];
  for (const block of document.querySelectorAll(".chart-data")) {
    const target = document.getElementById(block.dataset.for);
    const figure = JSON.parse(block.textContent);
    Plotly.newPlot(target, figure.data, figure.layout, config).then(() => {
      Plotly.relayout(target, themed(figure.layout));
      charts.push([target, figure.layout]);
      document.body.dataset.drawn = charts.length;
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const [target, layout] of charts) Plotly.relayout(target, themed(layout));
  });

  const select = (node) => {
    const range = document.createRange();
    range.selectNodeContents(node);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
  };
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      const node = document.getElementById(button.dataset.copy);
      let done = false;
      try {
        await navigator.clipboard.writeText(node.textContent);
        done = true;
      } catch {
        select(node);
        done = document.execCommand("copy");
      }
      button.textContent = done ? "Copied" : "Press Ctrl+C";
      button.parentElement.querySelector("[role=status]").textContent = button.textContent;
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
})();
