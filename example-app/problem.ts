import { STATUS_CODES } from 'node:http';

interface Extras {
  detail?: string;
  errors?: { field: string; detail: string }[];
  headers?: Record<string, string>;
}

/**
 * An error that is told to the client, as `application/problem+json` (RFC 9457). Nothing else is: whatever is thrown
 * that is not a Problem and has no line in to-problem.ts becomes a bare 500.
 */
export class Problem extends Error {
  readonly status: number;
  readonly headers: Record<string, string>;
  readonly body: object;

  /** @param type what clients switch on: the last part of the problem's `type` */
  constructor(status: number, type: string, title: string, { headers = {}, ...extras }: Extras = {}) {
    super(title);
    this.status = status;
    this.headers = headers;
    this.body = { type: `https://ledger.example/problems/${type}`, title, status, ...extras };
  }

  /** A problem about which the status says everything. */
  static ofStatus(status: number): Problem {
    const title = STATUS_CODES[status] ?? 'Error';
    return new Problem(status, title.toLowerCase().replaceAll(' ', '-'), title);
  }
}
