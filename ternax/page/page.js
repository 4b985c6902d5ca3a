// The page itself: controls and address to a setting, a setting to numbers and charts.
"use strict";

const { tables, start, choices, ranges } = JSON.parse(document.getElementById("data").textContent);
const PARTS = {
  weights: "reading the projections", head: "reading the head", kv: "reading the KV cache",
  activations: "reading embedding rows", compute: "computing beyond the reading",
  collectives: "all-reduces between devices",
};
const by_id = (id) => document.getElementById(id);

// Numbers for people: three digits, thousands apart.
const digits = (value, count = 3) => value >= 1000 ? Math.round(value).toLocaleString("en")
  : value.toLocaleString("en", { maximumSignificantDigits: count });
const seconds = (s) => {
  const [unit, length] = [["s", 1], ["ms", 1e-3], ["µs", 1e-6]].find(([, one]) => s >= one) ?? ["ns", 1e-9];
  return `${digits(s / length)} ${unit}`;
};
const size = (bytes) => bytes >= 2 ** 30 ? `${digits(bytes / 2 ** 30)} GiB` : `${digits(bytes / 2 ** 20)} MiB`;
const percent = (share) => share > 0 && share < 0.001 ? "< 0.1 %" : `${digits(100 * share, share < 0.1 ? 2 : 3)} %`;
const SHOWN = {
  tokens_per_s: digits, tokens_per_s_each: digits, total_s: seconds, prefill_s: seconds, intensity: digits,
  critical_intensity: digits, attained_tflops: digits, weight_bytes: size, cache_bytes: size,
  critical_batch: (rows) => rows === Infinity ? "none at this context" : `${digits(rows)} sequences`,
  batch_that_fits: digits, joules_per_token: digits,
  usd_per_million_tokens: (usd) => usd === null ? "no price known" : `$${digits(usd)} a million tokens`,
};

// Rounded to the steps of people who turn knobs: 1, 2, 3, 4, 6, 8, 12, ...
const grid = (most) => {
  const found = [1, 2, 3];
  for (let power = 4; power <= most; power *= 2) found.push(power, power * 1.5);
  return found.filter((value) => value <= most);
};
const GRIDS = { batch: grid(ranges.batch[1]), context: grid(ranges.context[1]) };
const nearest = (values, value) => values.reduce((best, one, index) =>
  Math.abs(Math.log(one / value)) < Math.abs(Math.log(values[best] / value)) ? index : best, 0);

let setting = { ...start };
let left_out = ""; // what the address asked for and is not there, in words

// What the address says, where it says something that can be.
function from_address() {
  const refused = [];
  for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
    const value = Object.hasOwn(choices, name) ? choices[name].find((one) => String(one) === text)
      : Object.hasOwn(ranges, name) ? amount(name, text) : null;
    if (value !== undefined && value !== null) setting[name] = value;
    else refused.push(`${name}=${text}`.slice(0, 40) + (Object.hasOwn(start, name) ? "" : " (no such key)"));
  }
  const alone = possible(setting);
  if (alone.devices !== setting.devices) refused.push(`devices=${setting.devices} (${alone.device} has no link)`);
  setting = alone;
  left_out = refused.length === 0 ? "" : `Left out of the address: ${refused.slice(0, 3).join(", ")}`
    + `${refused.length > 3 ? ` and ${refused.length - 3} more` : ""}.`;
}

function amount(name, text) {
  const value = Number(text);
  const [low, high] = ranges[name];
  return value >= low && value <= high && (name === "efficiency" || Number.isInteger(value)) ? value : null;
}

function fill(id, options) {
  by_id(id).replaceChildren(...options.map(([value, words]) => new Option(words, value)));
}

function make_controls() {
  const bits = (name) => `${name}, ${digits(tables.formats[name].bits_per_weight)} bits`;
  fill("model", Object.values(tables.models).map((m) => [m.name, `${m.name}, ${digits(m.parameters / 1e9)} B parameters`]));
  for (const id of ["weights", "tables", "kv"]) {
    fill(id, choices[id].map((name) => [name, bits(name)]));
  }
  fill("device", Object.values(tables.devices).map((d) => [d.name, d.title]));
  fill("devices", choices.devices.map((count) => [count, String(count)]));
  for (const [name, [min, max]] of Object.entries(ranges)) {
    for (const id of [name, `${name}-range`]) Object.assign(by_id(id), { min, max });
  }
  for (const [name, values] of Object.entries(GRIDS)) {
    Object.assign(by_id(`${name}-range`), { min: 0, max: values.length - 1, step: 1 });
  }
  for (const id of Object.keys(choices)) {
    by_id(id).addEventListener("change", (event) => {
      change({ [id]: id === "devices" ? Number(event.target.value) : event.target.value });
    });
  }
  for (const id of Object.keys(ranges)) {
    by_id(id).addEventListener("input", (event) => {
      const value = amount(id, event.target.value);
      by_id("message").textContent = value === null
        ? `${id}: from ${event.target.min} to ${event.target.max}, found “${event.target.value}”` : "";
      if (value !== null) change({ [id]: value }, id);
    });
    by_id(`${id}-range`).addEventListener("input", (event) => {
      const at = Number(event.target.value);
      change({ [id]: id in GRIDS ? GRIDS[id][at] : at });
    });
  }
}

