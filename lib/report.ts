import type { Request } from 'express';
import type { Knex } from 'knex';
import type { SessionOptions } from './options';

/** Hands an error that no one else can receive to `onError`, or to Knex's logger. */
export function report(knex: Knex, onError: SessionOptions['onError'], error: unknown, req?: Request): void {
  if (!onError) {
    log(knex, error);
    return;
  }
  const logBoth = (thrown: unknown): void => {
    log(knex, thrown);
    log(knex, error);
  };
  try {
    const answer: unknown = onError(error, req);
    // An async one: its rejection would end the process.
    if (answer instanceof Promise) answer.catch(logBoth);
  } catch (thrown) {
    logBoth(thrown);
  }
}

function log(knex: Knex, error: unknown): void {
  knex.client.logger.error(error instanceof Error ? (error.stack ?? error.message) : String(error));
}
