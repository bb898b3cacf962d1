import { parseArgs } from 'node:util';

export class UsageError extends Error {}

type Values<Names> = { [Name in keyof Names]?: Names[Name] extends 'number' ? number : boolean };

/** @throws UsageError that says what is wrong, and how it is done */
export function readArguments<const Names extends Record<string, 'number' | 'boolean'>>(usage: string, names: Names): Values<Names> {
  try {
    const options = Object.entries(names).map(([name, type]) => [name, { type: type === 'number' ? 'string' : 'boolean' }] as const);
    const { values } = parseArgs({ options: Object.fromEntries(options) });
    const read = Object.entries(values).map(([name, value]) => [name, typeof value === 'string' ? wholeNumber(name, value) : value]);
    return Object.fromEntries(read);
  } catch (error) {
    throw new UsageError(`${(error as Error).message}\n\n${usage}`);
  }
}

function wholeNumber(name: string, text: string): number {
  const lowest = name === 'seed' ? 0 : 1;
  const value = Number(text);
  if (/^\d+$/.test(text) && Number.isSafeInteger(value) && value >= lowest) return value;
  throw new TypeError(`Expected --${name} to be a whole number from ${lowest}, got '${text}'.`);
}
