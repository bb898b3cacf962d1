import { type Handler, insert } from './ledger';
import type { Moment } from './matrix';
import type { Stage } from './matrix-stage';
import { deferred, isSql } from './wire';

type Play = (stage: Stage, then?: Handler) => Promise<void>;

const answerOk: Handler = (_req, res) => void res.status(201).json('ok');

/** How a request is brought to a moment; it stays there until `stage.goOn()`. Its handler inserts the note `a` first. */
export const moments: Record<Moment, Play> = {
  /** It has a connection of the pool, on which nothing was sent. */
  async 'before BEGIN'(stage, then = answerOk) {
    stage.proxy.onFrontend((message) => (isSql(message, 'BEGIN;') ? stage.point.arrive() : undefined));
    await stage.send(async (req, res, next) => {
      await insert(req, 'a');
      return then(req, res, next);
    });
    await stage.point.reached;
  },

  /** The server is at work on the second statement. */
  async 'during a statement'(stage, then = answerOk) {
    await stage.lock.hold();
    await stage.send(async (req, res, next) => {
      await insert(req, 'a');
      await req.session.raw(stage.lock.statement);
      return then(req, res, next);
    });
    await stage.lock.reached();
  },

  /** Without `then`, another statement comes next: the note `b`. */
  async 'between statements'(stage, then) {
    await stage.send(async (req, res, next) => {
      await insert(req, 'a');
      await stage.point.arrive();
      if (then) return then(req, res, next);
      await insert(req, 'b');
      return answerOk(req, res, next);
    });
    await stage.point.reached;
  },

  /** The server is at work on COMMIT, in a deferred trigger. */
  async 'during COMMIT'(stage, then = () => {}) {
    const isThere = deferred();
    await stage.lock.hold();
    await stage.send(async (req, res, next) => {
      await insert(req, 'a', 'wait');
      await answerOk(req, res, next);
      await isThere.promise;
      return then(req, res, next);
    });
    await stage.lock.reached();
    isThere.resolve();
  },

  /** The session has let the response go, and a middleware outside of it still holds its end. */
  async 'after COMMIT, before the response'(stage, then = () => {}) {
    stage.onEnd = () => stage.point.arrive();
    await stage.send(async (req, res, next) => {
      await insert(req, 'a');
      await answerOk(req, res, next);
      await stage.point.reached;
      return then(req, res, next);
    });
    await stage.point.reached;
  },

  /** The client has the first half of the body. */
  async 'during the response'(stage, then = (_req, res) => void res.end('ended')) {
    await stage.send(async (req, res, next) => {
      await insert(req, 'a');
      await new Promise((resolve) => res.status(201).write('begun, ', resolve));
      await stage.point.arrive();
      return then(req, res, next);
    });
    await stage.point.reached;
    await stage.client?.readUntil('begun');
  },
};
