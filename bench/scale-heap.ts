import { setTimeout as sleep } from 'node:timers/promises';
import { ScaleApp } from './scale-app';
import { format } from './statistics';
import { SteadyLoad } from './steady-load';

const SAMPLES = 10;
const CONNECTIONS = 20;

/** Of twenty requests. */
const paths = ['update', 'update', 'nothing', 'nothing', 'missing', 'refused', ...Array.from({ length: 14 }, () => 'select')];

export interface HeapFigures {
  requests: number;
  /** After the warm-up, and after each tenth. */
  samples: { requests: number; heapBytes: number }[];
  bytesPerRequest: number;
}

/** The server's heap after garbage collection, again and again: what requests leave behind. */
export async function measureHeap(requests: number): Promise<{ report: string; figures: HeapFigures }> {
  const server = await ScaleApp.start('scale-server.mjs', ['session', '10'], { execArgv: ['--expose-gc'] });
  const samples: HeapFigures['samples'] = [];
  let answered = 0;
  try {
    // Optimized code is part of the heap: most of it is made in the warm-up.
    await send(server, Math.max(requests / SAMPLES, 50_000));
    samples.push({ requests: 0, heapBytes: await server.heap() });
    for (let sample = 1; sample <= SAMPLES; sample++) {
      answered += await send(server, (sample * requests) / SAMPLES - answered);
      samples.push({ requests: answered, heapBytes: await server.heap() });
    }
  } finally {
    await server.stop();
  }
  const bytesPerRequest = slopeOf(samples);
  const lines = samples.map((sample) => `| ${format(sample.requests)} | ${format(sample.heapBytes / 1_024)} KB |`);
  const report = [
    `Heap of the server process after garbage collection, over ${format(requests)} requests: 70 % read, 10 % write, 10 % run no statement, 5 % end with 404, 5 % throw`,
    '| requests after the warm-up | heap |',
    '| --- | --- |',
    ...lines,
    `  slope (least squares): ${format(bytesPerRequest, 3)} bytes per request; ${format((bytesPerRequest * requests) / 1_024, 1)} KB over the run`,
  ].join('\n');
  return { report, figures: { requests, samples, bytesPerRequest } };
}

/** @returns how many it were: those on their way at the end are answered too */
async function send({ port }: ScaleApp, requests: number): Promise<number> {
  let answered = 0;
  const load = await SteadyLoad.start({ port, connections: CONNECTIONS, requestOf, onAnswer: () => answered++ });
  while (answered < requests) {
    await sleep(20);
    const { statuses } = load.take();
    if (statuses[0] || statuses[500] || statuses[503]) throw new Error(`Expected other answers, got ${JSON.stringify(statuses)}.`);
  }
  await load.stop();
  return answered;
}

function requestOf(n: number): string {
  return `GET /${paths[n % paths.length]}/${(n % 1_000) + 1}`;
}

function slopeOf(samples: HeapFigures['samples']): number {
  const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const [x, y] = [mean(samples.map(({ requests }) => requests)), mean(samples.map(({ heapBytes }) => heapBytes))];
  const sum = (term: (sample: HeapFigures['samples'][number]) => number) => samples.reduce((total, sample) => total + term(sample), 0);
  return sum(({ requests, heapBytes }) => (requests - x) * (heapBytes - y)) / sum(({ requests }) => (requests - x) ** 2);
}
