import type { Socket } from 'node:net';
import type { Knex } from 'knex';
import type { Client } from 'pg';

export type Resource = Client & { processID: number; connection: { stream: Socket } };

/** Follows what a pool of Knex (tarn) gives out and takes back. */
export class PoolRecord {
  /** What was given out, in order. */
  readonly acquired: Resource[] = [];
  private readonly uses = new Map<unknown, ('acquired' | 'released')[]>();

  constructor(knex: Knex) {
    const { pool } = knex.client;
    pool.on('acquireSuccess', (_event: number, resource: Resource) => {
      this.acquired.push(resource);
      this.note(resource, 'acquired');
    });
    pool.on('release', (resource: Resource) => this.note(resource, 'released'));
  }

  /** Every connection came back as often as it was given out, and never twice in a row. */
  expectBalanced(): void {
    for (const uses of this.uses.values()) {
      expect(uses).toEqual(uses.map((_, i) => (i % 2 === 0 ? 'acquired' : 'released')));
      expect(uses.length % 2).toBe(0);
    }
  }

  private note(resource: unknown, use: 'acquired' | 'released'): void {
    const uses = this.uses.get(resource) ?? [];
    this.uses.set(resource, [...uses, use]);
  }
}

export function socketOf(resource: Resource): Socket {
  return resource.connection.stream;
}

export function isDestroyed(resource: Resource): boolean {
  return socketOf(resource).destroyed;
}
