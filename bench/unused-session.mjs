/* What a session costs that is never used: calls middlewares on requests and responses as Express hands them over, one request after the other. */
import { IncomingMessage, ServerResponse } from 'node:http';
import { Socket } from 'node:net';
import express from 'express';
import { sessionMiddleware } from 'express-knex-session';
import createKnex from 'knex';

const REQUESTS = 20_000;
const app = express();
const socket = new Socket();
const next = () => {};

/** @type {Record<string, import('express').RequestHandler>} */
const middlewares = {
  nothing: (_req, _res, next) => next(),
  // What any middleware pays that leaves something on the request: V8 makes a new hidden class for each.
  property: (req, _res, next) => {
    Object.assign(req, { user: undefined });
    next();
  },
  session: sessionMiddleware(createKnex({ client: 'pg' })),
};

/** A request and its response, after what Express does before the first middleware. */
function makeExchange() {
  const req = /** @type {any} */ (new IncomingMessage(socket));
  Object.assign(req, { method: 'GET', url: '/', headers: { host: 'localhost' } });
  const res = /** @type {any} */ (new ServerResponse(req));
  req.res = res;
  res.req = req;
  Object.setPrototypeOf(req, app.request);
  Object.setPrototypeOf(res, app.response);
  res.setHeader('X-Powered-By', 'Express');
  res.locals = Object.create(null);
  req.next = next;
  req.baseUrl = '';
  req.originalUrl = req.url;
  return { req, res };
}

/** CPU microseconds for each request, the making of it included. @param {import('express').RequestHandler} middleware */
function timeOf(middleware) {
  const before = process.cpuUsage();
  for (let i = 0; i < REQUESTS; i++) {
    const { req, res } = makeExchange();
    middleware(req, res, next);
  }
  const { user, system } = process.cpuUsage(before);
  return (user + system) / REQUESTS;
}

/** Bytes that stay as long as the request does. @param {import('express').RequestHandler} middleware */
function bytesOf(middleware) {
  const exchanges = Array.from({ length: REQUESTS }, makeExchange);
  globalThis.gc?.();
  const before = process.memoryUsage().heapUsed;
  for (const { req, res } of exchanges) middleware(req, res, next);
  globalThis.gc?.();
  return (process.memoryUsage().heapUsed - before) / exchanges.length;
}

process.on('message', (question) => {
  if (question === 'stop') {
    process.disconnect();
    return;
  }
  const measure = question === 'time' ? timeOf : bytesOf;
  process.send?.(Object.fromEntries(Object.entries(middlewares).map(([name, middleware]) => [name, measure(middleware)])));
});
