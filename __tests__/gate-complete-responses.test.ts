import { join } from 'node:path';
import { useGatedApps } from './support/gated-app';
import { get } from './support/http';
import { flavours } from './support/ledger';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import {
  attempt,
  type Cases,
  expectSameAsPlain,
  gatedExchange,
  inserting,
  listed,
  type ObservedHandler,
  requestFor,
  stateOf,
} from './support/wire-comparison';

failOnWarnings();

const FILE = join(__dirname, '../package-lock.json');

const oneCall: Cases = {
  json: (_req, res) => res.status(201).json({ ok: true }),
  'send with text': (_req, res) => res.send('text ä'),
  'send with a buffer': (_req, res) => res.send(Buffer.from([1, 2, 255])),
  jsonp: (_req, res) => res.jsonp({ ok: true }),
  redirect: (_req, res) => res.redirect('/elsewhere'),
  'redirect with a status': (_req, res) => res.redirect(303, '/elsewhere'),
  sendStatus: (_req, res) => res.sendStatus(202),
  'cookie and header': (_req, res) => res.cookie('a', 'b').set('X-Mine', '1').type('txt').send('c'),
  'end without anything': (_req, res) => res.end(),
  'end with text': (_req, res) => res.end('abc'),
  'end with an encoding': (_req, res) => res.end('ä', 'latin1'),
  'end with a buffer': (_req, res) => res.end(Buffer.from('abc')),
  'end with 0, which Node takes for nothing': (_req, res) => res.end(0),
  'end with false, which Node takes for nothing': (_req, res, note) => res.end(false, () => note('callback')),
  'end with null': (_req, res) => res.end(null),
  'end with an empty text': (_req, res) => res.end(''),
  'end with a Content-Length': (_req, res) => res.set('Content-Length', '3').end('abc'),
  'end with a large text': (_req, res) => res.end('x'.repeat(5_000_000)),
  sendFile: (_req, res) => res.sendFile(FILE),
  'sendFile with a range': [(_req, res) => res.sendFile(FILE), { request: requestFor('GET', 'Range: bytes=3-9') }],
  'sendFile with two ranges': [(_req, res) => res.sendFile(FILE), { request: requestFor('GET', 'Range: bytes=3-9,20-30') }],
  download: (_req, res) => res.download(FILE, 'lock.json'),
};

