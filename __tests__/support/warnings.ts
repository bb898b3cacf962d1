declare const realProcess: NodeJS.Process;

/**
 * Fails the test file, after its last test, if Node gave a warning (as for pg's queue, listener leaks, deprecations)
 * or saw an unhandled rejection meanwhile. Call it once, at the top of the file.
 *
 * Jest itself fails the test that runs when a rejection is unhandled; this also sees one between two tests, and every warning.
 */
export function failOnWarnings(): void {
  const seen: string[] = [];
  const remember = (problem: unknown) => {
    // `instanceof Error` would be false: errors of Node come from outside of Jest's sandbox.
    seen.push((problem as Error | undefined)?.stack ?? String(problem));
  };
  realProcess.on('warning', remember);
  // Not at once: Jest takes the listeners away that are there when its run begins.
  beforeAll(() => {
    realProcess.on('unhandledRejection', remember);
  });
  afterAll(async () => {
    // Node warns in process.nextTick and looks for unhandled rejections after the microtasks: one more turn shows both.
    await new Promise((resolve) => setImmediate(resolve));
    realProcess.off('warning', remember);
    realProcess.off('unhandledRejection', remember);
    expect(seen).toEqual([]);
  });
}
