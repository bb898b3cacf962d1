import express, { type Express } from 'express';
import { scopedSession, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';

/*
 * A small shop as many are written: three services that import one `db`, and no request. Each function below stands for a module;
 * `before` and `after` are the two versions of what puts them together.
 */

export const SHOP = `
  DROP TABLE IF EXISTS orders, stock, audit;
  CREATE TABLE orders (id serial PRIMARY KEY, item text NOT NULL);
  CREATE TABLE stock (item text PRIMARY KEY, amount int NOT NULL CHECK (amount >= 0));
  CREATE TABLE audit (id serial PRIMARY KEY, action text NOT NULL);
  INSERT INTO stock VALUES ('book', 2), ('pen', 0)`;

function createAudit(db: Knex) {
  return {
    note: (action: string) => db('audit').insert({ action }),
    all: () => db('audit').orderBy('id').pluck('action'),
  };
}

function createStock(db: Knex, audit: ReturnType<typeof createAudit>) {
  return {
    async take(item: string): Promise<void> {
      await db.transaction(async (trx) => {
        await trx('stock').where({ item }).decrement('amount', 1);
      });
      await audit.note(`took ${item}`);
    },
  };
}

function createOrders(db: Knex, stock: ReturnType<typeof createStock>, audit: ReturnType<typeof createAudit>) {
  return {
    async place(item: string): Promise<number> {
      await audit.note(`order of ${item}`);
      const [order] = await db('orders').insert({ item }).returning('id');
      await stock.take(item);
      return order.id;
    },
  };
}

function createRoutes(db: Knex): express.Router {
  const audit = createAudit(db);
  const orders = createOrders(db, createStock(db, audit), audit);
  return express
    .Router()
    .get('/audit', async (_req, res) => void res.json(await audit.all()))
    .get('/order/:item', async (req, res) => void res.status(201).json({ id: await orders.place(req.params.item) }));
}

/** @param createDb makes the application's Knex instance */
export function before(createDb: () => Knex): Express {
  const db = createDb();
  const app = express();
  app.use(createRoutes(db));
  return app;
}

export function after(createDb: () => Knex): Express {
  const knex = createDb();
  const db = scopedSession(knex);
  const app = express();
  app.use(sessionMiddleware(knex, { context: true }));
  app.use(createRoutes(db));
  app.use(sessionErrorHandler());
  return app;
}
