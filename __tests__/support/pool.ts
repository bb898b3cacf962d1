import type { Knex } from 'knex';

export interface PoolUsage {
  used: number;
  free: number;
  pendingAcquires: number;
}

export function poolUsage(knex: Knex): PoolUsage {
  const { pool } = knex.client;
  return { used: pool.numUsed(), free: pool.numFree(), pendingAcquires: pool.numPendingAcquires() };
}

/** Tries an assertion until it passes; the only way in which a test may wait for something that emits no event. */
export async function eventually<T>(assertion: () => T | Promise<T>, timeoutMs = 5_000): Promise<T> {
  const deadline = performance.now() + timeoutMs;
  for (;;) {
    try {
      return await assertion();
    } catch (error) {
      if (performance.now() > deadline) throw error;
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }
}
