import { ApolloServer } from '@apollo/server';
import { expressMiddleware } from '@as-integrations/express5';
import express from 'express';
import * as expressKnexSession from 'express-knex-session';
import { runExample } from '../support/example-bench';
import { REFUSED, useGatedApps } from '../support/gated-app';
import { type Listening, listen, post } from '../support/http';
import { exampleIn } from '../support/pages';
import { poolUsage } from '../support/pool';
import { failOnWarnings } from '../support/warnings';

/* The recipe docs/recipes/graphql.md, word by word, on Apollo Server itself: `npm run test:apollo`. */
failOnWarnings();

const apps = useGatedApps();
const recipe = exampleIn('recipes/graphql', 'ApolloServer');
const PLUGIN = /^ {2}plugins: .*$/m;

interface Context {
  session: import('express-knex-session').Session;
}
const insert = async ({ name }: { name: string }, { session }: Context): Promise<string> => {
  await session('entries').insert({ name });
  return name;
};
const typeDefs = `
  type Query { names: [String!]! nothing: Int }
  type Mutation { add(name: String!): String! fail(name: String!): String! failBadly: String! swallow: String! }`;
const resolvers = {
  Query: {
    names: (_: unknown, _args: unknown, { session }: Context) => session('entries').orderBy('id').pluck('name'),
    nothing: () => 1,
  },
  Mutation: {
    add: (_: unknown, args: { name: string }, context: Context) => insert(args, context),
    async fail(_: unknown, args: { name: string }, context: Context) {
      await insert(args, context);
      throw new Error('no');
    },
    failBadly: (_: unknown, _args: unknown, { session }: Context) => session('entries').insert({ missing: 'secret' }),
    async swallow(_: unknown, _args: unknown, { session }: Context) {
      await session.raw('SELECT 1/0').catch(() => {});
      return 'fine';
    },
  },
};

let stop = async (): Promise<void> => {};
afterEach(() => stop());

async function serve(code = recipe): Promise<Listening> {
  const app = express();
  const scope = { ...expressKnexSession, ApolloServer, expressMiddleware, express, app, knex: apps.knex, typeDefs, resolvers };
  const server: { stop(): Promise<void> } = await runExample(code, scope, 'server');
  app.use(((error, _req, res, _next) => {
    res.json({ errors: [{ message: error.code }] });
  }) as express.ErrorRequestHandler);
  const listening = await listen(app);
  stop = async () => {
    await listening.close();
    await server.stop();
  };
  return listening;
}

const send = async ({ url }: Listening, query: string) => {
  const { status, body, complete } = await post(`${url}/graphql`, { query });
  return { status, complete, ...JSON.parse(body) };
};

async function statementsOf(work: () => Promise<unknown>): Promise<string[]> {
  const statements: string[] = [];
  const listener = ({ sql }: { sql: string }) => statements.push(sql);
  apps.knex.on('query', listener);
  await work();
  apps.knex.removeListener('query', listener);
  return statements;
}

describe('when a mutation succeeds on Apollo Server', () => {
  it('is committed before the response (79)', async () => {
    const server = await serve();
    const hold = apps.hold();
    let isAnswered = false;
    const answer = send(server, 'mutation { add(name: "a") }').finally(() => {
      isAnswered = true;
    });
    await hold.reached;
    await new Promise((resolve) => setImmediate(resolve));
    expect(isAnswered).toBe(false);
    hold.release();
    expect(await answer).toEqual({ status: 200, complete: true, data: { add: 'a' } });
    expect(await apps.names()).toEqual(['a']);
    expect(poolUsage(apps.knex).used).toBe(0);
  });

  it('is not answered with 200 if COMMIT fails (79)', async () => {
    const server = await serve();
    const answer = await send(server, `mutation { add(name: "${REFUSED}") }`);
    expect(answer).toEqual({ status: 500, complete: true, errors: [{ message: '23514' }] });
    expect(poolUsage(apps.knex).used).toBe(0);
  });

  it('is not answered with 200 if a resolver has swallowed the error of a statement (79)', async () => {
    const server = await serve();
    expect(await send(server, 'mutation { swallow }')).toMatchObject({ status: 500, errors: [{ message: 'ERR_TRANSACTION_ABORTED' }] });
  });
});

describe('when a mutation fails on Apollo Server', () => {
  it.each([
    ['by itself', 'mutation { fail(name: "a") }'],
    ['after another one', 'mutation { first: add(name: "a") second: fail(name: "b") }'],
    ['before another one', 'mutation { first: fail(name: "a") second: add(name: "b") }'],
  ])('rolls all of the operation back, and is answered with 200 as GraphQL has it: %s (79, hazard 42)', async (_, mutation) => {
    const server = await serve();
    const answer = await send(server, mutation);
    expect(answer).toMatchObject({ status: 200, complete: true, errors: [{ message: 'Internal server error' }] });
    expect(await apps.names()).toEqual([]);
    expect(poolUsage(apps.knex).used).toBe(0);
  });

  it('would be committed without the plugin (hazard 42)', async () => {
    expect(recipe).toMatch(PLUGIN);
    const server = await serve(recipe.replace(PLUGIN, ''));
    expect(await send(server, 'mutation { fail(name: "a") }')).toMatchObject({ status: 200 });
    expect(await apps.names()).toEqual(['a']);
  });

  it('shows no SQL and no values to the client (hazard 23)', async () => {
    const server = await serve();
    const answer = JSON.stringify(await send(server, 'mutation { failBadly }'));
    expect(answer).toContain('Internal server error');
    expect(answer).not.toMatch(/insert|missing|secret/);
  });

  it('leaves the next operation alone', async () => {
    const server = await serve();
    await send(server, 'mutation { fail(name: "a") }');
    expect(await send(server, 'mutation { add(name: "b") }')).toMatchObject({ data: { add: 'b' } });
    expect(await send(server, '{ names }')).toMatchObject({ data: { names: ['b'] } });
  });
});

describe('when an operation does not use its session on Apollo Server', () => {
  it.each([
    ['without a resolver that does', '{ nothing }', 200],
    ['not parsed', '{ nothing', 400],
    ['not valid', '{ something }', 400],
  ])('runs no SQL: %s (79)', async (_, query, status) => {
    const server = await serve();
    const statements = await statementsOf(async () => expect(await send(server, query)).toMatchObject({ status }));
    expect(statements).toEqual([]);
  });
});
