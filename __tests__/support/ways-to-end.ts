import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Request, Response } from 'express';
import { type AtCommit, type Handler, insert } from './ledger';

/** A way in which a request may end, and what must be true of it. */
export interface WayToEnd {
  name: string;
  /** Writes the notes of {@link bothOf}, if any, and ends the request in this way. */
  handler: Handler;
  /** What a client is told that stays; none if it is cut off. */
  status?: number;
  /** What must be in the database: both notes, neither, or (when nobody can know) either both or neither. */
  stored: 'both' | 'neither' | 'both or neither';
  /** The connection is cut, or closed behind the response: another request must not be waiting for it. */
  endsConnection?: true;
  /** The response never comes to its end. */
  isCut?: true;
}

/** The ids of the two notes that a request writes. */
export function bothOf(id: string): [string, string] {
  return [`${id} first`, `${id} second`];
}

const idOf = (req: Request): string => String(req.query['id']);

async function write(req: Request, atCommit?: AtCommit): Promise<void> {
  const [first, second] = bothOf(idOf(req));
  await insert(req, first, atCommit);
  for (let turns = Number(req.query['pause'] ?? 0); turns > 0; turns--) await nextTurn();
  await insert(req, second);
}

/** Writes both notes, then ends. */
const afterWriting =
  (end: Handler, atCommit?: AtCommit): Handler =>
  async (req, res, next) => {
    await write(req, atCommit);
    return end(req, res, next);
  };

const answer =
  (status: number): Handler =>
  (_req, res) =>
    void res.status(status).json({ ok: true });

const fail = (properties: object = {}): never => {
  throw Object.assign(new Error('mine'), properties);
};

