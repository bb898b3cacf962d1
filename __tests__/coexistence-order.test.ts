import { type ErrorRequestHandler, type Express, type Request, type RequestHandler, static as serveStatic } from 'express';
import { currentSession, retryable, sessionErrorHandler } from 'express-knex-session';
import { type AppOptions, deferred, type Handler, REFUSED, useGatedApps } from './support/gated-app';
import { type Answer, get, RawClient, request } from './support/http';
import { cors, middlewares, multer, rateLimit } from './support/middleware';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

/* What the README's table of the order to mount in says of each. */
failOnWarnings();

const apps = useGatedApps();

const firstStatement: RequestHandler = async (req, _res, next) => {
  await req.session('entries').insert({ name: 'first' });
  next();
};
const refused: ErrorRequestHandler = (error, _req, res, _next) => res.status(error.status ?? 500).send(error.code ?? 'refused');

const insert: Handler = async (req, res) => {
  await req.session('entries').insert({ name: req.path.slice(1) });
  res.status(201).end();
};

const before = (middleware: RequestHandler): AppOptions => ({ before: (app: Express) => app.use(middleware) });
const after = (middleware: RequestHandler): AppOptions => ({ after: (app: Express) => app.use(middleware) });
const afterFirstStatement = (middleware: RequestHandler): AppOptions => ({ after: (app: Express) => app.use(firstStatement, middleware) });

async function statementsOf(work: () => Promise<unknown>): Promise<string[]> {
  const statements: string[] = [];
  const listener = ({ sql }: { sql: string }) => statements.push(sql);
  apps.knex.on('query', listener);
  await work();
  apps.knex.removeListener('query', listener);
  return statements;
}

describe('when helmet or cors has set headers, and COMMIT fails', () => {
  const headerOf: Record<string, string> = { helmet: 'content-security-policy', cors: 'access-control-allow-origin' };
  const failing = async (name: string, mount: (middleware: RequestHandler) => AppOptions): Promise<Answer> => {
    const middleware = middlewares[name]?.() as RequestHandler;
    const { url } = await apps.gated(insert, { ...mount(middleware), errorHandlers: [refused] });
    return get(`${url}/${REFUSED}`);
  };

  it.each([
    ['helmet', 'before the session', before],
    ['helmet', 'after the session', after],
    ['cors', 'before the session', before],
    ['cors', 'after the session', after],
  ] as const)('keeps those of %s on the error response, if it stands %s', async (name, _position, mount) => {
    const { status, headers } = await failing(name, mount);
    expect(status).toBe(500);
    expect(headers).toHaveProperty([headerOf[name] as string]);
  });

  it.each(['helmet', 'cors'])('takes those of %s back with the response, if it stands after the first statement', async (name) => {
    const { status, headers } = await failing(name, afterFirstStatement);
    expect(status).toBe(500);
    expect(headers).not.toHaveProperty([headerOf[name] as string]);
  });
});

describe('when a request is answered before any route', () => {
  it.each([
    ['before', before],
    ['after', after],
  ] as const)('runs no SQL for a preflight or a static file: cors and static %s the session (3)', async (_position, mount) => {
    const statics = serveStatic(__dirname);
    const both: RequestHandler = (req, res, next) => cors({})(req, res, () => statics(req, res, next));
    const { url } = await apps.gated(insert, mount(both));
    const statements = await statementsOf(async () => {
      expect(await request(url, { method: 'OPTIONS', headers: { Origin: 'https://app.example' } })).toMatchObject({ status: 204 });
      expect(await get(`${url}/support.test.ts`)).toMatchObject({ status: 200, complete: true });
    });
    expect(statements).toEqual([]);
  });
});

describe('when express-rate-limit counts requests', () => {
  it.each([
    ['before', before],
    ['after', after],
  ] as const)('refuses those above the limit without a connection, %s the session', async (_position, mount) => {
    const { url } = await apps.gated(insert, mount(rateLimit({ limit: 1 })));
    expect((await get(`${url}/entry`)).status).toBe(201);
    const statements = await statementsOf(async () => expect((await get(`${url}/entry`)).status).toBe(429));
    expect(statements).toEqual([]);
    expect(await apps.names()).toEqual(['entry']);
  });

  it.each([
    ['before', before],
    ['after', after],
    ['in front of the route, after the first statement,', afterFirstStatement],
  ] as const)('takes a failed COMMIT for a failed request, %s the session (skipFailedRequests)', async (_position, mount) => {
    const { url } = await apps.gated(insert, {
      ...mount(rateLimit({ limit: 1, skipFailedRequests: true })),
      errorHandlers: [refused],
    });
    const statuses: number[] = [];
    for (const name of [REFUSED, REFUSED, 'entry', 'entry']) statuses.push((await get(`${url}/${name}`)).status);
    expect(statuses).toEqual([500, 500, 201, 429]);
  });
});

