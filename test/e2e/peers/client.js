// WebSocket clients by the Node package `ws`: each is greeted with its server's name, then sends messages of many sizes
// and compares what comes back. Prints one line of JSON: how many were open at once, echoes, and servers by name.
'use strict';
const WebSocket = require('ws');
const crypto = require('crypto');

const [url, count, rounds] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
const servers = {};
let echoes = 0, bytes = 0, open = 0, closed = 0;

function fail(why) {
  console.error(why);
  process.exit(1);
}

function all(what) {
  return Promise.all(Array.from({ length: count }, (_, i) => what(i)));
}

function connect() {
  return new Promise((resolve) => {
    const ws = new WebSocket(url, { perMessageDeflate: false });
    ws.on('error', (err) => fail(`error: ${err.message}`));
    ws.on('close', (code) => { closed++; if (code !== 1000) fail(`closed with ${code}`); });
    ws.once('message', (data) => {
      const name = data.toString();
      servers[name] = (servers[name] || 0) + 1;
      open++;
      resolve(ws);
    });
  });
}

function echo(ws, size) {
  return new Promise((resolve) => {
    const message = crypto.randomBytes(size);
    ws.once('message', (data) => {
      if (!message.equals(data)) fail(`an echo of ${size} bytes differs`);
      echoes++;
      bytes += size;
      resolve();
    });
    ws.send(message);
  });
}

(async () => {
  const sockets = await all(connect);
  const sizes = [0, 1, 125, 126, 1400, 4096, 65535, 65536];
  for (let round = 0; round < rounds; round++) {
    await all((i) => echo(sockets[i], sizes[(i + round) % sizes.length]));
  }
  await all((i) => new Promise((resolve) => { sockets[i].once('close', resolve); sockets[i].close(1000); }));
  console.log(JSON.stringify({ open, closed, echoes, bytes, servers }));
})().catch((err) => fail(String(err)));
