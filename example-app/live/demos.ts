import { once } from 'node:events';
import { type IncomingMessage, request } from 'node:http';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { type Request, Router } from 'express';
import { z } from 'zod';
import type { Journal, NewTransfer } from '../journal';
import { ALICE, WORLD } from '../seed';
import { bodyOf, id } from '../validation';

const Wanted = z.strictObject({ id, ms: z.int().min(0).max(3_000).default(200) });
const Crowd = z.strictObject({ ids: z.array(id).min(1).max(20) });

/** Together they are more than all the buffers hold on the way to a browser, which are some 10 MB. */
const CHUNKS = Array<string>(500).fill('A response that is long.\n'.repeat(2_560));

/** Routes that do what a ledger should not, for the buttons of the page. */
export function demos(journal: Journal): Router {
  const demos = Router();

  /** A handler that thinks nothing of an error: the row is there already, so what. But PostgreSQL has given up the transaction with it. */
  demos.post('/swallowed', async (req, res) => {
    const wanted = oneCent(bodyOf(req, Wanted).id);
    await journal.post(wanted);
    await req
      .session('transfers')
      .insert({ id: wanted.id, memo: 'once more' })
      .catch(() => {});
    res.status(201).json({ id: wanted.id });
  });

  /** Writes, and keeps its connection for a while. */
  demos.post('/slow', async (req, res) => {
    const { id, ms } = bodyOf(req, Wanted);
    await journal.post(oneCent(id));
    await req.session.raw('select pg_sleep(?)', [ms / 1_000]);
    res.status(201).json({ id });
  });

  /** Reads one row, and answers 32 MB. */
  demos.get('/large', async (req, res) => {
    const account = await req.session('accounts').where({ id: ALICE }).first();
    // no-store: else Chrome reads it all by itself, however slowly the page does.
    res.type('text').set({ 'X-Account': account?.name, 'Cache-Control': 'no-store' });
    await pipeline(Readable.from(CHUNKS), res);
  });

  /** Sends requests to `slow`, all at once, as so many clients would: a browser opens six connections to a server, and no more. */
  demos.post('/crowd', async (req, res) => {
    const { ids } = bodyOf(req, Crowd);
    res.json({ statuses: await Promise.all(ids.map((id) => askMyself(req, '/live/demo/slow', { id }))) });
  });

  return demos;
}

/** World may be overdrawn: the demo never runs out of money. */
const oneCent = (id: string): NewTransfer => ({ id, from: WORLD, to: ALICE, amount: 1n, memo: 'Demo' });

/** Posts on a connection of its own to the address that this request has come to. */
async function askMyself({ socket }: Request, path: string, body: object): Promise<number | undefined> {
  const outgoing = request({
    host: socket.localAddress,
    port: socket.localPort,
    path,
    agent: false,
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
  });
  outgoing.end(JSON.stringify(body));
  const [response] = (await once(outgoing, 'response')) as [IncomingMessage];
  response.resume();
  await once(response, 'end');
  return response.statusCode;
}
