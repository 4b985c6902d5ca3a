// The law of decoding, as ternax/roofline.py, formats.py, anatomy.py and prediction.py have it:
// a function here has its Python twin's name, arguments and units, and a test holds their
// results equal. Only plain numbers and the tables of the generator come in.
"use strict";

// Bytes of a matrix of n outputs with k weights each.
function nbytes(format, k, n) {
  const scales = format.scale_group > 0 ? n * Math.ceil(k / format.scale_group)
    : format.scale_group === 0 ? n : 1;
  return (k * n * format.code_bits + scales * format.scale_bits) / 8;
}

// Name, K and N of one layer's projections.
function matrices(shape) {
  const inner = shape.num_heads * shape.head_dim;
  const kv = shape.num_kv_heads * shape.head_dim;
  const hidden = shape.hidden_size, mlp = shape.intermediate_size;
  const gated = shape.mlp_matrices === 3 ? [["mlp.gate", hidden, mlp]] : [];
  return [
    ["attn.q", hidden, inner], ["attn.k", hidden, kv], ["attn.v", hidden, kv],
    ["attn.o", inner, hidden], ...gated, ["mlp.up", hidden, mlp], ["mlp.down", mlp, hidden],
  ];
}

function norm_parameters(shape) {
  const inner = shape.num_heads * shape.head_dim + shape.intermediate_size;
  const a_layer = 2 * shape.hidden_size + (shape.sub_norms ? inner : 0);
  return shape.num_layers * a_layer + shape.hidden_size;
}

function kv_bytes_per_token(shape, kv) {
  const values = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim;
  return kv.name === "int8" ? values + 4 * values / shape.head_dim : values * kv.code_bits / 8;
}

// What a decode step reads and computes; the three formats store projections, tables, cache.
function load_of(shape, weights, tables, kv) {
  const layer = matrices(shape);
  const macs = shape.num_layers * layer.reduce((sum, [, k, n]) => sum + k * n, 0);
  const stored = layer.reduce((sum, [, k, n]) => sum + nbytes(weights, k, n), 0);
  const table = nbytes(tables, shape.hidden_size, shape.vocab_size);
  return {
    projection_bytes: shape.num_layers * stored + 4 * norm_parameters(shape),
    head_bytes: table,
    embedding_bytes: shape.tie_embeddings ? 0 : table,
    embedding_row_bytes: nbytes(tables, shape.hidden_size, 1),
    kv_bytes_per_token: kv_bytes_per_token(shape, kv),
    projection_macs: macs,
    head_macs: shape.vocab_size * shape.hidden_size,
    attention_macs_per_token: 2 * shape.num_layers * shape.num_heads * shape.head_dim,
    all_reduces: 2 * shape.num_layers,
    all_reduce_bytes: 2 * shape.hidden_size,
  };
}

const weight_bytes = (load) => load.projection_bytes + load.head_bytes + load.embedding_bytes;
const read_bytes = (load) => load.projection_bytes + load.head_bytes;
const read_s = (bytes, bandwidth_gb_per_s) => bytes / (bandwidth_gb_per_s * 1e9);
const compute_s = (macs, peak_tflops) => 2 * macs / (peak_tflops * 1e12);

function all_reduce_s(bytes, devices, link_gb_per_s) {
  return devices === 1 ? 0 : 2 * (devices - 1) / devices * bytes / (link_gb_per_s * 1e9);
}

function step_macs(load, batch, context) {
  return batch * (load.projection_macs + load.head_macs + context * load.attention_macs_per_token);
}

function step_bytes(load, batch, context) {
  const a_row = context * load.kv_bytes_per_token + load.embedding_row_bytes;
  return read_bytes(load) + batch * a_row;
}

const intensity = (load, batch, context) =>
  2 * step_macs(load, batch, context) / step_bytes(load, batch, context);

// Seconds of a step by part.
function decode_step(load, device, peak_tflops, { batch, context, devices, efficiency }) {
  const bandwidth = device.bandwidth_gb_per_s * efficiency * devices;
  const weights_s = read_s(load.projection_bytes, bandwidth);
  const head_s = read_s(load.head_bytes, bandwidth);
  const kv_s = read_s(batch * context * load.kv_bytes_per_token, bandwidth);
  const activations_s = read_s(batch * load.embedding_row_bytes, bandwidth);
  const computing = compute_s(step_macs(load, batch, context), peak_tflops * efficiency * devices);
  const sent = batch * load.all_reduce_bytes;
  const memory_s = weights_s + kv_s + head_s + activations_s;
  const extra_s = Math.max(0, computing - memory_s);
  // A bridge joins two; more talk over the bus.
  const link_gb_per_s = devices > (device.link_joins ?? 1) ? device.pcie.gb_per_s : device.link_gb_per_s;
  const collectives_s = load.all_reduces * all_reduce_s(sent, devices, link_gb_per_s);
  const total_s = memory_s + extra_s + collectives_s;
  return { weights_s, kv_s, head_s, activations_s, compute_s: extra_s, collectives_s, total_s,
    memory_s, tokens_per_s: batch / total_s };
}

