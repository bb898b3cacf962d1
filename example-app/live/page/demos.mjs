// @ts-nocheck: it runs in the browser, of which the app has no types.

const [WORLD, ALICE, BOB] = ['1', 'a', 'b'].map((digit) => `00000000-0000-4000-8000-00000000000${digit}`);
const SLOW_READER = 10_000_000; // bytes a second

/**
 * What the buttons do. Each `run` sends its requests, looks in the database by the ledger's own `GET /transfers/:id`, and says what the
 * client got, what is in the database, and why.
 *
 * `find` gives the latest request of the time line for which something is true.
 */
export const demos = [
  {
    name: 'transfer',
    title: 'Make a transfer',
    what: 'Two rows that belong together, then 201.',
    async run() {
      const id = newId();
      const client = await post('/transfers', { id, from: WORLD, to: ALICE, amount: 1 });
      return { client, database: await lookUp(id), why: 'COMMIT came first, then the 201: what the client is told is true.' };
    },
  },
  {
    name: 'commit-fails',
    title: 'Let COMMIT fail',
    what: 'Alice sends more than she has. Only a deferred constraint sees it, at COMMIT, after the handler has sent its 201.',
    async run() {
      const id = newId();
      const client = await post('/transfers', { id, from: ALICE, to: BOB, amount: 999_999_999_999 });
      const why = 'The handler’s 201 was held until COMMIT. COMMIT failed, so it never left: the client got this in its place.';
      return { client, database: await lookUp(id), why };
    },
  },
  {
    name: 'swallowed',
    title: 'Swallow an error',
    what: 'A statement fails, the handler catches the error, shrugs, and answers 201.',
    async run() {
      const id = newId();
      const client = await post('/live/demo/swallowed', { id });
      const why = 'PostgreSQL gave up the transaction at the first error, so its COMMIT would store nothing. The 201 became a 500.';
      return { client, database: await lookUp(id), why };
    },
  },
  {
    name: 'disconnect',
    title: 'Go away',
    what: 'The handler has written and runs a statement of 1.5 s. The client leaves after half a second.',
    async run(find) {
      const id = newId();
      const client = await post('/live/demo/slow', { id, ms: 1_500 }, { signal: AbortSignal.timeout(500) }).catch((error) => {
        if (error.name !== 'TimeoutError') throw error;
        return 'nothing: it went away';
      });
      await delay(1_300); // Beyond the time at which it would have been stored.
      const { heldMs } = find(({ reason }) => reason === 'disconnect') ?? {};
      const after = heldMs === undefined ? '' : ` The connection was free again after ${Math.round(heldMs)} ms.`;
      return { client, database: await lookUp(id), why: `The running statement was cancelled, and its work rolled back.${after}` };
    },
  },
  {
    name: 'twenty',
    title: 'Twenty at once',
    what: 'Twenty clients, a pool of five, and 0.2 s of work for each.',
    async run() {
      const ids = Array.from({ length: 20 }, newId);
      const since = performance.now();
      // By the server: a browser opens six connections to a server, and no more.
      const response = await send('/live/demo/crowd', { method: 'POST', body: { ids }, isShown: false });
      const { statuses } = await response.json();
      const ms = Math.round(performance.now() - since);
      const stored = (await Promise.all(ids.map(isStored))).filter(Boolean).length;
      const why = `Five run, the others wait, and each gives its connection back before its response leaves: all were served in ${ms} ms.`;
      return { client: countsOf(statuses), database: `${stored} of 20 stored`, why };
    },
  },
  {
    name: 'slow-reader',
    title: 'Read slowly',
    what: 'One row is read from the database, then 32 MB are sent to a client that takes its time.',
    async run(find) {
      const since = performance.now();
      const response = await send('/live/demo/large');
      const bytes = await readSlowly(response.body.getReader());
      const seconds = ((performance.now() - since) / 1_000).toFixed(1);
      const { heldMs } = find(({ id }) => id === response.headers.get('x-request-id')) ?? {};
      const held = heldMs === undefined ? 'before the response left' : `after ${Math.round(heldMs)} ms, before the response left`;
      return {
        client: `${response.status} ${response.statusText}: ${Math.round(bytes / 1e6)} MB in ${seconds} s`,
        database: 'nothing new: it was only read',
        why: `The connection was back ${held}. A slow reader costs a socket, and no connection.`,
      };
    },
  },
];

async function post(path, body, options) {
  const response = await send(path, { method: 'POST', body, ...options });
  const { status, statusText } = response;
  const { title } = await response.json();
  return title && title !== statusText ? `${status} ${statusText}: ${title}` : `${status} ${statusText}`;
}

/** @param isShown whether the time line shows it */
function send(path, { body, isShown = true, ...options } = {}) {
  const headers = { ...(body && { 'content-type': 'application/json' }), ...(!isShown && { 'live-page': 'hidden' }) };
  return fetch(path, { cache: 'no-store', ...options, headers, ...(body && { body: JSON.stringify(body) }) });
}

async function isStored(id) {
  const response = await send(`/transfers/${id}`, { isShown: false });
  if (response.status !== 200 && response.status !== 404) throw new Error(`The look-up was answered with ${response.status}.`);
  return response.status === 200;
}

const lookUp = async (id) => ((await isStored(id)) ? 'stored' : 'not stored');

async function readSlowly(reader) {
  const since = performance.now();
  for (let bytes = 0; ; ) {
    const { done, value } = await reader.read();
    if (done) return bytes;
    bytes += value.length;
    const aheadMs = (bytes / SLOW_READER) * 1_000 - (performance.now() - since);
    if (aheadMs > 20) await delay(aheadMs);
  }
}

/** Such as '20 × 201'. */
function countsOf(statuses) {
  const counts = new Map();
  for (const status of statuses) counts.set(status, (counts.get(status) ?? 0) + 1);
  return [...counts].map(([status, count]) => `${count} × ${status}`).join(', ');
}

const delay = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** A UUID. `crypto.randomUUID` is missing where the page is not opened by https, nor on localhost: on a phone, say. */
function newId() {
  const hex = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, '0')).join('');
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-4${hex.slice(13, 16)}-a${hex.slice(17, 20)}-${hex.slice(20)}`;
}
