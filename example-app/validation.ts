import type { Request, RequestHandler } from 'express';
import { z } from 'zod';
import { Problem } from './problem';

/** In lower case, as PostgreSQL gives them back. */
export const id = z.uuid().toLowerCase();

/** No control characters: PostgreSQL refuses U+0000. No lone surrogates: they do not come back as they were sent. */
export const text = z
  .string()
  .trim()
  .max(200)
  .regex(/^[^\p{Cc}\p{Cs}]*$/u, 'Must not contain control characters');

const MAX_CENTS = 10n ** 15n;

/** Cents, as a JSON integer or a string of digits. */
export const cents = z
  .union([z.int(), z.string().regex(/^\d{1,16}$/)], 'Must be a whole number of cents, such as 1250 or "1250"')
  .transform(BigInt)
  .refine((amount) => amount > 0n && amount <= MAX_CENTS, `Must be from 1 to ${MAX_CENTS}`);

/** Mounted after the parser: a body that it did not read goes no further, since a route that is retried wants one that has been read. */
export const onlyJson: RequestHandler = (req, _res, next) => {
  if (req.is('json') === false) throw Problem.ofStatus(415);
  next();
};

/** The body of a request, checked. */
export function bodyOf<T>(req: Request, schema: z.ZodType<T>): T {
  return valid(schema, req.body ?? {});
}

/** The `:id` of a route, checked. */
export function idOf(req: Request): string {
  return valid(z.object({ id }), req.params).id;
}

function valid<T>(schema: z.ZodType<T>, input: unknown): T {
  const result = schema.safeParse(input);
  if (result.success) return result.data;
  const errors = result.error.issues.map(({ path, message }) => ({ field: path.join('.'), detail: message }));
  throw new Problem(400, 'invalid-input', 'The input is not valid', { errors });
}
