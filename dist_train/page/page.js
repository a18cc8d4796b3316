// Draws the curves of the page from its data. Text of a run is only ever set as text, never as HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const many = data.runs.length > 1;
  const COLOURS = 6, SIGN = 11, ROWS = 6; // SIGN: pixels of a mark's sign
  const DASHES = [[], [8, 4], [2, 3]]; // of runs beyond the colours

  // Per chart: [curve, label, colour of a single run, look]; how a number is written; by what it is multiplied.
  const percent = digits => v => v.toFixed(digits) + " %";
  const digits = n => v => (v !== 0 && Math.abs(v) < 1e-3 ? (+v.toPrecision(n)).toExponential() : String(+v.toPrecision(n)));
  const count = v => Math.round(v).toLocaleString("en");
  const CHARTS = {
    loss: { curves: [["loss", "training", 0, "thin"], ["validation_loss", "validation", 1, "points"]], write: digits(5), spikes: true },
    error: {
      curves: [["train_error", "training", 0, "thin"], ["top1_error", "validation", 1, "points"], ["top5_error", "top-5", 2, "points"]],
      write: percent(2), times: 100, zero: true,
    },
    lr: { curves: [["lr", "learning rate", 0, ""]], write: digits(4), decades: true },
    grad_norm: { curves: [["grad_norm", "of the whole net", 0, "thin"]], write: digits(5), spikes: true },
    images_per_s: { curves: [["images_per_s", "of all ranks", 0, "thin"]], write: count, zero: true },
    data_wait: {
      curves: [["data_wait", "mean of the ranks", 0, "thin"], ["data_wait_worst", "worst rank", 1, "thin dashed"]],
      write: percent(1), times: 100, zero: true,
    },
  };
  const SIGNS = {
    division: ["÷", "learning rate divided"], restart: ["↻", "restart"], world_size: ["⇄", "other world size"],
    code: ["≠", "other code"], settings: ["✎", "other settings"], bad_samples: ["×", "bad samples"],
  };

  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const decade = v => (Number.isInteger(+Math.log10(v).toFixed(9)) ? v : null);
  const short = v => {
    const at = Math.abs(v);
    for (const [size, name] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (at >= size) return +(v / size).toPrecision(4) + " " + name;
    return v && at < 1e-3 ? (+v.toPrecision(4)).toExponential() : String(+v.toPrecision(6));
  };

  // ---- what a chart shows: all its series over the union of their places

  function series(key) {
    const chart = CHARTS[key], made = [];
    data.runs.forEach((run, r) => {
      chart.curves.forEach(([curve, label, colour, look], c) => {
        const found = run.curves[curve];
        if (!found || (many && curve === "top5_error")) return;
        if (run.extremes[curve]) made.push({ run: r, curve, found: run.extremes[curve], look: "thin faint", label: "", colour: many ? r % COLOURS : colour, dash: [] });
        made.push({
          run: r, curve, found, look: many && c > 0 && look === "thin dashed" ? "thin dashed" : look,
          label: many ? run.name + (chart.curves.length > 1 ? ", " + label : "") : label,
          colour: many ? r % COLOURS : colour,
          dash: many ? DASHES[Math.floor(r / COLOURS) % DASHES.length] : [],
        });
      });
    });
    return made;
  }

  function columns(made, times) {
    const places = new Map(); // images -> [run, row]
    for (const s of made) for (const row of s.found.at) {
      const x = data.runs[s.run].rows.images[row];
      if (!places.has(x)) places.set(x, [s.run, row]);
    }
    const xs = [...places.keys()].sort((a, b) => a - b);
    const index = new Map(xs.map((x, i) => [x, i]));
    const ys = made.map(s => {
      const y = new Array(xs.length); // undefined: not recorded here; null: not finite, a gap
      s.found.at.forEach((row, i) => {
        const value = s.found.y[i];
        y[index.get(data.runs[s.run].rows.images[row])] = value === null ? null : value * times;
      });
      return y;
    });
    return { columns: [xs, ...ys], owner: xs.map(x => places.get(x)) };
  }

  // ---- scales

  const end = Math.max(1, ...data.runs.map(run => run.rows.images[run.rows.images.length - 1] || 0));
  const charts = {};
  let linking = false;

  function zoom(min, max) {
    linking = true;
    for (const u of Object.values(charts)) u.setScale("x", { min, max });
    linking = false;
    const whole = min <= 0 && max >= end;
    document.getElementById("reset").hidden = whole;
    try { history.replaceState(null, "", whole ? "#" : `#${min},${max}`); } catch { /* some viewers of files forbid it */ }
  }

  function isLogarithmic(chart, made) {
    const ys = made.flatMap(s => s.found.y.filter(y => y !== null));
    if (!ys.length || ys.some(y => y <= 0)) return false;
    if (chart.decades) return Math.max(...ys) > 30 * Math.min(...ys);
    return Boolean(chart.spikes) && made.some(s => data.runs[s.run].logarithmic.includes(s.curve));
  }

  function within(chart) {
    return (u, low, high) => {
      if (low === null || high === null) return [0, 1];
      const room = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
      if (chart.zero && low >= 0 && low < high / 2) return [0, high + room];
      return [chart.zero ? Math.max(0, low - room) : low - room, high + room];
    };
  }

  function nearest(u, i, closest) {
    const xs = u.data[0], y = u.data[i];
    if (i && u.series[i].class === "faint") return null;
    let left = closest, right = closest;
    while (left >= 0 && y[left] === undefined) left--;
    while (right < y.length && y[right] === undefined) right++;
    return left < 0 || xs[right] - xs[closest] < xs[closest] - xs[left] ? right : left;
  }

  // ---- marks

  function placeMarks(u) {
    const marks = u.marks || (u.marks = data.runs.flatMap(run => run.marks.map(mark => {
      const element = document.createElement("div");
      element.className = "mark" + (many ? " c" + (run.index % COLOURS) : "");
      element.dataset.kind = mark.kind;
      element.dataset.sign = SIGNS[mark.kind][0];
      u.over.appendChild(element);
      return { x: mark.images, element, title: (many ? run.name + ": " : "") + mark.title };
    })).sort((a, b) => a.x - b.x));
    let group = []; // of marks that cover each other: their signs stand below each other, and each tells of all
    for (const mark of marks) {
      mark.left = u.valToPos(mark.x, "x");
      if (!group.length || mark.left - group[0].left >= SIGN) group = [];
      group.push(mark);
      mark.element.hidden = mark.left < 0 || mark.left > u.over.clientWidth;
      mark.element.style.left = mark.left + "px";
      mark.element.style.setProperty("--row", (group.length - 1) % ROWS);
      for (const each of group) each.element.title = group.map(other => other.title).join("\n");
    }
  }

  function explainMarks() {
    const kinds = new Set(data.runs.flatMap(run => run.marks.map(mark => mark.kind)));
    const place = document.getElementById("kinds");
    for (const [kind, [sign, name]] of Object.entries(SIGNS)) if (kinds.has(kind)) {
      const item = document.createElement("span"), bold = document.createElement("b");
      bold.textContent = sign;
      item.append(bold, name);
      place.append(item);
    }
    place.hidden = !kinds.size;
  }

  // ---- a chart

  function place(owner) {
    const [r, row] = owner, rows = data.runs[r].rows;
    const images = `${count(rows.images[row])} images`; // at which several runs may be in other steps and epochs
    return many ? images : `${images} · epoch ${rows.epoch[row].toFixed(2)} · step ${count(rows.step[row])}`;
  }

  // Of several runs the colour is the run's, so that training and validation differ by the line.
  const dashed = (chart, s) => s.look.includes("dashed") || (many && s.look === "thin" && chart.curves.some(curve => curve[3] === "points"));

  function lineOf(chart, s, last) {
    const thin = s.look.includes("thin"), colour = `--c${s.colour}`;
    if (s.look.includes("faint")) return { class: "faint", stroke: () => css(colour) + "40", width: 1, points: { show: false } };
    return {
      label: s.label, stroke: () => css(colour), width: thin ? 1.25 : 2,
      dash: dashed(chart, s) ? [4, 3] : s.dash,
      points: { show: s.look === "points" && s.found.at.length <= 40 ? true : undefined, size: 5, fill: () => css(colour) },
      value: (u, v, i, at) => { // without a cursor, the last one
        const y = at === null || at === undefined ? last : v;
        return y === null || y === undefined ? "not finite" : chart.write(y);
      },
    };
  }

  function draw(key) {
    const figure = document.getElementById("chart-" + key), chart = CHARTS[key], made = series(key);
    if (!made.length) {
      const none = document.createElement("p");
      none.className = "none";
      none.textContent = "Nothing is recorded yet.";
      figure.append(none);
      return;
    }
    const { columns: cols, owner } = columns(made, chart.times || 1);
    const logarithmic = isLogarithmic(chart, made), last = cols[0].length - 1;
    const axis = { stroke: () => css("--muted"), font: "12px system-ui, sans-serif", ticks: { show: false }, grid: { stroke: () => css("--faint"), width: 1, filter: (u, ticks) => (logarithmic ? ticks.map(decade) : ticks) } };
    const lasts = cols.slice(1).map(y => y.filter(v => v !== undefined).pop());
    charts[key] = new uPlot({
      width: figure.clientWidth, height: key === "loss" || key === "error" ? 280 : 200, padding: [14, 20, 0, 0],
      scales: { x: { time: false }, y: logarithmic ? { distr: 3 } : { range: within(chart) } },
      series: [
        { label: "images", value: (u, v, i, at) => place(owner[at === null || at === undefined ? last : at]) },
        ...made.map((s, i) => lineOf(chart, s, lasts[i])),
      ],
      axes: [
        { ...axis, values: (u, ticks) => ticks.map(short), space: 64, size: 30, grid: { show: false } },
        { ...axis, values: (u, ticks) => ticks.map(v => (v === null ? "" : short(v))), size: room, space: 36 },
      ],
      cursor: {
        y: false, dataIdx: nearest, points: { size: 7 },
        sync: { key: "page", scales: ["x", null], setSeries: false, filters: { pub: type => type === "mousemove" || type === "mouseleave" } },
        bind: { // over a mark, too
          mousemove: (u, target, handler) => e => { handler(e); return null; },
          mousedown: (u, target, handler) => e => { if (e.button === 0) handler(e); return null; },
          dblclick: () => () => { zoom(0, end); return null; },
        },
        drag: { x: true, y: false },
      },
      legend: { markers: { width: 2, dash: (u, i) => (dashed(chart, made[i - 1]) ? "dashed" : "solid"), stroke: (u, i) => `var(--c${made[i - 1].colour})`, fill: () => "transparent" } },
      hooks: { draw: [placeMarks], setScale: [(u, scale) => { if (scale === "x" && !linking) zoom(u.scales.x.min, u.scales.x.max); }] },
    }, cols, figure);
    figure.dataset.axis = logarithmic ? "logarithmic" : "linear";
    if (logarithmic) figure.querySelector("figcaption").append(unit("logarithmic"));
    if (made.some(s => s.found.y.includes(null))) figure.querySelector("figcaption").append(unit("some values are not finite"));
  }

  const room = (u, labels) => 16 + 7 * Math.max(3, ...(labels || []).map(label => label.length));

  function unit(text) {
    const span = document.createElement("span");
    span.className = "unit";
    span.textContent = text;
    return span;
  }

  // ---- a page that is older than it looks

  function tellAge() {
    const age = Date.now() / 1000 - data.written;
    if (age < 3 * data.silent) return;
    const days = Math.floor(age / 86400), hours = Math.floor(age / 3600), minutes = Math.floor(age / 60);
    const ago = days > 1 ? days + " days" : hours > 1 ? hours + " hours" : minutes + " minutes";
    document.querySelectorAll(".run").forEach(run => {
      if (!["running", "starting"].includes(run.dataset.state) || run.dataset.old) return;
      run.dataset.old = "yes";
      const state = run.querySelector(".state"), word = run.querySelector(".word"), told = document.createElement("span");
      state.className = "state silent";
      state.querySelector(".glyph").textContent = "?";
      word.textContent = "was " + run.dataset.state;
      told.className = "fact";
      told.textContent = `when this page was written, ${ago} ago`;
      state.after(" ", told);
      for (const fact of run.querySelectorAll(".fact")) if (fact.textContent.endsWith(" left")) fact.hidden = true;
    });
  }

  linking = true;
  Object.keys(CHARTS).forEach(draw);
  linking = false;
  const [from, to] = location.hash.slice(1).split(",").map(Number);
  if (to > from && from >= 0 && to <= end) zoom(from, to); else zoom(0, end);
  explainMarks();
  tellAge();
  setInterval(tellAge, 30000);
  document.getElementById("reset").addEventListener("click", () => zoom(0, end));
  const repaint = () => Object.values(charts).forEach(u => u.redraw(false, true));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  addEventListener("beforeprint", () => { document.documentElement.classList.add("printing"); repaint(); });
  addEventListener("afterprint", () => { document.documentElement.classList.remove("printing"); repaint(); });
  new ResizeObserver(() => {
    for (const [key, u] of Object.entries(charts)) {
      const width = document.getElementById("chart-" + key).clientWidth;
      if (width && width !== u.width) u.setSize({ width, height: u.height });
    }
  }).observe(document.querySelector(".charts"));
  if (data.live) setTimeout(() => location.reload(), 1000 * data.live);
  window.page = { charts, data };
})();
