/*
 * npm run chaos: a storm, and what is left after it. Ends with 1 if a figure is not what it must be.
 */
import { randomInt } from 'node:crypto';
import { join } from 'node:path';
import { readArguments, UsageError } from './arguments';
import { runMutants } from './mutants';
import { failuresOf, tableOf } from './report';
import { runStorm } from './storm';

const usage = `npm run chaos -- [--seconds 60] [--seed <number>] [--json] [--mutants]
  --seconds  how long the storm lasts
  --seed     repeats the requests and faults of another run (their order on the clock is never quite the same)
  --json     prints the figures for programs
  --mutants  a short storm on each faulty copy of the package: one figure at least must catch it`;

async function main(): Promise<void> {
  const given = readArguments(usage, { seconds: 'number', seed: 'number', json: 'boolean', mutants: 'boolean' });
  const { seed = randomInt(2 ** 31), seconds = given.mutants ? 12 : 60 } = given;
  const options = { seconds, seed, libFolder: join(__dirname, '..', 'lib') };
  console.error(`seed ${seed}`);
  if (given.mutants) {
    process.exitCode = (await runMutants(options)) ? 0 : 1;
    return;
  }
  const report = await runStorm(options);
  console.log(given.json ? JSON.stringify(report) : tableOf(report));
  const failures = failuresOf(report);
  if (failures.length === 0) return;
  console.error(`\nWrong figures: ${failures.length}. Again: npm run chaos -- --seconds ${seconds} --seed ${seed}`);
  process.exitCode = 1;
}

main().catch((error: unknown) => {
  console.error(error instanceof UsageError ? error.message : error);
  process.exitCode = 2;
});