// A device without a link stands alone.
function possible(wanted) {
  return tables.devices[wanted.device].link === null ? { ...wanted, devices: 1 } : wanted;
}

function change(changes, typing) {
  setting = possible({ ...setting, ...changes });
  left_out = "";
  history.replaceState(null, "", `#${new URLSearchParams(setting)}`);
  show(typing);
}

function show_controls(typing) {
  for (const id of Object.keys(choices)) by_id(id).value = setting[id];
  for (const id of Object.keys(ranges)) {
    if (id !== typing) by_id(id).value = setting[id]; // never under the fingers
    const range = by_id(`${id}-range`);
    range.value = id in GRIDS ? nearest(GRIDS[id], setting[id]) : setting[id];
    range.setAttribute("aria-valuetext", digits(setting[id]));
  }
  by_id("devices").disabled = tables.devices[setting.device].link === null;
  const most = tables.models[setting.model].max_context;
  if (typing === undefined || by_id("message").textContent === "") {
    const past = setting.context > most
      ? `${setting.model} was made for ${digits(most)} positions: this context is past them.` : "";
    by_id("message").textContent = [left_out, past].filter(Boolean).join(" ");
  }
}

function show_step(found) {
  const parts = Object.keys(PARTS).map((part) => [part, found[`${part}_s`]]);
  draw_bar(by_id("step-bar"), parts, found.total_s);
  const told = parts.map(([part, s]) => `${PARTS[part]} ${percent(s / found.total_s)}`);
  by_id("step-bar").setAttribute("aria-label", `Predicted split of a step: ${told.join(", ")}`);
  by_id("step-table").tBodies[0].replaceChildren(...parts.map(([part, s]) => {
    const row = document.createElement("tr");
    row.className = s === 0 ? "nothing" : "";
    const key = document.createElement("i");
    key.className = `key ${part}`;
    const head = row.insertCell();
    head.append(key, PARTS[part]);
    row.insertCell().textContent = s === 0 ? "0" : seconds(s);
    row.insertCell().textContent = percent(s / found.total_s);
    return row;
  }));
  const bandwidth = tables.devices[setting.device].bandwidth_gb_per_s * setting.devices * setting.efficiency;
  by_id("equation").textContent = `${digits(found.step_bytes / 1e9)} GB read at ${digits(bandwidth)} GB/s: `
    + `${seconds(found.step_bytes / bandwidth / 1e9)}; ${digits(found.step_operations / 1e12)} Tera-op in ${found.operands} at `
    + `${digits(found.peak_tflops * setting.devices * setting.efficiency)} Tera-op/s: `
    + `${seconds(found.step_operations / (found.peak_tflops * setting.devices * setting.efficiency * 1e12))}; `
    + `the longer one counts${found.collectives_s > 0 ? ", and the all-reduces" : ""}.`;
}

function show_headline(found) {
  const bound = setting.efficiency === 1;
  by_id("kind").textContent = bound ? "predicted bound: no program is faster" : `predicted at ${percent(setting.efficiency)} of both limits`;
  const why = found.limit === "compute" ? `Computing is the limit: a larger batch adds no speed.`
    : found.limit === "collectives" ? "The link between the devices is the limit."
    : `Memory is the limit: ${PARTS[found.limit]} takes ${percent(found[`${found.limit}_s`] / found.total_s)} of a step.`;
  by_id("strip").textContent = `${digits(found.tokens_per_s)} tokens/s predicted, ${found.fits ? "fits" : "does not fit"}`;
  const name = `${setting.devices > 1 ? `${setting.devices} × ` : ""}${tables.devices[setting.device].title}`;
  by_id("verdict").textContent = `${setting.model} in ${setting.weights} on ${name}, `
    + `${digits(setting.batch)} ${setting.batch === 1 ? "sequence" : "sequences"} of ${digits(setting.context)} tokens. ${why}`
    + (found.fits ? "" : " But it does not fit into memory.");
}

