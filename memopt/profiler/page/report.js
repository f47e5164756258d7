"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const AXIS = 58;
  const LANE = 20;
  const LANES = 4;
  const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let charts = [];

  const ink = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const category = (name) => ink("--c-" + name) || ink("--c-runtime");

  function bytes(n, digits = 2) {
    if (n === null || n === undefined) return "-";
    let unit = 0;
    while (Math.abs(n) >= 1024 && unit < UNITS.length - 1) { n /= 1024; unit++; }
    return (unit === 0 ? String(n) : n.toFixed(digits)) + " " + UNITS[unit];
  }
  const tick = (n) => bytes(n).replace(/\.?0+ (?=[KMGTP])/, " ");
  const seconds = (t) => t >= 120 ? Math.floor(t / 60) + " min " + (t % 60).toFixed(0).padStart(2, "0") + " s" : +t.toFixed(3) + " s";

  // steps of an axis of bytes: 1, 2, 4, ... 512 of each unit, so that no tick says 953.67 MiB
  const steps = [];
  for (let k = 0; k < 50; k++) steps.push(2 ** k);

  function lanesOf(phases) {
    const ends = [];
    for (const phase of phases) {
      let lane = ends.findIndex((end) => end <= phase.start + 1e-9);
      if (lane < 0) lane = ends.length < LANES ? ends.push(0) - 1 : LANES - 1;
      ends[lane] = phase.end;
      phase.lane = lane;
    }
    return Math.max(1, ends.length);
  }
  // an outer phase comes before those inside it, so that it gets the upper lane
  const phases = data.phases.slice().sort((a, b) => a.start - b.start || b.end - a.end);
  const lanes = lanesOf(phases);
  const names = [...new Set(phases.map((phase) => phase.name))];

  function line(u, at, colour, dash, text, below) {
    const ctx = u.ctx, box = u.bbox, y = Math.round(u.valToPos(at, "y", true)) + 0.5;
    const px = devicePixelRatio;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour;
    ctx.lineWidth = 1.5 * px;
    ctx.setLineDash(dash.map((n) => n * px));
    ctx.beginPath(); ctx.moveTo(box.left, y); ctx.lineTo(box.left + box.width, y); ctx.stroke();
    ctx.font = 11 * px + "px system-ui, sans-serif";
    ctx.textAlign = "right";
    ctx.textBaseline = below ? "top" : "bottom";
    // a halo keeps the words readable on top of the areas
    ctx.setLineDash([]); ctx.lineWidth = 3 * px; ctx.strokeStyle = ink("--card"); ctx.lineJoin = "round";
    const where = [box.left + box.width - 4 * px, y + (below ? 3 : -2) * px];
    ctx.strokeText(text, ...where); ctx.fillText(text, ...where);
    ctx.restore();
  }

  function drawPhases(u) {
    const ctx = u.ctx, box = u.bbox, px = devicePixelRatio;
    ctx.save();
    ctx.beginPath(); ctx.rect(box.left, box.top, box.width, box.height); ctx.clip();
    ctx.font = 11 * px + "px system-ui, sans-serif";
    ctx.textAlign = "left";
    ctx.textBaseline = "middle";
    for (const phase of phases) {
      const left = u.valToPos(phase.start, "x", true), right = u.valToPos(phase.end, "x", true);
      if (right < box.left || left > box.left + box.width) continue;
      const top = box.top + phase.lane * LANE * px, width = Math.max(px, right - left - px);
      ctx.fillStyle = ink("--p-" + names.indexOf(phase.name) % 8);
      ctx.fillRect(left, top + px, width, (LANE - 2) * px);
      const from = Math.max(left, box.left);
      if (ctx.measureText(phase.name).width + 8 * px < left + width - from) {
        ctx.fillStyle = ink("--ink");
        ctx.fillText(phase.name, from + 4 * px, top + LANE / 2 * px);
      }
    }
    ctx.restore();
  }

  function readout(u) {
    const place = document.getElementById("readout"), at = u.cursor.left;
    if (at === undefined || at < 0 || u.cursor.idx === null) { place.textContent = place.dataset.idle; return; }
    const t = u.posToVal(at, "x");
    const inside = phases.filter((phase) => phase.start <= t && t <= phase.end).sort((a, b) => a.lane - b.lane);
    place.textContent = seconds(t) + (inside.length ? "  ·  " + inside.map((phase) => phase.name).join(" › ") : "");
  }

  function common(width, height, bottom) {
    return {
      width, height,
      padding: [8, 18, bottom ? 0 : 8, 0],
      cursor: { sync: { key: "memopt", setSeries: false }, drag: { x: true, y: false }, y: false, points: { show: false } },
      scales: { x: { time: false, range: (u, low, high) => [low, high] } },
    };
  }
  function timeAxis(show) {
    return {
      show: true, stroke: ink("--soft"), size: show ? 30 : 0, grid: { stroke: ink("--grid"), width: 1 },
      ticks: { show, stroke: ink("--line"), width: 1 }, font: "11px system-ui, sans-serif",
      values: (u, found) => found.map((t) => show ? seconds(t) : ""),
    };
  }

  function phaseChart(place, width) {
    const options = {
      ...common(width, lanes * LANE + 16, false),
      legend: { show: false },
      axes: [{ ...timeAxis(false), grid: { show: false } }, { size: AXIS, stroke: ink("--soft"), grid: { show: false }, ticks: { show: false }, values: (u, found) => found.map(() => "") }],
      series: [{}, { show: true, points: { show: false } }],
      hooks: { draw: [drawPhases], setCursor: [readout] },
    };
    options.scales.y = { range: [0, 1] };
    return new uPlot(options, [data.t, data.t.map(() => null)], place);
  }

  function tierChart(panel, place, width, last) {
    const order = Object.keys(panel.categories);
    const raw = [data.t, panel.measured], shown = [data.t, panel.measured], bands = [];
    const series = [
      { label: "t", value: (u, v) => v === null ? "-" : seconds(v) },
      { label: "measured", stroke: ink("--measured"), width: 1.5, points: { show: false } },
    ];
    if (!order.length) series[1].fill = ink("--fill") + "55";
    let sum = data.t.map(() => 0);
    order.forEach((name, i) => {
      const values = panel.categories[name];
      sum = sum.map((below, k) => values[k] === null ? below : below + Math.max(0, values[k]));
      raw.push(values);
      shown.push(sum.map((n, k) => panel.measured[k] === null && !n ? null : n));
      const colour = category(name);
      series.push({ label: name, stroke: colour, width: 0, points: { show: false }, fill: i ? undefined : colour });
      if (i) bands.push({ series: [i + 2, i + 1], fill: colour });
    });
    const highest = Math.max(1, ...shown.slice(1).flat().filter((n) => n !== null));
    const near = (n) => n && n <= 4 * highest;
    const top = 1.12 * Math.max(highest, near(panel.budget) ? panel.budget : 0, near(panel.predicted) ? panel.predicted : 0);
    const options = {
      ...common(width, last ? 210 : 180, last),
      axes: [timeAxis(last), { stroke: ink("--soft"), size: AXIS, grid: { stroke: ink("--grid"), width: 1 }, ticks: { show: false }, incrs: steps, font: "11px system-ui, sans-serif", values: (u, found) => found.map(tick) }],
      series, bands,
      legend: { markers: { width: 0, fill: (u, s) => u.series[s].label === "measured" ? ink("--measured") : category(u.series[s].label) } },
      hooks: {
        draw: [(u) => {
          const far = panel.budget && panel.predicted && Math.abs(u.valToPos(panel.budget, "y") - u.valToPos(panel.predicted, "y")) < 16;
          if (near(panel.predicted)) line(u, panel.predicted, ink("--predicted"), [2, 3], "predicted peak " + bytes(panel.predicted), far && panel.predicted < panel.budget);
          if (near(panel.budget)) line(u, panel.budget, ink("--over"), [7, 4], "budget " + bytes(panel.budget), far && panel.predicted >= panel.budget);
        }],
      },
    };
    options.scales.y = { range: [0, top] };
    // the measured line belongs on top of the areas, so it is drawn last
    const moved = (list) => [list[0], ...list.slice(2), list[1]];
    options.series = moved(series);
    options.bands = bands.map((band) => ({ ...band, series: band.series.map((s) => s - 1) }));
    const drawn = moved(shown), told = moved(raw);
    // the areas are sums from below; what is read is the category alone
    for (const each of options.series.slice(1)) each.value = (u, v, s, k) => k === null || k === undefined ? "-" : bytes(told[s][k]);
    return new uPlot(options, drawn, place);
  }

  function build(width) {
    for (const chart of charts) chart.destroy();
    charts = [];
    const places = document.querySelectorAll("[data-panel]");
    if (!places.length) return;
    const wide = width || places[0].clientWidth;
    const last = data.panels.length - 1;
    for (const place of places) {
      if (place.dataset.panel === "phases") charts.push(phaseChart(place, wide));
      else charts.push(tierChart(data.panels[+place.dataset.panel], place, wide, +place.dataset.panel === last));
    }
  }

  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  function theme(name) {
    root.dataset.theme = name;
    button.textContent = name === "dark" ? "Light" : "Dark";
  }
  button.addEventListener("click", () => { theme(root.dataset.theme === "dark" ? "light" : "dark"); build(); });
  system.addEventListener("change", () => { theme(system.matches ? "dark" : "light"); build(); });
  theme(system.matches ? "dark" : "light");
  let before = null;
  addEventListener("beforeprint", () => { before = root.dataset.theme; theme("light"); build(640); });
  addEventListener("afterprint", () => { theme(before || "light"); build(); });
  build();
  let wide = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== wide) { wide = innerWidth; build(); } });
})();
