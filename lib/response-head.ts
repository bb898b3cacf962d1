import type { OutgoingHttpHeader, ServerResponse } from 'node:http';

/** Headers that speak of one representation; they never fit the error response that takes its place. */
const representation = [
  'content-type',
  'content-length',
  'content-encoding',
  'content-language',
  'content-location',
  'content-range',
  'content-disposition',
  'content-md5',
  'transfer-encoding',
  'trailer',
];

/** Headers that a handler sets for its success. They stay only if they were there before it. */
const promises = ['set-cookie', 'cache-control', 'etag', 'last-modified', 'expires', 'location'];

type Value = OutgoingHttpHeader | undefined;

/** The values that the headers of a success had when the middleware ran; undefined if there was none of them. */
export type EarlyHeaders = readonly Value[] | undefined;

/** Costs 0.1 us, since it runs for each request, also for those that never use their session. */
export function earlyHeaders(res: ServerResponse): EarlyHeaders {
  let values: Value[] | undefined;
  for (let i = 0; i < promises.length; i++) {
    const value = res.getHeader(promises[i] as string);
    if (value !== undefined) {
      values ??= new Array<Value>(promises.length);
      values[i] = Array.isArray(value) ? [...value] : value;
    }
  }
  return values;
}

/** `appendHeader` adds to the array that is there. */
function copyOf(value: Value): Value {
  return Array.isArray(value) ? [...value] : value;
}

/** Node's own notes on a response's head. */
interface HeadFields {
  shouldKeepAlive: boolean;
  useChunkedEncodingByDefault: boolean;
  sendDate: boolean;
  [made: string]: unknown;
}

/** Those that Node sets when it makes a head, or when a header is removed, as they are before. */
const unmade = {
  finished: false,
  _header: null,
  _contentLength: null,
  _last: false,
  _trailer: '',
  _removedConnection: false,
  _removedContLen: false,
  _removedTE: false,
  chunkedEncoding: false,
};

/** A response's head as it was before the handler worked on it. */
export class SavedHead {
  private readonly headers: Record<string, Value>;
  private readonly fields: HeadFields;
  private readonly status: { statusCode: number; statusMessage: string };

  constructor(
    private readonly res: ServerResponse,
    private readonly early: EarlyHeaders,
  ) {
    const headers: Record<string, Value> = res.getHeaders();
    for (const name in headers) if (Array.isArray(headers[name])) headers[name] = copyOf(headers[name]);
    this.headers = headers;
    this.status = { statusCode: res.statusCode, statusMessage: res.statusMessage };
    const { shouldKeepAlive, useChunkedEncodingByDefault, sendDate } = res as unknown as HeadFields;
    this.fields = { shouldKeepAlive, useChunkedEncodingByDefault, sendDate };
  }

  /** Takes back all that has been set since, as if the handler had not run. */
  rewind(): void {
    const { res, headers } = this;
    Object.assign(res, unmade);
    for (const name of res.getHeaderNames()) {
      if (!(name in headers)) res.removeHeader(name);
    }
    for (const [name, value] of Object.entries(headers)) {
      if (value !== undefined && res.getHeader(name) !== value) res.setHeader(name, copyOf(value) as OutgoingHttpHeader);
    }
    // Node remembers that a header was removed, and then does not make one itself.
    Object.assign(res, unmade, this.fields, this.status, { _hasBody: res.req.method !== 'HEAD' });
  }

  /** Takes back what the handler has set, for the error response that comes instead. */
  restore(): void {
    const { res } = this;
    const { statusCode, statusMessage } = res;
    this.rewind();
    Object.assign(res, { statusCode, statusMessage });
    for (const name of representation) res.removeHeader(name);
    promises.forEach((name, i) => {
      const value = this.early?.[i];
      if (value === undefined) res.removeHeader(name);
      else if (res.getHeader(name) !== value) res.setHeader(name, value);
    });
    // Node remembers that a header was removed, and then does not make one itself.
    Object.assign(res, unmade, this.fields, { _hasBody: res.req.method !== 'HEAD' });
  }
}
