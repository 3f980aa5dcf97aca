// A client in another language, with nothing of ours but proto/.
//
//   node client.js PROTO_DIR TARGET
//
// Registers a linear model and data, opens a session, asks for one product, and prints
// it beside the value in closed form: H = 2/(N M) XᵀX per output under squared error.
'use strict';
const crypto = require('node:crypto');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const [protoDir, target] = process.argv.slice(2);
const definition = loader.loadSync(
  ['curvd/v1/session_service.proto', 'curvd/v1/curvature_service.proto'],
  { includeDirs: [protoDir], keepCase: true, longs: Number, enums: String, oneofs: true });
const { curvd } = grpc.loadPackageDefinition(definition);
const credentials = grpc.credentials.createInsecure();
const sessions = new curvd.v1.SessionService(target, credentials);
const curvature = new curvd.v1.CurvatureService(target, credentials);

const N = 20, D = 5, M = 2, CHUNK = 1 << 20;
let state = 12345;
const random = () => (state = (state * 1103515245 + 12345) % 2147483648) / 2147483648 - 0.5;
const matrix = (rows, columns) => Float64Array.from({ length: rows * columns }, random);

// safetensors: 8 bytes of length, JSON, payload.
function dump(tensors) {
  const entries = {}, payload = [];
  let offset = 0;
  for (const [name, [shape, data]] of Object.entries(tensors)) {
    const bytes = Buffer.from(data.buffer);
    entries[name] = { dtype: 'F64', shape, data_offsets: [offset, offset += bytes.length] };
    payload.push(bytes);
  }
  const json = Buffer.from(JSON.stringify(entries));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  return Buffer.concat([length, json, ...payload]);
}

function load(file, name) {
  const start = 8 + Number(file.readBigUInt64LE(0));
  const [from, to] = JSON.parse(file.subarray(8, start))[name].data_offsets;
  return new Float64Array(Uint8Array.from(file.subarray(start + from, start + to)).buffer);
}

function upload(method, header, field, file) {
  header[field] = {
    digest: crypto.createHash('sha256').update(file).digest('hex'),
    total_bytes: file.length,
  };
  const attempt = (offset) => new Promise((resolve, reject) => {
    const call = sessions[method]((error, response) => error ? reject(error) : resolve(response));
    header[field].offset = offset ?? 0;
    call.write({ header });
    if (offset !== undefined) {
      for (let i = offset; i < file.length; i += CHUNK) {
        call.write({ chunk: file.subarray(i, i + CHUNK) });
      }
    }
    call.end();
  });
  return attempt().then((asked) => asked.outcome === 'upload_needed'
    ? attempt(asked.upload_needed.committed_bytes || 0) : asked);
}

function matVec(sessionId, v) {
  return new Promise((resolve, reject) => {
    const call = curvature.MatVec(), chunks = [];
    call.on('data', (response) => response.part === 'chunk' && chunks.push(response.chunk));
    call.on('error', reject);
    call.on('end', () => resolve(load(Buffer.concat(chunks), 'result')));
    call.write({ header: { session_id: sessionId } });
    call.write({ chunk: dump({ v: [[v.length], v] }) });
    call.end();
  });
}

async function main() {
  const X = matrix(N, D), Y = matrix(N, M), W = matrix(M, D), v = matrix(M, D);
  const { model } = await upload('RegisterModel',
    { builder: 'mlp', config_json: JSON.stringify({ widths: [D, M], bias: false }) },
    'state', dump({ '1.weight': [[M, D], W] }));
  const { dataset } = await upload('RegisterDataset',
    { inputs: ['x'], target: 'y', batch_size: 7 },
    'tensors', dump({ x: [[N, D], X], y: [[N, M], Y] }));
  const { session } = await new Promise((resolve, reject) => sessions.CreateSession({
    model_id: model.id, dataset_id: dataset.id,
    loss: { name: 'LOSS_NAME_MSE' }, dtype: 'DTYPE_FLOAT64',
  }, (error, response) => error ? reject(error) : resolve(response)));

  const product = await matVec(session.id, v);
  let worst = 0;
  for (let m = 0; m < M; m++) for (let d = 0; d < D; d++) {
    let exact = 0;
    for (let n = 0; n < N; n++) {
      let inner = 0;
      for (let e = 0; e < D; e++) inner += X[n * D + e] * v[m * D + e];
      exact += 2 / (N * M) * X[n * D + d] * inner;
    }
    worst = Math.max(worst, Math.abs(exact - product[m * D + d]));
  }
  console.log(JSON.stringify({ size: product.length, worst }));
}

main().then(() => process.exit(0), (error) => { console.error(error); process.exit(1); });
