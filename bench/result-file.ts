import { writeFileSync } from 'node:fs';
import { availableParallelism, cpus } from 'node:os';
import { join } from 'node:path';
import createKnex from 'knex';
import { version } from '../package.json';
import { versionOf } from './peers';

/** Writes figures beside this file, with the versions of all that had a part in them. */
export async function writeResults(file: string, url: string, figures: object, more: Record<string, string> = {}): Promise<void> {
  const knex = createKnex({ client: 'pg', connection: url });
  const { rows } = await knex.raw('SHOW server_version');
  await knex.destroy();
  const versions: Record<string, string> = {
    node: process.versions.node,
    'express-knex-session': version,
    postgresql: rows[0].server_version.split(' ')[0],
    ...more,
  };
  for (const name of ['express', 'knex', 'pg', 'tarn']) versions[name] = versionOf(name);
  const machine = { platform: `${process.platform} ${process.arch}`, cpu: cpus()[0]?.model ?? '', cores: availableParallelism() };
  writeFileSync(join(__dirname, file), `${JSON.stringify({ versions, machine, ...figures }, rounded, 2)}\n`);
}

function rounded(_key: string, value: unknown): unknown {
  return typeof value === 'number' ? Math.round(value * 1_000) / 1_000 : value;
}
