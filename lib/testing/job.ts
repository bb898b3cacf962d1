import { type PgConnection, type QueryCallback, whenReady } from '../postgres';

/** pg's `Query`, a cursor, a COPY stream: what brings its own way of talking to the server. */
export interface Submittable {
  submit: unknown;
  text?: string;
  callback?: QueryCallback;
  /** Of a stream. */
  readonly destroyed?: boolean;
  handleError(error: unknown, wire: unknown): void;
}

export interface QueryConfig {
  text: string;
  values?: readonly unknown[] | undefined;
  callback?: QueryCallback | undefined;
}

/** A statement that waits for its turn on a connection. */
export interface Job {
  readonly text: string;
  readonly values: readonly unknown[] | undefined;
  /** Sends it to the server; resolves when the server has answered. */
  send(real: PgConnection): Promise<unknown>;
  resolve(result: unknown): void;
  reject(error: unknown): void;
}

export function queryJob(statement: QueryConfig): Pick<Job, 'text' | 'values' | 'send'> {
  return {
    text: statement.text,
    values: statement.values,
    send: (real) => new Promise((resolve, reject) => real.query(statement, (error, result) => (error ? reject(error) : resolve(result)))),
  };
}

/**
 * It tells of its result, and of its errors, by itself.
 *
 * @param onPause told whether the server waits for someone who reads its rows
 */
export function submittableJob(submittable: Submittable, wire: () => unknown, onPause: (isPaused: boolean) => void): Job {
  return {
    text: submittable.text ?? '',
    values: undefined,
    async send(real) {
      // It would open its cursor, and never close it.
      if (submittable.destroyed) return;
      const pause = (): void => onPause(true);
      const goOn = (): void => onPause(false);
      real.connection?.on('portalSuspended', pause);
      real.connection?.on('dataRow', goOn);
      real.query(submittable);
      await whenReady(real);
      real.connection?.removeListener('portalSuspended', pause);
      real.connection?.removeListener('dataRow', goOn);
      goOn();
    },
    resolve() {},
    reject: (error) => submittable.handleError(error, wire()),
  };
}

/** Whoever has been told that the connection is lost is not told of what came of it. */
export function toldOnce(job: Job): Job {
  let isTold = false;
  const once = (tell: (value: unknown) => void) => (value: unknown) => {
    if (isTold) return;
    isTold = true;
    tell(value);
  };
  return { ...job, resolve: once(job.resolve), reject: once(job.reject) };
}
