import { execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { createServer, get, type Server } from 'node:https';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { connect } from 'node:tls';
import type { Response } from 'express';
import { REFUSED, useGatedApps } from './support/gated-app';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

const certificate = makeCertificate();

/** A self-signed one for localhost; undefined if there is no openssl to make it. */
function makeCertificate(): { key: Buffer; cert: Buffer } | undefined {
  const folder = mkdtempSync(join(tmpdir(), 'gate-tls-'));
  const [key, cert] = [join(folder, 'key.pem'), join(folder, 'cert.pem')];
  const request = [
    'req',
    '-x509',
    '-newkey',
    'ec',
    '-pkeyopt',
    'ec_paramgen_curve:prime256v1',
    '-nodes',
    '-days',
    '1',
    '-subj',
    '/CN=localhost',
  ];
  try {
    execFileSync('openssl', [...request, '-keyout', key, '-out', cert], { stdio: 'pipe' });
    return { key: readFileSync(key), cert: readFileSync(cert) };
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  } finally {
    rmSync(folder, { recursive: true });
  }
}

(certificate ? describe : describe.skip)("when a response is streamed over TLS (needs openssl), with commitAt: 'end'", () => {
  const apps = useGatedApps();
  let server: Server | undefined;
  afterEach(async () => {
    server?.closeAllConnections();
    await new Promise((resolve) => (server ? server.close(resolve) : resolve(undefined)));
  });

  async function listen(name: string, answer: (res: Response) => unknown): Promise<number> {
    const app = apps.app(
      async (req, res) => {
        await req.session('entries').insert({ name });
        return answer(res);
      },
      { commitAt: 'end' },
    );
    server = createServer(certificate ?? {}, app).listen(0, '127.0.0.1');
    await once(server, 'listening');
    return (server.address() as AddressInfo).port;
  }

  /** What an HTTPS client of Node makes of it. */
  function ask(port: number): Promise<{ body: string; complete: boolean; code?: string }> {
    return new Promise((resolve) => {
      const outgoing = get(
        { port, host: '127.0.0.1', ca: certificate?.cert, checkServerIdentity: () => undefined, agent: false },
        (response) => {
          const answer = { body: '', complete: false };
          response.setEncoding('utf8').on('data', (chunk: string) => {
            answer.body += chunk;
          });
          response.on('error', () => {});
          response.on('close', () => resolve({ ...answer, complete: response.complete }));
        },
      );
      outgoing.on('error', (error: NodeJS.ErrnoException) =>
        resolve({ body: '', complete: false, ...(error.code && { code: error.code }) }),
      );
    });
  }

  /** Says whether the end of an HTTP/1.0 response looked like one: TLS ends with a close_notify. */
  async function askByHttp10(port: number): Promise<{ received: string; error: NodeJS.ErrnoException | undefined; sawEnd: boolean }> {
    const socket = connect({ port, host: '127.0.0.1', ca: certificate?.cert, checkServerIdentity: () => undefined });
    const result = { received: '', error: undefined as NodeJS.ErrnoException | undefined, sawEnd: false };
    socket.setEncoding('latin1').on('data', (chunk: string) => {
      result.received += chunk;
    });
    socket.on('end', () => {
      result.sawEnd = true;
    });
    socket.on('error', (error) => {
      result.error = error;
    });
    await once(socket, 'secureConnect');
    socket.write('GET / HTTP/1.0\r\n\r\n');
    await new Promise((resolve) => socket.once('close', resolve));
    return result;
  }

  const streamed = async (res: Response) => {
    res.write('aa');
    await nextTurn();
    res.end('bb');
  };

  it('sends all after COMMIT has succeeded', async () => {
    expect(await ask(await listen('entry', streamed))).toEqual({ body: 'aabb', complete: true });
    expect(await apps.names()).toEqual(['entry']);
  });

  it.each<[string, (res: Response) => unknown]>([
    ['chunked', streamed],
    ['with a Content-Length', (res) => streamed(res.set('Content-Length', '4'))],
  ])('destroys the connection if COMMIT fails, so that the response is not whole: %s', async (_name, answer) => {
    // A reset may overtake the bytes that were sent before it.
    expect(await ask(await listen(REFUSED, answer))).toMatchObject({ complete: false });
    expect(apps.reported).toEqual([expect.objectContaining({ code: '23514' })]);
    expect(await apps.names()).toEqual([]);
    await eventually(() => expect(poolUsage(apps.knex).used).toBe(0));
  });

  it('does not let the end of an HTTP/1.0 response look proper if COMMIT fails', async () => {
    const { error, sawEnd } = await askByHttp10(await listen(REFUSED, streamed));
    expect({ sawEnd, code: error?.code }).toEqual({ sawEnd: false, code: 'ECONNRESET' });
    expect(await apps.names()).toEqual([]);
  });

  it('answers with the error if nothing has been sent', async () => {
    const answer = await ask(await listen(REFUSED, (res) => res.json({ ok: true })));
    expect(answer).toMatchObject({ complete: true });
    expect(answer.body).toContain('entry refused');
  });
});
