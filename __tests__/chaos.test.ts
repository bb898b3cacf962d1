import { execFile } from 'node:child_process';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { mutants } from '../chaos/mutants';
import type { Figure, Report } from '../chaos/report';

const root = join(__dirname, '..');

interface Run {
  stdout: string;
  stderr: string;
  code: unknown;
}

/** As `npm run chaos` does it. */
function chaos(...args: string[]): Promise<Run> {
  return new Promise((resolve) => {
    const options = { cwd: root, maxBuffer: 10_000_000, env: { ...process.env, NODE_OPTIONS: '' } };
    execFile(process.execPath, ['--import', 'tsx', join('chaos', 'run.ts'), ...args], options, (error, stdout, stderr) =>
      resolve({ stdout, stderr, code: error?.code ?? 0 }),
    );
  });
}

describe('after a short storm', () => {
  let run: Run;
  let figures: Map<string, Figure>;

  beforeAll(async () => {
    run = await chaos('--seconds', '10', '--json');
    const report = (run.stdout ? JSON.parse(run.stdout) : { figures: [] }) as Report;
    figures = new Map(report.figures.map((figure) => [figure.name, figure]));
  }, 100_000);

  /** With its details, and the seed, if it is not as expected. */
  const figure = (name: string): Figure & { seed: string } => ({ value: Number.NaN, ...figures.get(name), name, seed: run.stderr.trim() });
  const expectWithin = (name: string): void => {
    const found = figure(name);
    if (!(found.value <= (found.limit ?? Number.NaN))) throw new Error(JSON.stringify(found, null, 2));
  };

  it('has been one: every fault, and every kind of end', () => {
    const faults = [...figures.values()].filter(({ name }) => name.startsWith('fault: '));
    expect(faults.length).toBeGreaterThanOrEqual(10);
    expect(figure('requests').value).toBeGreaterThan(300);
    expect(figure('transfers acknowledged').value).toBeGreaterThan(30);
    expect(figure('transfers refused').value).toBeGreaterThan(30);
    expect(figure('clients that left before their answer').value).toBeGreaterThan(30);
  });

  it.each([
    'acknowledged transfers that are missing',
    'refused transfers that are stored',
    'torn transfers',
    'money created or lost',
    'requests never answered',
    'connections cut where nothing had been sent',
    'answers that were not whole, or of another request',
    'connections in use after the storm',
    'requests waiting for a connection after the storm',
    'sessions open after the storm (stats)',
    'backends left in a transaction or a query',
    'connections given back twice',
    'unhandled rejections',
    'uncaught exceptions',
    'warnings',
    'wrong answers after the storm',
    'sessions open after drain',
    'successes beyond those that stats knows of',
    'unknown outcomes beyond those that stats knows of',
  ])('counts 0 %s', (name) => {
    expect(figure(name).limit).toBe(0);
    expectWithin(name);
  });

  it('has held no connection longer than transactionTimeout and settleTimeout together', () => {
    expectWithin('longest time that a connection was held, ms');
  });

  it('drains under load within the time given and settleTimeout', () => {
    expectWithin('drain under load, ms');
  });

  it('has no figure wrong that is not named above, and ends with 0', () => {
    const wrong = [...figures.values()].filter(({ value, limit }) => limit !== undefined && !(value <= limit));
    expect(wrong).toEqual([]);
    expect(run.code).toBe(0);
  });

  it('has printed its seed', () => {
    expect(run.stderr).toMatch(/^seed \d+\n/);
  });
});

describe('a mutant of the package that the storm must catch (npm run chaos -- --mutants)', () => {
  const edits = mutants.flatMap(({ name, edits }) => edits.map((edit) => ({ name, ...edit })));

  it.each(edits)('finds in $file what it changes: the package that $name', async ({ file, text, replacement }) => {
    const source = await readFile(join(root, 'lib', file), 'utf8');
    expect(source.split(text)).toHaveLength(2);
    expect(replacement).not.toBe(text);
  });
});

describe('with wrong arguments', () => {
  it.each([
    [['--seconds', 'ten'], "Expected --seconds to be a whole number from 1, got 'ten'."],
    [['--sed', '1'], "Unknown option '--sed'"],
  ])('says what is wrong with %j, and how it is done', async (args, message) => {
    const { stdout, stderr, code } = await chaos(...args);
    expect(stderr).toContain(message);
    expect(stderr).toContain('npm run chaos -- [--seconds 60] [--seed <number>]');
    expect(stdout).toBe('');
    expect(code).toBe(2);
  });
});