function show_roofline(found) {
  const device = tables.devices[setting.device];
  const at = (changes) => {
    const other = predict(tables, { ...setting, ...changes });
    return { intensity: other.intensity, tflops: other.attained_tflops };
  };
  const others = ["fp16", "int4", "trit2"].filter((name) => name !== setting.weights);
  const svg = by_id("roof");
  draw_roofline(svg, {
    bandwidth_tb_per_s: device.bandwidth_gb_per_s * setting.devices / 1e3,
    peaks: Object.fromEntries(Object.entries(device.peak_tflops).map(([type, rate]) => [type, rate * setting.devices])),
    operands: found.operands,
    efficiency: setting.efficiency,
    point: { intensity: found.intensity, tflops: found.attained_tflops, label: `${setting.weights}, batch ${digits(setting.batch)}` },
    others: others.map((weights) => ({ ...at({ weights }), label: weights })),
    trail: GRIDS.batch.map((batch) => at({ batch })),
  });
  svg.setAttribute("aria-label", `Roofline, predicted: ${digits(found.intensity)} operations a byte attain `
    + `${digits(found.attained_tflops)} Tera-op/s; both limits meet at ${digits(found.critical_intensity)}`);
}

function show_memory(found) {
  const whole = Math.max(found.memory_bytes, found.resident_bytes) * 1.02;
  draw_bar(by_id("memory-bar"), [["weights", found.weight_bytes], ["kv", found.cache_bytes]], whole, found.memory_bytes);
  const limit = `${size(found.memory_bytes)} at most on ${setting.devices === 1 ? "this device" : `these ${setting.devices} devices`}`;
  by_id("memory-limit").textContent = `The line: ${limit}.`;
  by_id("memory-bar").setAttribute("aria-label", `Predicted memory: weights ${size(found.weight_bytes)}, `
    + `cache ${size(found.cache_bytes)}, ${limit}`);
  const verdict = by_id("memory-verdict");
  verdict.className = found.fits ? "good" : "bad";
  verdict.textContent = found.fits
    ? `Fits: ${size(found.resident_bytes)}, ${size(found.memory_bytes - found.resident_bytes)} to spare.`
    : `Does not fit: ${size(found.resident_bytes)}, ${size(found.resident_bytes - found.memory_bytes)} too much.`;
}

// One change each: formats, cache, batch, context, devices, device.
function levers() {
  const { batch, context, devices } = setting;
  const fastest = Object.values(tables.devices).reduce((a, b) => b.bandwidth_gb_per_s > a.bandwidth_gb_per_s ? b : a);
  return [
    ...["fp16", "int4", "trit2", "sherry"].map((weights) => [`weights in ${weights}`, { weights }]),
    ["tables in int8", { tables: "int8" }],
    ["KV cache in int8", { kv: "int8" }],
    [`batch ${digits(4 * batch)}`, { batch: 4 * batch }],
    [`context ${digits(Math.ceil(context / 4))}`, { context: Math.ceil(context / 4) }],
    [`${2 * devices} devices`, { devices: 2 * devices }],
    [`on ${fastest.title}`, { device: fastest.name }],
  ].filter(([, changes]) => {
    const other = possible({ ...setting, ...changes });
    const within = other.batch <= ranges.batch[1] && choices.devices.includes(other.devices);
    return within && Object.keys(changes).some((name) => other[name] !== setting[name]);
  });
}

function show_levers(found) {
  by_id("levers").tBodies[0].replaceChildren(...levers().map(([words, changes]) => {
    const other = predict(tables, possible({ ...setting, ...changes }));
    const row = document.createElement("tr");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = words;
    button.addEventListener("click", () => change(changes));
    row.insertCell().append(button);
    row.insertCell().textContent = digits(other.tokens_per_s);
    row.insertCell().textContent = `× ${digits(other.tokens_per_s / found.tokens_per_s)}`;
    const fits = row.insertCell();
    fits.textContent = other.fits ? "fits" : "too much";
    fits.className = other.fits ? "" : "bad";
    return row;
  }));
}

function show_sources() {
  const device = tables.devices[setting.device], format = tables.formats[setting.weights];
  by_id("price").textContent = device.usd_per_h === null ? `Rated power ${device.watts} W.`
    : `Rated power ${device.watts} W; $${device.usd_per_h} an hour for one. Price: ${device.price_source}.`;
  by_id("sources").textContent = `${device.title}: ${device.source}. Format ${format.name}: ${format.source}`
    + `${format.cpu_only ? "; no accelerator kernel for it is published" : ""}. Link: ${device.link ?? "none"}`
    + `${device.link ? `, ${device.link_gb_per_s} GB/s one way` : ""}.`;
}

function show(typing) {
  const found = predict(tables, setting);
  show_controls(typing);
  for (const output of document.querySelectorAll("output[data-of]")) {
    const value = found[output.dataset.of];
    output.textContent = SHOWN[output.dataset.of](value);
    output.dataset.value = value;
  }
  show_headline(found);
  show_step(found);
  show_roofline(found);
  show_memory(found);
  show_levers(found);
  show_sources();
}

make_controls();
from_address();
show();
addEventListener("resize", () => show_roofline(predict(tables, setting)));
addEventListener("hashchange", () => { from_address(); show(); });
