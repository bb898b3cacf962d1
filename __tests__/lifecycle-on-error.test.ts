import type { SessionOptions } from 'express-knex-session';
import { get, RawClient } from './support/http';
import { flavours, type Handler, insert, useLedger } from './support/ledger';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

describe.each(flavours)('on $version', (flavour) => {
  const serve = async (handler: Handler, options?: SessionOptions) => {
    const reported: { error: any; url: string | undefined }[] = [];
    const onError = (error: unknown, req?: { originalUrl: string }) => reported.push({ error, url: req?.originalUrl });
    const served = await ledger.serving(flavour)(handler, { ...options, onError });
    return { ...served, reported };
  };

  describe("with commitAt: 'finish', the classic hook", () => {
    const insertAndAnswer: Handler = async (req, res) => {
      await insert(req, 'a', req.query['at'] as 'fail');
      res.status(Number(req.query['status'] ?? 201)).json({ ok: true });
    };
    const finish = { commitAt: 'finish' } as const;

    it('lets the response go first, then commits', async () => {
      const held = await ledger.holdCommits();
      const { url, reported } = await serve(insertAndAnswer, finish);
      expect(await get(`${url}?at=wait`)).toMatchObject({ status: 201, complete: true });
      await held.waiting();
      expect(await ledger.stored()).toEqual([]);
      await held.release();
      await eventually(async () => expect(await ledger.stored()).toEqual(['a']));
      expect(reported).toEqual([]);
    });

    it('gives onError the error of a COMMIT that fails: nobody else can hear of it', async () => {
      const { url, errors, reported } = await serve(insertAndAnswer, finish);
      expect(await get(`${url}/x?at=fail`)).toMatchObject({ status: 201 });
      await eventually(() => expect(reported).toEqual([{ error: expect.objectContaining({ code: '23514' }), url: '/x?at=fail' }]));
      expect(errors).toEqual([]);
      expect(await ledger.stored()).toEqual([]);
    });

    it('rolls back an error response', async () => {
      const { url } = await serve(insertAndAnswer, finish);
      expect(await get(`${url}?status=409`)).toMatchObject({ status: 409 });
      await ledger.isClean();
      expect(await ledger.stored()).toEqual([]);
    });

    it('rolls back before the error handlers, as ever', async () => {
      const { url } = await serve(async (req) => {
        await insert(req, 'a');
        throw new Error('mine');
      }, finish);
      expect(await get(url)).toMatchObject({ status: 500 });
      expect(await ledger.stored()).toEqual([]);
    });

    it('rolls back if the client disconnects', async () => {
      let inserted = false;
      const { port } = await serve(async (req) => {
        await insert(req, 'a');
        inserted = true;
      }, finish);
      const client = (await RawClient.connect(port)).get('/');
      await eventually(() => expect(inserted).toBe(true));
      await client.reset();
      await ledger.isClean();
      expect(await ledger.stored()).toEqual([]);
    });
  });

  describe("with commitAt: 'end', when COMMIT fails after bytes have left", () => {
    it('cuts the connection, and gives onError the error', async () => {
      const { url, errors, reported } = await serve(
        async (req, res) => {
          await insert(req, 'a', 'fail');
          res.write('half');
          res.end('other half');
        },
        { commitAt: 'end' },
      );
      expect(await get(url)).toMatchObject({ status: 200, complete: false, error: { code: 'ECONNRESET' } });
      expect(reported).toEqual([{ error: expect.objectContaining({ code: '23514' }), url: '/' }]);
      expect(errors).toEqual([]);
      expect(await ledger.stored()).toEqual([]);
    });
  });

  describe('when all is told to the error handlers', () => {
    const told: [string, Handler][] = [
      [
        'an error of the handler',
        async (req) => {
          await insert(req, 'a');
          throw new Error('mine');
        },
      ],
      [
        'a COMMIT that fails',
        async (req, res) => {
          await insert(req, 'a', 'fail');
          res.sendStatus(201);
        },
      ],
      [
        'a swallowed error',
        async (req, res) => {
          await req.session.raw('SELECT 1/0').catch(() => {});
          res.sendStatus(201);
        },
      ],
      [
        'a lost connection',
        async (req, res) => {
          await insert(req, 'a', 'die');
          res.sendStatus(201);
        },
      ],
    ];
    it.each(told)('tells onError nothing of %s', async (_, handler) => {
      const { url, errors, reported } = await serve(handler);
      expect(await get(url)).toMatchObject({ status: 500 });
      expect(errors).toHaveLength(1);
      await ledger.isClean();
      expect(reported).toEqual([]);
    });
  });
});