describe.each(flavours)('on $version', (flavour) => {
  const apps = useGatedApps(flavour);

  describe('when a response is one call', () => {
    it.each(listed(oneCall))('is sent after COMMIT, byte for byte as by plain Express: %s (8, 9, 39)', async (_name, answer, options) => {
      await expectSameAsPlain(apps, inserting(answer), options);
      // One of the plain app, one of the gated one.
      expect(await apps.names()).toEqual(['entry', 'entry']);
    });

    it.each([[400], [404], [409], [500], [503]])('is sent after ROLLBACK with status %d (10)', async (status) => {
      await expectSameAsPlain(
        apps,
        inserting((_req, res) => res.status(status).json({ status })),
        { endsWith: 'ROLLBACK' },
      );
      expect(await apps.names()).toEqual(['entry']);
    });

    it('keeps what the handler has committed by itself, whatever the status (16, hazard 43)', async () => {
      const { url } = await apps.gated(async (req, res) => {
        await req.session('entries').insert({ name: 'failed login' });
        await req.session.commit();
        res.sendStatus(401);
      });
      expect(await get(url)).toMatchObject({ status: 401, complete: true });
      expect(await apps.names()).toEqual(['failed login']);
    });

    it('gives the connection back before the first byte leaves', async () => {
      const { notes } = await gatedExchange(
        apps,
        inserting((req, res, note) => {
          const { socket } = req;
          const write = socket.write.bind(socket) as (...args: unknown[]) => boolean;
          socket.write = (...args: unknown[]) => {
            note({ used: poolUsage(apps.knex).used });
            return write(...args);
          };
          res.json({ ok: true });
        }),
      );
      expect(notes[0]).toEqual({ used: 0 });
    });
  });

  const callbacks: Cases = {
    'end(callback)': (_req, res, note) => res.end(() => note('callback')),
    'end(chunk, callback)': (_req, res, note) => res.end('abc', () => note('callback')),
    'end(chunk, encoding, callback)': (_req, res, note) => res.end('ä', 'latin1', () => note('callback')),
    'end(undefined, undefined, callback)': (_req, res, note) => res.end(undefined, undefined as never, () => note('callback')),
    'sendFile(path, callback)': (_req, res, note) => res.sendFile(FILE, (error) => note(['callback', error])),
    'download(path, callback)': (_req, res, note) => res.download(FILE, (error) => note(['callback', error])),
  };

  describe('when a response has a callback or listeners', () => {
    it.each(listed(callbacks))('calls back once, in the order of plain Express: %s', async (_name, answer) => {
      const { notes } = await expectSameAsPlain(apps, inserting(answer));
      expect(notes).toContain('finish');
      expect(notes).toContain('close');
    });
  });

  const bodiless: Cases = {
    HEAD: [(_req, res) => res.json({ ok: true }), { request: requestFor('HEAD') }],
    'HEAD with sendFile': [(_req, res) => res.sendFile(FILE), { request: requestFor('HEAD') }],
    'HEAD with write and end': [writeAndEnd, { request: requestFor('HEAD') }],
    '204': (_req, res) => res.sendStatus(204),
    '204 with write and end': (req, res, note, next) => writeAndEnd(req, res.status(204), note, next),
    '304 by a fresh ETag': [(_req, res) => res.set('ETag', '"a"').send('text'), { request: requestFor('GET', 'If-None-Match: "a"') }],
    '304 set by the handler': (_req, res) => res.status(304).end(),
    'Content-Length: 0': (_req, res) => res.set('Content-Length', '0').end(),
  };

  function writeAndEnd(...[_req, res, note]: Parameters<ObservedHandler>): void {
    res.write('a', () => note('written'));
    res.end('b');
  }

  describe('when a response has no body', () => {
    it.each(listed(bodiless))('is sent after COMMIT, byte for byte as by plain Express: %s (39)', async (_name, answer, options) => {
      await expectSameAsPlain(apps, inserting(answer), options);
    });
  });

  const refused: Cases = {
    'a chunk of a wrong type': (_req, res) => res.end(5 as never),
    'a write of a wrong type': (_req, res) => res.write({} as never),
    'a write of null': (_req, res) => res.write(null as never),
    'a wrong status code': (_req, res) => {
      res.statusCode = 99;
      res.end('a');
    },
    'a line break in the reason phrase': (_req, res) => {
      res.statusMessage = 'O\nK';
      res.end('a');
    },
  };

  describe('when Node refuses to end a response', () => {
    it.each(listed(refused))('throws in the handler as Node does, and the response is still to be made: %s', async (_name, answer) => {
      await expectSameAsPlain(
        apps,
        inserting((req, res, note, next) => {
          note(attempt(() => answer(req, res, note, next)));
          note(stateOf(res));
          res.statusMessage = 'OK';
          res.status(200).end('ok');
        }),
      );
    });

    // A limit: the gate does not count. In a plain app the handler would get the error from end().
    it('does not let a body pass that is longer than its strict Content-Length, and tells onError', async () => {
      const { url } = await apps.gated(async (req, res) => {
        await req.session('entries').insert({ name: 'entry' });
        res.strictContentLength = true;
        res.set('Content-Length', '2').end('abc');
      });
      expect(await get(url)).toMatchObject({ status: 0, complete: false });
      expect(apps.reported).toEqual([expect.objectContaining({ code: 'ERR_HTTP_CONTENT_LENGTH_MISMATCH' })]);
    });
  });
});
