import { type ServerResponse, validateHeaderName, validateHeaderValue } from 'node:http';

/**
 * Node's own fields. A set `finished` makes its methods behave as after the end, a set `_header` as after the head.
 * `finished` is only set for such a call: a server that shuts down closes the connections of what is finished.
 */
export interface Internals {
  finished: boolean;
  _header: string | null;
  readonly _headerSent: boolean;
  readonly chunkedEncoding: boolean;
}

const HELD = 'held by express-knex-session';

/**
 * A head that is made and not yet sent. Node would make it at once, and then other middleware (compression) would decide by it on
 * a response that may still be discarded.
 */
export class DeferredHead {
  /** Node's own head, if writeHead was called before the gate was there. */
  private readonly nativeHead: string | null;
  /** The arguments of writeHead. */
  private args: unknown[] | undefined;
  /** What is assigned to `statusCode` after the head was made has no effect. */
  private status: number | undefined;
  private statusMessage: string | undefined;

  constructor(private readonly res: ServerResponse & Internals) {
    this.nativeHead = res._header;
    if (res._header) this.fix();
  }

  /** Takes a writeHead. False if Node would refuse it; throws as Node does for a header that is wrong. */
  take(args: unknown[]): boolean {
    const { res } = this;
    const status = Math.trunc(Number(args[0]));
    const headers = givenHeaders(args);
    if (res._header || !headers || !isStatusLine(status, typeof args[1] === 'string' ? args[1] : undefined)) return false;
    for (const [name, value] of headers) {
      validateHeaderName(name);
      for (const item of Array.isArray(value) ? value : [value]) validateHeaderValue(name, item);
    }
    this.args = args;
    res.statusCode = status;
    res._header = HELD;
    this.fix();
    return true;
  }

  /** Whether a writeHead was taken, and has not been made. */
  get isWaiting(): boolean {
    return this.args !== undefined;
  }

  /** From now on the status is what it is. */
  fix(): void {
    this.status ??= this.res.statusCode;
  }

  /** Node refuses a change of the headers until {@link letGo}. */
  hold(): void {
    const { res } = this;
    this.fix();
    this.letGoStatus();
    this.statusMessage = res.statusMessage;
    res._header ||= HELD;
  }

  letGo(): void {
    const { res } = this;
    if (res._header === HELD) res._header = this.nativeHead;
    this.letGoStatus();
    res.statusMessage = this.statusMessage as string;
  }

  /** The arguments of the writeHead that must be made now, if there was one. */
  giveBack(): unknown[] | undefined {
    const { res, args } = this;
    if (res._header === HELD) res._header = this.nativeHead;
    this.args = undefined;
    return args;
  }

  /** False if the response is complete with its head: Node ignores what is written to it. */
  announcesBody(): boolean {
    const status = this.status ?? this.res.statusCode;
    const isBodiless = this.res.req.method === 'HEAD' || status === 204 || status === 304;
    return !isBodiless && this.declaredLength !== 0;
  }

  /** The length that the response declares, in its headers or in the arguments of writeHead. */
  get declaredLength(): number | undefined {
    let value: unknown = this.res.getHeader('content-length');
    for (const [name, given] of (this.args && givenHeaders(this.args)) ?? []) {
      if (name.toLowerCase() === 'content-length') value = given;
    }
    return value === undefined ? undefined : Number(value);
  }

  private letGoStatus(): void {
    if (this.status !== undefined) this.res.statusCode = this.status;
  }
}

/** Whether Node would take it; if not, it says so at once, and not after COMMIT. */
export function isStatusLine(status: number, message: string | undefined): boolean {
  return status >= 100 && status <= 999 && !(message && /[^\t\x20-\x7e\x80-\xff]/.test(message));
}

/**
 * The headers among the arguments of writeHead, after the status and maybe a reason: an object or a flat list. Undefined if it is
 * neither.
 */
function givenHeaders([, reason, given]: readonly unknown[]): [name: string, value: unknown][] | undefined {
  const headers = typeof reason === 'string' ? given : (given ?? reason);
  if (!Array.isArray(headers)) return Object.entries(headers ?? {});
  if (headers.length % 2 === 1 || Array.isArray(headers[0])) return undefined;
  return headers.flatMap((name, i) => (i % 2 === 0 ? [[String(name), headers[i + 1]]] : []));
}