export const waysToEnd: WayToEnd[] = [
  ...[200, 201, 204].map((status): WayToEnd => ({ name: `a ${status}`, handler: afterWriting(answer(status)), status, stored: 'both' })),
  { name: 'a redirect', handler: afterWriting((_req, res) => res.redirect(303, '/')), status: 303, stored: 'both' },
  ...[400, 409, 500].map((status): WayToEnd => ({ name: `a ${status}`, handler: afterWriting(answer(status)), status, stored: 'neither' })),
  { name: 'a throw', handler: afterWriting(() => fail()), status: 500, stored: 'neither' },
  { name: 'next(error)', handler: afterWriting((_req, _res, next) => next(new Error('mine'))), status: 500, stored: 'neither' },
  {
    name: 'a throw that the error handler answers with 200',
    handler: afterWriting(() => fail({ status: 200 })),
    status: 200,
    stored: 'neither',
  },
  {
    name: 'a throw beside a statement that nobody awaits',
    handler: async (req) => {
      write(req).catch(() => {});
      fail();
    },
    status: 500,
    stored: 'neither',
  },
  {
    name: 'a failing statement',
    handler: afterWriting((req) => insert(req, bothOf(idOf(req))[0])),
    status: 500,
    stored: 'neither',
  },
  {
    name: 'a swallowed error, then a 200',
    handler: afterWriting(async (req, res) => {
      await insert(req, bothOf(idOf(req))[0]).catch(() => {});
      res.sendStatus(200);
    }),
    status: 500,
    stored: 'neither',
  },
  {
    name: 'setRollbackOnly(), then a 200',
    handler: afterWriting((req, res) => {
      req.session.setRollbackOnly();
      res.sendStatus(200);
    }),
    status: 200,
    stored: 'neither',
  },
  { name: 'a COMMIT that fails', handler: afterWriting(answer(201), 'fail'), status: 500, stored: 'neither' },
  { name: 'a serialization failure at COMMIT', handler: afterWriting(answer(201), 'conflict'), status: 500, stored: 'neither' },
  { name: 'a connection lost during COMMIT', handler: afterWriting(answer(201), 'die'), status: 500, stored: 'both or neither' },
  {
    name: 'a connection lost during a statement',
    handler: afterWriting((req) => req.session.raw('SELECT pg_terminate_backend(pg_backend_pid())')),
    status: 500,
    stored: 'neither',
  },
  { name: 'a 200 without a statement', handler: answer(200), status: 200, stored: 'neither' },
  { name: 'a throw without a statement', handler: () => fail(), status: 500, stored: 'neither' },
  {
    name: "the handler's commit(), then a 400",
    handler: afterWriting((req, res) => req.session.commit().then(() => res.sendStatus(400))),
    status: 400,
    stored: 'both',
  },
  {
    name: "the handler's commit(), then a throw",
    handler: afterWriting((req) => req.session.commit().then(() => fail())),
    status: 500,
    stored: 'both',
  },
  {
    name: "the handler's commit() that fails, then a 409",
    handler: afterWriting((req, res) => req.session.commit().catch(() => res.sendStatus(409)), 'fail'),
    status: 409,
    stored: 'neither',
  },
  {
    name: "the handler's rollback(), then a 200",
    handler: afterWriting((req, res) => req.session.rollback().then(() => res.sendStatus(200))),
    status: 200,
    stored: 'neither',
  },
  {
    name: 'statements that nobody awaits, then a 201',
    handler: (req, res) => {
      for (const id of bothOf(idOf(req))) insert(req, id).catch(() => {});
      res.sendStatus(201);
    },
    status: 201,
    stored: 'both',
  },
  {
    name: 'statements issued together',
    handler: async (req, res) => {
      await Promise.all(bothOf(idOf(req)).map((id) => insert(req, id)));
      res.sendStatus(201);
    },
    status: 201,
    stored: 'both',
  },
  {
    name: 'a savepoint that is rolled back, then a 201',
    handler: afterWriting(async (req, res) => {
      await req.session
        .transaction(async (trx) => {
          await trx('notes').insert({ id: `${idOf(req)} undone` });
          fail();
        })
        .catch(() => {});
      res.sendStatus(201);
    }),
    status: 201,
    stored: 'both',
  },
  {
    name: 'a savepoint left open, then a 201',
    handler: afterWriting(async (req, res) => {
      await req.session.transaction();
      res.sendStatus(201);
    }),
    status: 500,
    stored: 'neither',
  },
  {
    name: 'a throw after the response',
    handler: afterWriting((_req, res) => {
      res.json({ ok: true });
      fail();
    }),
    status: 200,
    stored: 'both',
    endsConnection: true,
  },
  {
    name: 'a throw after a response whose COMMIT fails',
    handler: afterWriting((_req, res) => {
      res.json({ ok: true });
      fail();
    }, 'fail'),
    status: 500,
    stored: 'neither',
    endsConnection: true,
  },
  {
    name: 'a second response',
    handler: afterWriting((_req, res) => {
      res.json({ ok: true });
      res.json({ ok: 'again' });
    }),
    status: 200,
    stored: 'both',
    endsConnection: true,
  },
  {
    name: 'write() and end()',
    handler: afterWriting((_req, res) => {
      res.write('half ');
      res.end('other half');
    }),
    status: 200,
    stored: 'both',
  },
  {
    name: 'write(), whose COMMIT fails',
    handler: afterWriting((_req, res) => {
      res.write('half ');
      res.end('other half');
    }, 'fail'),
    status: 500,
    stored: 'neither',
    endsConnection: true,
  },
  {
    name: 'write(), then a throw',
    handler: afterWriting((_req, res) => {
      res.write('half ');
      fail();
    }),
    status: 200,
    stored: 'both',
    isCut: true,
    endsConnection: true,
  },
  {
    name: 'rows streamed from the session',
    handler: afterWriting(async (req, res) => {
      await streamRows(req, res);
      res.end();
    }),
    status: 200,
    stored: 'both',
  },
  {
    name: 'rows streamed from the session, then a throw',
    handler: afterWriting(async (req, res) => {
      await streamRows(req, res);
      fail();
    }),
    status: 200,
    stored: 'neither',
    isCut: true,
    endsConnection: true,
  },
  {
    name: 'rows streamed from the session, whose COMMIT fails',
    handler: afterWriting(async (req, res) => {
      await streamRows(req, res);
      res.end();
    }, 'fail'),
    status: 200,
    stored: 'neither',
    isCut: true,
    endsConnection: true,
  },
];

async function streamRows(req: Request, res: Response): Promise<void> {
  for await (const row of req.session.raw('SELECT generate_series(1, 20) AS i').stream() as AsyncIterable<object>) {
    res.write(JSON.stringify(row));
  }
}
