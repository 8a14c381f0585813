"use strict";
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const MANY_MARKS = 5000, SCREENFUL = 200;

  // ---------------------------------------------------------------- charts
  // On paper, charts are dark on white, whatever the screen shows.
  const PAPER = { text: "#1b1f24", quiet: "#57606a", line: "#d0d7de" };
  let isPrinting = false;
  const colors = () => {
    if (isPrinting) return PAPER;
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    return { text: of("--text"), quiet: of("--quiet"), line: of("--line") };
  };

  const configuration = (width) => {
    const { text, quiet, line } = colors();
    return {
      background: null,
      font: "system-ui, sans-serif",
      axis: { labelFontSize: 12, titleFontSize: 13, labelColor: text, titleColor: text, domainColor: quiet, tickColor: quiet, gridColor: line },
      axisQuantitative: { labelOverlap: "greedy", labelSeparation: 8 },
      legend: {
        labelFontSize: 12, titleFontSize: 13, labelColor: text, titleColor: text, labelLimit: 260, titleLimit: 400,
        symbolBaseFillColor: text, symbolBaseStrokeColor: text, gradientLength: 260, orient: "bottom", columns: width < 600 ? 1 : 4,
      },
      title: { color: text },
      header: { labelColor: text, labelFontSize: 12 },
      view: { stroke: line },
      mark: { color: content.colors[dark.matches && !isPrinting ? 4 : 0] },
      rule: { color: quiet },
      range: { category: content.colors },
    };
  };

  const marksOf = (spec) =>
    (spec.data && spec.data.values ? spec.data.values.length : 0) +
    (spec.layer || []).reduce((sum, layer) => sum + marksOf(layer), 0);

  const draw = (element) => {
    const { spec } = content.charts[Number(element.dataset.chart)];
    const width = Math.max(240, element.clientWidth - 24);
    const height = Math.min(360, Math.max(220, width * 0.5));
    const sized = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", ...spec, config: configuration(width) };
    if (spec.facet) {
      // A chart with panels has no width of its own; the panels have, each besides its share of the axes.
      sized.columns = Math.max(1, Math.floor(width / 210));
      sized.spec = { ...spec.spec, width: Math.floor((width - 70) / sized.columns) - 20 };
    } else {
      Object.assign(sized, { height, autosize: { type: "fit-x", contains: "padding" }, ...spec, width });
    }
    const compiled = vegaLite.compile(sized).spec;
    // Vega names its container, so it gets one of its own within the element that has our description, which replaces
    // the names that Vega gives to the marks.
    const container = document.createElement("div");
    container.setAttribute("aria-hidden", "true");
    element.replaceChildren(container);
    const view = new vega.View(vega.parse(compiled), {
      renderer: marksOf(spec) > MANY_MARKS ? "canvas" : "svg", container, hover: true,
    });
    view.runAsync().then(() => element.setAttribute("data-drawn", "yes"));
  };

  const drawAll = () => document.querySelectorAll(".plot").forEach(draw);

  // ---------------------------------------------------------------- the table of experiments
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const estimated = new Set(content.estimated), energy = new Set(content.energy);
  let order = content.rows.map((_, i) => i), shownCount = SCREENFUL, sortedBy = null, isAscending = true;
  const isStatic = body.rows.length > 0;
  const staticRows = Array.from(body.rows);

  const written = (value, row, column) => {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    const text = Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(5)));
    return energy.has(column) && estimated.has(row) ? "≈" + text : text;
  };

  const copier = (number) => {
    const command = content.commands[number], button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "copy command";
    button.setAttribute("aria-label", `copy command of ${content.rows[number][0]}`);
    button.title = command;
    button.addEventListener("click", () => {
      const copied = navigator.clipboard ? navigator.clipboard.writeText(command) : Promise.reject();
      const note = () => { button.textContent = "copied"; button.removeAttribute("aria-label"); };
      copied.then(note, () => { window.prompt("Command", command); });
    });
    return button;
  };
  const hasCommand = (number) => content.commands[number] !== null && content.commands[number] !== undefined;

  const rowOf = (number) => {
    if (isStatic) return staticRows[number];
    const row = document.createElement("tr");
    content.rows[number].forEach((value, column) => {
      const cell = row.insertCell();
      cell.textContent = written(value, number, column);
      if (typeof value === "number") cell.className = "number";
      else if (cell.textContent.length <= 32) cell.className = "name";
    });
    if (hasCommand(number)) row.cells[0].append(" ", copier(number));
    return row;
  };

  const compare = (column) => (one, other) => {
    const a = content.rows[one][column], b = content.rows[other][column];
    if (a === null || b === null) return (a === null) - (b === null);
    const by = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    return isAscending ? by : -by;
  };

  const texts = content.rows.map((row) => row.join(" ").toLowerCase());
  const refresh = () => {
    const wanted = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const fitting = order.filter((i) => wanted.every((word) => texts[i].includes(word)));
    const shown = isStatic ? fitting : fitting.slice(0, shownCount);
    body.replaceChildren(...shown.map(rowOf));
    document.getElementById("shown").textContent = `${shown.length} of ${content.rows.length} shown`;
    document.getElementById("on-paper").hidden = shown.length === content.rows.length;
    document.getElementById("on-paper").textContent = `${shown.length} of ${content.rows.length} experiments are printed.`;
    const more = document.getElementById("more");
    if (more) more.hidden = shown.length === fitting.length;
  };

  Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      isAscending = sortedBy === column ? !isAscending : true;
      sortedBy = column;
      order.sort(compare(column));
      Array.from(head.parentNode.cells).forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", isAscending ? "ascending" : "descending");
      refresh();
    });
  });
  document.getElementById("filter").addEventListener("input", refresh);
  const more = document.getElementById("more");
  if (more) more.addEventListener("click", () => { shownCount += SCREENFUL; refresh(); });

  staticRows.forEach((row, number) => { if (hasCommand(number)) row.cells[0].append(" ", copier(number)); });
  refresh();
  drawAll();
  dark.addEventListener("change", drawAll);
  const folded = Array.from(document.querySelectorAll("details.printed"));
  let opened = [];
  window.addEventListener("beforeprint", () => {
    isPrinting = true;
    opened = folded.filter((each) => !each.open);
    opened.forEach((each) => { each.open = true; });
    drawAll();
  });
  window.addEventListener("afterprint", () => {
    isPrinting = false;
    opened.forEach((each) => { each.open = false; });
    drawAll();
  });
  let pending = 0;
  window.addEventListener("resize", () => { clearTimeout(pending); pending = setTimeout(drawAll, 150); });
})();
