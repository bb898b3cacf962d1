import { once } from 'node:events';
import { Transform } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import type { NextFunction, Request, Response } from 'express';
import type { Session } from '../lib';
import { type KindName, rowCounts, type Transfer } from './kinds';

type Handler = (req: Request, res: Response, next: NextFunction) => unknown;

/** Good handlers, careless ones, and broken ones. */
export const handlers: Record<KindName, Handler> = {
  async transfer(req, res) {
    await begin(req);
    await credit(req);
    created(req, res);
  },

  async unawaited(req, res) {
    await begin(req);
    for (const statement of creditStatements(req.session, req)) statement.catch(() => {});
    created(req, res);
  },

  async savepoint(req, res) {
    await begin(req);
    await req.session.transaction((savepoint) => savepoint.raw('SELECT 1/0')).catch(() => {});
    await req.session.transaction(async (savepoint) => {
      for (const statement of creditStatements(savepoint, req)) await statement;
    });
    created(req, res);
  },

  /** Long enough for its client to leave meanwhile. */
  async slow(req, res) {
    await begin(req);
    await req.session.raw('SELECT pg_sleep(0.1)');
    await sleep(20);
    await credit(req);
    created(req, res);
  },

  /** With `commitAt: 'end'`: bytes leave while the transaction is open. */
  async export(req, res) {
    await begin(req);
    startExport(req, res);
    await credit(req);
    res.end('\n');
  },

  async exportDeferred(req, res) {
    await begin(req, { failsAtCommit: true });
    startExport(req, res);
    await credit(req);
    res.end('\n');
  },

  async failing(req) {
    await begin(req);
    throw new Error('The application failed.');
  },

  async swallowed(req, res) {
    await begin(req);
    await req.session.raw('SELECT 1/0').catch(() => {});
    await credit(req).catch(() => {});
    created(req, res);
  },

  async deferred(req, res) {
    await begin(req, { failsAtCommit: true });
    await credit(req);
    created(req, res);
  },

  /** The application's own time limit answers, and the handler goes on. */
  async overtaken(req, res, next) {
    await begin(req);
    setTimeout(() => next(new Error('The application was too slow.')), 20);
    await req.session.raw('SELECT pg_sleep(0.06)');
    await credit(req);
    created(req, res);
  },

  /** The driver gives the statement up, while the server still works on it. */
  async givenUp(req, res) {
    await begin(req);
    await req.session.raw('SELECT pg_sleep(0.2)').options({ query_timeout: 50 });
    created(req, res);
  },

  async hung(req) {
    await begin(req);
    await new Promise(() => {});
  },

  async hungLate(req) {
    await begin(req);
    const { signal } = req.session;
    if (!signal.aborted) await once(signal, 'abort');
    await sleep(200);
    throw new Error('The application failed late.');
  },

  async hungStatement(req, res) {
    await begin(req);
    await req.session.raw('SELECT pg_sleep(60)');
    created(req, res);
  },

  async dryRun(req, res) {
    await begin(req);
    req.session.setRollbackOnly('dry run');
    res.json({ id: req.params['id'] });
  },

  async read(req, res) {
    const account = await req.session('accounts').where('id', 7).first();
    res.json({ id: req.params['id'], balance: account.balance });
  },

  unused(req, res) {
    res.json({ id: req.params['id'] });
  },

  async rows(req, res) {
    for await (const row of rowStream(req, rowCounts.rows)) res.write(`${row.number}\n`);
    res.end();
  },

  /** More than fits into the buffers between us and a client that reads slowly. */
  async manyRows(req, res) {
    const toLines = new Transform({
      writableObjectMode: true,
      transform: (row, _encoding, done) => done(null, `${String(row.number).padEnd(200, '.')}\n`),
    });
    await pipeline(rowStream(req, rowCounts.manyRows), toLines, res);
  },
};

export const rowsQuery = 'SELECT number FROM generate_series';

function rowStream(req: Request, count: number) {
  return req.session.raw(`${rowsQuery}(1, ?::int) AS number`, [count]).stream();
}

/** The first half of a transfer. */
async function begin(req: Request, { failsAtCommit = false } = {}): Promise<void> {
  const { from, amount } = req.body as Transfer;
  const id = req.params['id'];
  await req.session('transfers').insert({ id, fails_at_commit: failsAtCommit });
  await req.session('accounts').where('id', from).decrement('balance', amount);
  await req.session('entries').insert({ transfer: id, account: from, amount: -amount });
}

async function credit(req: Request): Promise<void> {
  for (const statement of creditStatements(req.session, req)) await statement;
}

function creditStatements(session: Pick<Session, 'raw'>, req: Request) {
  const { to, amount } = req.body as Transfer;
  return [
    session.raw('UPDATE accounts SET balance = balance + ? WHERE id = ?', [amount, to]),
    session.raw('INSERT INTO entries (transfer, account, amount) VALUES (?, ?, ?)', [req.params['id'] as string, to, amount]),
  ];
}

function created(req: Request, res: Response): void {
  res.status(201).json({ id: req.params['id'] });
}

function startExport(req: Request, res: Response): void {
  res.status(201).type('text');
  res.write(`${req.params['id']}\n`);
}