describe('when multer reads an upload', () => {
  const boundary = 'boundary';
  const part = (name: string, filename: string | undefined, content: string) =>
    `--${boundary}\r\nContent-Disposition: form-data; name="${name}"${filename ? `; filename="${filename}"` : ''}\r\n\r\n${content}\r\n`;
  const send = (url: string, file = 'content') =>
    request(url, {
      method: 'POST',
      headers: { 'Content-Type': `multipart/form-data; boundary=${boundary}` },
      body: `${part('title', undefined, 'a title')}${part('file', 'a.txt', file)}--${boundary}--\r\n`,
    });
  const store: Handler = async (req, res) => {
    const file = (req as typeof req & { file: { originalname: string } }).file;
    await req.session('entries').insert([{ name: req.body.title }, { name: file.originalname }]);
    // In the context too, which listeners of a body can lose.
    await currentSession()('entries').insert({ name: 'in context' });
    res.status(201).end();
  };
  const upload = multer({ limits: { fileSize: 1_000 } }).single('file');
  const positions = { 'before the session': before, 'after the session': after, 'after the first statement': afterFirstStatement };

  it.each(Object.entries(positions))(
    'stores what came with it in one transaction, and knows the session in context: %s',
    async (_, mount) => {
      const { url } = await apps.gated(store, { ...mount(upload), context: true, errorHandlers: [refused] });
      expect(await send(url)).toMatchObject({ status: 201, body: '' });
      expect((await apps.names()).filter((name) => name !== 'first')).toEqual(['a title', 'a.txt', 'in context']);
    },
  );

  it.each(Object.entries(positions))('rolls back if the file is too large: %s', async (_, mount) => {
    const { url } = await apps.gated(store, { ...mount(upload), context: true, errorHandlers: [refused] });
    expect(await send(url, 'x'.repeat(2_000))).toMatchObject({ status: 500, body: 'LIMIT_FILE_SIZE' });
    expect(await apps.names()).toEqual([]);
  });

  it('lets a retryable handler run again, with the upload that has been read: in front of it', async () => {
    let attempts = 0;
    const handler = retryable(async (req, res) => {
      attempts++;
      const { file } = req as typeof req & { file: { buffer: Buffer } };
      await req.session('entries').insert({ name: `${file.buffer} ${attempts}` });
      if (attempts === 1) throw Object.assign(new Error('could not serialize access'), { code: '40001' });
      res.status(201).end();
    });
    const { url } = await apps.gated(handler as Handler, after(upload));
    expect(await send(url)).toMatchObject({ status: 201 });
    expect(await apps.names()).toEqual(['content 2']);
  });

  // Hazard 41: why it should stand before the first statement.
  it('holds a connection for the whole upload, and gives it back if the client leaves in the middle: after the first statement', async () => {
    const started = deferred();
    const { port } = await apps.gated(store, {
      after: (app: Express) =>
        app.use(
          firstStatement,
          (_req, _res, next) => {
            started.resolve();
            next();
          },
          upload,
        ),
      errorHandlers: [refused],
    });
    const client = await RawClient.connect(port);
    client.write(
      `POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=${boundary}\r\nContent-Length: 5000\r\n\r\n${part('file', 'a.txt', 'part')}`,
    );
    await started.promise;
    expect(poolUsage(apps.knex).used).toBe(1);
    await client.reset();
    await eventually(() => expect(poolUsage(apps.knex).used).toBe(0));
    expect(await apps.names()).toEqual([]);
  });
});

describe('when an error handler stands before sessionErrorHandler()', () => {
  // The last line of the table: ours comes first.
  it('answers while the transaction is open, and what it stores goes with the rest', async () => {
    const outcomes: string[] = [];
    const app = await apps.gated((_req, _res, next) => next(), {
      after: (app: Express) =>
        app.use(
          async (req: Request) => {
            await req.session('entries').insert({ name: 'entry' });
            throw new Error('no');
          },
          ((_error, req, res, _next) => {
            outcomes.push(req.session.outcome);
            res.status(500).end();
          }) as ErrorRequestHandler,
          sessionErrorHandler(),
        ),
    });
    expect((await get(app.url)).status).toBe(500);
    expect(outcomes).toEqual(['open']);
    expect(await apps.names()).toEqual([]);
  });
});