// The part that takes most.
function limit(step) {
  if (step.compute_s > 0 && step.compute_s + step.memory_s > step.total_s / 2) return "compute";
  const parts = ["weights", "kv", "head", "activations", "collectives"];
  return parts.reduce((most, part) => step[`${part}_s`] > step[`${most}_s`] ? part : most);
}

function prefill_s(load, bandwidth_gb_per_s, peak_tflops, tokens, devices) {
  const macs = tokens * load.projection_macs + load.head_macs
    + tokens * tokens / 2 * load.attention_macs_per_token;
  const bytes = read_bytes(load) + tokens * load.kv_bytes_per_token;
  return Math.max(read_s(bytes, bandwidth_gb_per_s * devices), compute_s(macs, peak_tflops * devices));
}

function critical_batch(load, bandwidth_gb_per_s, peak_tflops, context) {
  const macs = load.projection_macs + load.head_macs + context * load.attention_macs_per_token;
  const read_a_row = context * load.kv_bytes_per_token + load.embedding_row_bytes;
  const a_row = compute_s(macs, peak_tflops) - read_s(read_a_row, bandwidth_gb_per_s);
  return a_row > 0 ? read_s(read_bytes(load), bandwidth_gb_per_s) / a_row : Infinity;
}

const critical_intensity = (bandwidth_gb_per_s, peak_tflops) => peak_tflops * 1e3 / bandwidth_gb_per_s;

function batch_that_fits(load, memory_bytes, context) {
  const free = memory_bytes - weight_bytes(load);
  return Math.max(0, Math.floor(free / (context * load.kv_bytes_per_token)));
}

// The type that multiplies operands of `wanted`: itself, or the next wider one.
function operands_of(device, wanted, wider) {
  while (!(wanted in device.peak_tflops)) wanted = wider[wanted];
  return wanted;
}

// All of it for one setting. `tables` are the generator's: models, devices, formats, wider.
// `setting` names model, weights, tables, kv and device, and counts devices, batch, context.
function predict(tables, setting) {
  const device = tables.devices[setting.device], weights = tables.formats[setting.weights];
  const load = load_of(tables.models[setting.model], weights, tables.formats[setting.tables],
    tables.formats[setting.kv]);
  const { batch, context, devices, efficiency } = setting;
  const operands = operands_of(device, weights.operands, tables.wider);
  const peak_tflops = device.peak_tflops[operands], bandwidth = device.bandwidth_gb_per_s;
  const step = decode_step(load, device, peak_tflops, setting);
  const step_operations = 2 * step_macs(load, batch, context);
  const memory_bytes = devices * device.memory_bytes_at_most;
  const cache_bytes = batch * context * load.kv_bytes_per_token;
  const resident_bytes = weight_bytes(load) + cache_bytes;
  return {
    weights_s: step.weights_s, head_s: step.head_s, kv_s: step.kv_s,
    activations_s: step.activations_s, compute_s: step.compute_s,
    collectives_s: step.collectives_s, total_s: step.total_s,
    tokens_per_s: step.tokens_per_s, tokens_per_s_each: step.tokens_per_s / batch,
    limit: limit(step), operands, peak_tflops,
    step_bytes: step_bytes(load, batch, context), step_operations,
    intensity: intensity(load, batch, context),
    critical_intensity: critical_intensity(bandwidth, peak_tflops),
    critical_batch: critical_batch(load, bandwidth, peak_tflops, context),
    attained_tflops: step_operations / step.total_s / 1e12,
    weight_bytes: weight_bytes(load), cache_bytes, resident_bytes, memory_bytes,
    batch_that_fits: batch_that_fits(load, memory_bytes, context),
    fits: resident_bytes <= memory_bytes,
    prefill_s: prefill_s(load, bandwidth * efficiency, peak_tflops * efficiency, context, devices),
    joules_per_token: devices * device.watts / step.tokens_per_s,
    usd_per_million_tokens: device.usd_per_h === null ? null
      : devices * device.usd_per_h / (3600 * step.tokens_per_s) * 1e6,
  };
}
