/**
 * The middleware that one writes first: begins at once, commits when the response has been sent.
 *
 * @param {import('knex').Knex} knex
 * @returns {import('express').RequestHandler}
 */
export function eagerMiddleware(knex) {
  return async (req, res, next) => {
    const trx = await knex.transaction();
    Object.assign(req, { trx });
    res.once('finish', () => (res.statusCode < 400 ? trx.commit() : trx.rollback()).catch(() => {}));
    res.once('close', () => trx.isCompleted() || trx.rollback().catch(() => {}));
    next();
  };
}
