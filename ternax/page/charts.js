// Drawing: stacked bars as HTML, the roofline as SVG. No number is computed here.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function svg_node(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Segments [[css class, size], ...] as shares of `whole`; `mark` draws a line at that size.
function draw_bar(bar, segments, whole, mark) {
  bar.replaceChildren(...segments.filter(([, size]) => size > 0).map(([kind, size]) => {
    const segment = document.createElement("i");
    segment.className = kind;
    segment.style.width = `${100 * size / whole}%`;
    return segment;
  }));
  if (mark === undefined) return;
  const line = document.createElement("b");
  line.style.left = `${100 * mark / whole}%`;
  bar.append(line);
}

const INTENSITY = [0.3, 30000]; // op/byte: fp32 at batch 1 to trits at batch 4096

const decades = (low, high) => {
  const found = [];
  for (let power = Math.ceil(Math.log10(low)); 10 ** power <= high; power++) found.push(10 ** power);
  return found;
};

// view: bandwidth_tb_per_s and peaks {type: Tera-op/s} of all devices together, operands,
// efficiency, point and others [{intensity, tflops, label}], trail [{intensity, tflops}].
function draw_roofline(svg, view) {
  const width = svg.clientWidth || 320, height = width < 420 ? 280 : 360;
  const left = 44, right = width - 10, top = 14, bottom = height - 40;
  const peak = view.peaks[view.operands], most = Math.max(...Object.values(view.peaks));
  const range = [view.bandwidth_tb_per_s * INTENSITY[0], most * 2];
  const scale = (value, [low, high], from, to) =>
    from + (to - from) * Math.log(value / low) / Math.log(high / low);
  const x = (value) => scale(value, INTENSITY, left, right);
  const y = (value) => scale(value, range, bottom, top);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.height = `${height}px`;
  const scene = [];
  const line = (kind, x1, y1, x2, y2) => scene.push(svg_node("line", { class: kind, x1, y1, x2, y2 }));
  const text = (words, at_x, at_y, anchor = "middle", kind = "") =>
    scene.push(svg_node("text", { x: at_x, y: at_y, "text-anchor": anchor, class: kind }, words));
  const path = (kind, points) => scene.push(svg_node("polyline", {
    class: kind,
    points: points.map(([at, rate]) => `${x(at).toFixed(1)},${y(rate).toFixed(1)}`).join(" "),
  }));

  for (const at of decades(...INTENSITY)) {
    line("grid", x(at), top, x(at), bottom);
    text(at.toLocaleString("en"), x(at), bottom + 16);
  }
  for (const rate of decades(...range)) {
    line("grid", left, y(rate), right, y(rate));
    text(rate.toLocaleString("en", { maximumSignificantDigits: 1 }), left - 6, y(rate) + 4, "end");
  }
  text("operations a byte", (left + right) / 2, height - 6);
  text("Tera-op/s", 2, top - 3, "start");

  const ceilings = new Map(); // equal peaks share a line
  for (const [type, rate] of Object.entries(view.peaks)) {
    ceilings.set(rate, [...(ceilings.get(rate) ?? []), type]);
  }
  let label_y = Infinity;
  for (const [rate, types] of [...ceilings].sort(([a], [b]) => a - b)) {
    const own = types.includes(view.operands);
    if (!own) line("ceiling", x(Math.min(rate / view.bandwidth_tb_per_s, INTENSITY[1])), y(rate), right, y(rate));
    if (label_y - y(rate) > 13 || own) {
      text(types.join(", "), right, y(rate) - 5, "end", own ? "strong halo" : "halo");
      label_y = y(rate);
    }
  }
  const ridge = peak / view.bandwidth_tb_per_s;
  const roof = (share) => [ // from where it enters the picture
    [range[0] / (share * view.bandwidth_tb_per_s), range[0]], [ridge, share * peak],
    [INTENSITY[1], share * peak],
  ];
  line("ridge", x(ridge), y(peak), x(ridge), bottom);
  text(ridge.toLocaleString("en", { maximumSignificantDigits: 3 }), x(ridge), bottom - 6, "middle", "halo");
  path("roof", roof(1));
  path("trail", view.trail.map((p) => [p.intensity, p.tflops]));
  if (view.efficiency < 1) path("reached", roof(view.efficiency));
  const taken = [x(view.point.intensity)];
  for (const other of view.others) {
    const cx = x(other.intensity);
    scene.push(svg_node("circle", { class: "other", cx, cy: y(other.tflops), r: 4.5 }));
    if (taken.some((place) => Math.abs(place - cx) < 36)) continue; // words would cover each other
    taken.push(cx);
    text(other.label, cx + 9, y(other.tflops) + 15, "start", "halo");
  }
  svg.querySelector(".scene")?.remove();
  const group = svg_node("g", { class: "scene" });
  group.append(...scene);
  svg.prepend(group);

  let point = svg.querySelector(".point"); // kept, so that it moves
  if (!point) {
    point = svg_node("g", { class: "point" });
    point.append(svg_node("circle", { r: 8 }), svg_node("text", { class: "halo" }));
    svg.append(point);
  }
  const at_x = x(view.point.intensity);
  point.style.transform = `translate(${at_x}px, ${y(view.point.tflops)}px)`;
  const label = point.lastChild;
  label.textContent = view.point.label;
  // Above the roof's left flank nothing else is drawn; past the ridge there is room below.
  const past = view.point.intensity > ridge, room = at_x > 120;
  label.setAttribute("text-anchor", past ? "middle" : room ? "end" : "start");
  label.setAttribute("x", past ? Math.min(0, right - 55 - at_x) : room ? -10 : -6);
  label.setAttribute("y", past ? 26 : -15);
}
