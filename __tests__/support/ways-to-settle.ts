import type { RequestHandler } from 'express';
import type { SessionOptions } from 'express-knex-session';
import { insert } from './ledger';

/** A request's end, as it is counted. */
export interface Way {
  /** Completes "when a request ...". */
  name: string;
  handler: RequestHandler;
  options?: SessionOptions;
  /** One for each of its transactions. */
  settled: [outcome: string, reason: string][];
  /** Connections. */
  destroyed?: number;
  /** Whether its client goes away once the session is open. */
  isLeft?: boolean;
}

/** On the table of useLedger(). */
export const ways: Way[] = [
  {
    name: 'answers 200',
    handler: async (req, res) => void res.json(await insert(req, 'a')),
    settled: [['committed', 'response']],
  },
  {
    name: 'answers 200 after it has only read',
    handler: async (req, res) => void res.json(await req.session('notes')),
    options: { readOnly: true },
    settled: [['committed', 'response']],
  },
  {
    name: 'answers 404',
    handler: async (req, res) => {
      await insert(req, 'a');
      res.sendStatus(404);
    },
    settled: [['rolled back', 'response']],
  },
  {
    name: 'throws',
    handler: async (req) => {
      await insert(req, 'a');
      throw new Error('no');
    },
    settled: [['rolled back', 'error']],
  },
  {
    name: 'has its COMMIT refused',
    handler: async (req, res) => void res.json(await insert(req, 'a', 'fail')),
    settled: [['rolled back', 'error']],
  },
  {
    name: 'loses its connection during COMMIT',
    handler: async (req, res) => void res.json(await insert(req, 'a', 'die')),
    settled: [['unknown', 'error']],
    destroyed: 1,
  },
  {
    name: 'asks for a rollback',
    handler: async (req, res) => {
      await insert(req, 'a');
      req.session.setRollbackOnly();
      res.end();
    },
    settled: [['rolled back', 'rollback only']],
  },
  {
    name: 'commits at a checkpoint, and then itself',
    handler: async (req, res) => {
      await insert(req, 'a');
      await req.session.checkpoint();
      await insert(req, 'b');
      await req.session.commit();
      res.end();
    },
    settled: [
      ['committed', 'checkpoint'],
      ['committed', 'commit'],
    ],
  },
  {
    name: 'takes too long',
    handler: async (req) => void (await req.session.raw('SELECT pg_sleep(30)')),
    options: { transactionTimeout: 50 },
    settled: [['rolled back', 'timeout']],
  },
  {
    name: 'loses its client',
    handler: async (req) => void (await req.session.raw('SELECT pg_sleep(30)')),
    isLeft: true,
    settled: [['rolled back', 'disconnect']],
  },
];
