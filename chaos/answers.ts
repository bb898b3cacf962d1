/** One response in the bytes that a connection received. */
export interface RawAnswer {
  status: number;
  body: string;
  /** Whether it says that the connection ends with it. */
  isLast: boolean;
}

/** The responses that have come to their end, in order; of what is left over, nothing is said. */
export function completeAnswers(received: string): RawAnswer[] {
  const answers: RawAnswer[] = [];
  for (let rest = received; ; ) {
    const headEnd = rest.indexOf('\r\n\r\n');
    if (headEnd < 0) return answers;
    const head = rest.slice(0, headEnd);
    const status = Number(/^HTTP\/1\.1 (\d{3})/.exec(head)?.[1]);
    const length = /\r\ncontent-length: (\d+)/i.exec(head)?.[1];
    const payload = rest.slice(headEnd + 4);
    const body = length === undefined ? chunkedBody(payload) : wholeBody(payload, Number(length));
    if (body === undefined) return answers;
    answers.push({ status, body: body.text, isLast: /\r\nconnection: close/i.test(head) });
    rest = payload.slice(body.length);
  }
}

function wholeBody(payload: string, length: number) {
  return payload.length < length ? undefined : { text: payload.slice(0, length), length };
}

function chunkedBody(payload: string) {
  const chunks: string[] = [];
  for (let start = 0; ; ) {
    const lineEnd = payload.indexOf('\r\n', start);
    if (lineEnd < 0) return undefined;
    const size = Number.parseInt(payload.slice(start, lineEnd), 16);
    const end = lineEnd + 2 + size + 2;
    if (payload.length < end) return undefined;
    if (size === 0) return { text: chunks.join(''), length: end };
    chunks.push(payload.slice(lineEnd + 2, end - 2));
    start = end;
  }
}
